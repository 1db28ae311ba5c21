"""Checkpoints as whole things: look at one, check one, turn one into another format."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from compt_megatron.checkpoint.commit import SINGLE_FILES
from compt_megatron.checkpoint.contract import Layout, Reader, TensorInfo, dtype_name, slabs, split_name
from compt_megatron.checkpoint.digest import weight_hash
from compt_megatron.checkpoint.formats import FORMATS, detect, open_reader, open_writer
from compt_megatron.checkpoint.guard import Guard
from compt_megatron.checkpoint.manifest import manifest_path, recorded_tensors
from compt_megatron.errors import UserError
from compt_megatron.spec.table import ModelSpec

__all__ = ["check", "convert", "inspect", "weight_hash"]

_SLAB = 64 * 2**20  # bytes of a tensor in memory at a time
_CAST = ("weight",)  # what --dtype applies to: optimizer state keeps its own precision


def inspect(path: str | Path, spec: ModelSpec | None = None, trust_pickle: bool = False) -> dict[str, Any]:
    """What a checkpoint holds, from its description alone (no data file is read).

    Keys: path, format, model {name, family, digest, parameters}, layout, tensors {name: {dtype, shape, bytes}},
    summary {prefix: {tensors, elements, bytes, dtypes}}, bytes, created_by, lineage, certificate (operator, seed,
    exact, approximate and new tensors counted), train, notes. Raises UserError if it cannot be opened.
    """
    path = Path(path)
    reader = open_reader(path, spec, trust_pickle)
    try:
        tensors, known, model = reader.tensors(), reader.metadata(), reader.spec
    finally:
        reader.close()
    assert model is not None
    return {
        "path": str(path),
        "format": detect(path),
        "model": {
            "name": model.name,
            "family": model.family,
            "digest": model.digest,
            "parameters": model.numel,
            "config": model.config,
        },
        "layout": known.get("layout"),
        "created_by": known.get("created_by"),
        "summary": _summary(tensors),
        "bytes": sum(info.nbytes for info in tensors.values()),
        "lineage": known.get("lineage") or [],
        "certificate": _certificate_summary(known.get("certificate")),
        "train": known.get("train"),
        "notes": known.get("notes") or [],
        "tensors": {
            name: {"dtype": dtype_name(info.dtype), "shape": list(info.shape), "bytes": info.nbytes}
            for name, info in tensors.items()
        },
    }


def _summary(tensors: dict[str, TensorInfo]) -> dict[str, dict[str, Any]]:
    summary: dict[str, dict[str, Any]] = {}
    for name, info in tensors.items():
        entry = summary.setdefault(split_name(name)[0], {"tensors": 0, "elements": 0, "bytes": 0, "dtypes": []})
        entry["tensors"] += 1
        entry["elements"] += info.nbytes // info.dtype.itemsize
        entry["bytes"] += info.nbytes
        if (dtype := dtype_name(info.dtype)) not in entry["dtypes"]:
            entry["dtypes"].append(dtype)
    return summary


def _certificate_summary(certificate: dict[str, Any] | None) -> dict[str, Any] | None:
    """A certificate without its list of tensors, which are counted by their exactness instead."""
    if certificate is None:
        return None
    counts: dict[str, int] = {}
    for exactness in (certificate.get("tensors") or {}).values():
        counts[str(exactness)] = counts.get(str(exactness), 0) + 1
    return {**{key: value for key, value in certificate.items() if key != "tensors"}, "tensors": counts}


def check(path: str | Path, spec: ModelSpec | None = None) -> None:
    """Check a checkpoint: every file against its checksum, every tensor of the model there, nothing more or less than
    was recorded, all of it readable.

    Raises UserError at the first defect, naming the file or tensor.
    """
    path = Path(path)
    reader = open_reader(path, spec)
    try:
        _check_tensors(path, reader)
        known = reader.metadata()
        if "checksums" in known and path.is_dir():
            root = path if manifest_path(path).is_file() else path.parent  # an iteration's folder within one of ours
            Guard(root, known).check_all()
            _check_no_strangers(root, known)
        for name, info in reader.tensors().items():
            for region in slabs(info, _SLAB):
                _check_finite(path, name, reader.read(name, region))
    finally:
        reader.close()


def _check_finite(path: Path, name: str, values: torch.Tensor) -> None:
    if values.is_floating_point() and not values.isfinite().all():
        raise UserError(f"{path}: '{name}' holds values that are not finite; go back to a checkpoint before that")


def _check_no_strangers(path: Path, known: dict[str, Any]) -> None:
    own = {"compt.json", *known["checksums"]}
    own |= {str(parent) for name in known["checksums"] for parent in Path(name).parents}
    strangers = sorted({str(entry.relative_to(path)) for entry in path.rglob("*")} - own)
    if strangers:
        raise UserError(f"{path}: '{strangers[0]}' is not part of this checkpoint; move it elsewhere")


def _check_tensors(path: Path, reader: Reader) -> None:
    assert reader.spec is not None
    tensors, known = reader.tensors(), reader.metadata()
    recorded = recorded_tensors(known) if "tensors" in known else tensors
    for name in sorted(recorded.keys() | tensors.keys()):
        if recorded.get(name) != tensors.get(name):
            here, there = tensors.get(name, "missing"), recorded.get(name, "not recorded")
            raise UserError(f"{path}: '{name}' is {here}, but compt.json says {there}; restore it from a copy")
    for param in reader.spec.params:
        if f"weight/{param}" not in tensors:
            raise UserError(f"{path}: has no 'weight/{param}'; it is not a whole checkpoint of {reader.spec.name}")


def convert(
    src: str | Path,
    dst: str | Path,
    format: str,
    *,
    spec: ModelSpec | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    trust_pickle: bool = False,
    config: dict[str, Any] | None = None,
    attachments: dict[str, Path] | None = None,
    layout: Layout | None = None,
) -> list[str]:
    """Write checkpoint `src` as `dst` in another format (or another `dtype` of its weights), tensor by tensor.

    Returns one line for each thing that was left out because the format cannot hold it (also kept in the notes of the
    result). `config` replaces the model config that is written, where the same model's tokenizer is found elsewhere;
    `attachments` are files {name: source} that the folder gets beside its own, the tokenizer's vocabulary; those of the
    source are passed on. `layout`: the model-parallel ranks that Megatron's files are cut for.
    Memory: a slab of 64 MiB, or one row, of a tensor. Raises UserError; then nothing is left behind.
    """
    keep_apart(src, dst)
    reader = open_reader(src, spec, trust_pickle)
    try:
        assert reader.spec is not None
        kept, left_out = _what_fits(reader.tensors(), format)
        files = {**reader.metadata().get("attachments", {}), **{n: str(p) for n, p in (attachments or {}).items()}}
        left_out += _files_left_out(files, Path(dst), format)
        cast = {name: _as_dtype(name, info, dtype) for name, info in kept.items()}
        rounded = [f"weights cast to {dtype_name(dtype)}"] if dtype is not None and cast != kept else []
        known, kept = reader.metadata(), cast
        notes = [*(known.get("notes") or []), *left_out, *rounded]
        metadata = {**known, "layout": None, "notes": notes, "attachments": files}
        target = reader.spec if config is None else replace(reader.spec, config=config)
        assert target.digest == reader.spec.digest, "another config of the same model"
        writer = open_writer(dst, format, target, overwrite=overwrite, layout=layout)
        try:
            writer.declare(kept)
            for name, info in kept.items():
                for region in slabs(info, _SLAB):
                    offsets = tuple(part.start for part in region)
                    writer.write(name, offsets, reader.read(name, region).to(info.dtype))
            writer.commit(metadata)
        except BaseException:
            writer.abort()
            raise
    finally:
        reader.close()
    return left_out


def _files_left_out(files: dict[str, str], dst: Path, format: str) -> list[str]:
    """A line if the result has no place for the files that lie beside the source's weights."""
    if not files or (format in FORMATS and FORMATS[format].attachments and dst.suffix not in SINGLE_FILES):
        return []
    return [f"left out: {', '.join(sorted(files))}, the result has no place for them"]


def keep_apart(src: str | Path, dst: str | Path) -> None:
    """Raise UserError if writing `dst` would replace or change the source `src`."""
    source, target = Path(src).resolve(), Path(dst).resolve()
    if source == target:
        raise UserError(f"{dst}: is the source itself; choose another destination")
    if source in target.parents or target in source.parents:
        raise UserError(f"{dst}: the source and the destination lie inside each other; choose another destination")


def _as_dtype(name: str, info: TensorInfo, dtype: torch.dtype | None) -> TensorInfo:
    applies = dtype is not None and split_name(name)[0] in _CAST and info.dtype.is_floating_point
    return TensorInfo(info.shape, dtype) if applies and dtype is not None else info


def _what_fits(tensors: dict[str, TensorInfo], format: str) -> tuple[dict[str, TensorInfo], list[str]]:
    """The tensors that a format can hold, and a line for every kind of tensor that it cannot."""
    holds = FORMATS[format].prefixes if format in FORMATS else ()
    kept = {name: info for name, info in tensors.items() if split_name(name)[0] in holds}
    summary = _summary({name: info for name, info in tensors.items() if name not in kept})
    return kept, [
        f"left out: {entry['tensors']} {prefix}/ tensors, {format} has no place for them"
        for prefix, entry in summary.items()
    ]
