"""What is wrong with a checkpoint: every defect, a line each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from compt_megatron.checkpoint.contract import Reader, TensorInfo, slabs
from compt_megatron.checkpoint.formats import open_reader
from compt_megatron.checkpoint.guard import damaged_files
from compt_megatron.checkpoint.manifest import manifest_path, read_manifest, recorded_spec, recorded_tensors, under_name
from compt_megatron.errors import Defects, UserError, lines_of
from compt_megatron.spec.table import ModelSpec

_SLAB = 8 * 2**20  # bytes of a tensor in memory at a time

Record = tuple[Path, dict[str, Any]]  # the folder whose files compt.json lists, and its content


def check(path: str | Path, spec: ModelSpec | None = None, trust_pickle: bool = False) -> None:
    """Raise `Defects` if a checkpoint has any (see `defects`)."""
    if found := defects(path, spec, trust_pickle):
        raise Defects(found)


def defects(path: str | Path, spec: ModelSpec | None = None, trust_pickle: bool = False) -> list[str]:
    """Check a checkpoint: every file against its checksum, every tensor of the model there, nothing more or less than
    was recorded, all of it readable and finite.

    Returns a line for each defect, naming the file or tensor. Where damaged files keep it from being opened, what its
    tensors hold remains unknown: then its files alone are what is checked.
    """
    path = Path(path)
    record: Record | None = None
    try:
        record = _record(path, spec)
        reader = open_reader(path, spec, trust_pickle)
    except UserError as error:
        if record is None:
            return lines_of(error)
        return [*(damaged_files(*record) or lines_of(error)), *(_strangers(*record) if path.is_dir() else [])]
    try:
        found = list(_wrong_tensors(path, reader))
        if record is not None and path.is_dir():
            found += damaged_files(*record)
            found += _strangers(*record)
        found += _wrong_values(path, reader)
    finally:
        reader.close()
    return list(dict.fromkeys(found))


def _record(path: Path, spec: ModelSpec | None) -> Record | None:
    """What compt.json says, which may lie above the folder of one iteration. Raises UserError if it is damaged, or that
    of another model than `spec`."""
    if path.is_dir() and not manifest_path(path).is_file():
        folder, content = path.parent, _above(path)
    elif path.is_dir():
        folder, content = path, read_manifest(path)
    else:
        folder, content = path.parent, under_name(read_manifest(path), path.name)
    recorded_spec(content, spec, path)
    return None if content is None else (folder, content)


def _above(path: Path) -> dict[str, Any] | None:
    """The compt.json above a folder, if it lists files in it."""
    try:
        content = read_manifest(path.parent)
    except UserError:  # of no concern, or said when the checkpoint is opened
        return None
    listed = content is not None and any(name.startswith(f"{path.name}/") for name in content["files"])
    return content if listed else None


def _wrong_tensors(path: Path, reader: Reader) -> Iterator[str]:
    """Tensors that were recorded otherwise, and parameters of the model that are not there."""
    assert reader.spec is not None
    tensors, known = reader.tensors(), reader.metadata()
    recorded: dict[str, TensorInfo] = recorded_tensors(known) if "tensors" in known else tensors
    for name in sorted(recorded.keys() | tensors.keys()):
        if recorded.get(name) != tensors.get(name):
            here, there = tensors.get(name, "missing"), recorded.get(name, "not recorded")
            yield f"{path}: '{name}' is {here}, but compt.json says {there}; restore it from a copy"
    for param in reader.spec.params:
        if (name := f"weight/{param}") not in tensors and name not in recorded:
            yield f"{path}: has no '{name}'; it is not a whole checkpoint of {reader.spec.name}"


def _strangers(folder: Path, known: dict[str, Any]) -> list[str]:
    own = {"compt.json", *known["checksums"]}
    own |= {str(parent) for name in known["checksums"] for parent in Path(name).parents}
    there = sorted({str(entry.relative_to(folder)) for entry in folder.rglob("*")} - own)
    return [f"{folder}: '{name}' is not part of this checkpoint; move it elsewhere" for name in there]


def _wrong_values(path: Path, reader: Reader) -> Iterator[str]:
    """Tensors that cannot be read, or hold values that are not finite."""
    for name, info in reader.tensors().items():
        try:
            for region in slabs(info, _SLAB):
                values = reader.read(name, region)
                if values.is_floating_point() and not values.isfinite().all():
                    yield f"{path}: '{name}' holds values that are not finite; go back to a checkpoint before that"
                    break
        except UserError as error:
            yield from lines_of(error)
