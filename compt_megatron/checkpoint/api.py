"""Checkpoints as whole things: look at one, check one, turn one into another format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from compt_megatron.checkpoint.contract import Reader, TensorInfo, dtype_name, slabs, split_name
from compt_megatron.checkpoint.convert import convert, keep_apart
from compt_megatron.checkpoint.digest import weight_hash
from compt_megatron.checkpoint.formats import detect, open_reader
from compt_megatron.checkpoint.guard import Guard
from compt_megatron.checkpoint.manifest import manifest_path, recorded_tensors
from compt_megatron.errors import UserError
from compt_megatron.spec.table import ModelSpec

__all__ = ["check", "convert", "inspect", "keep_apart", "weight_hash"]

_SLAB = 8 * 2**20  # bytes of a tensor in memory at a time


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


def check(path: str | Path, spec: ModelSpec | None = None, trust_pickle: bool = False) -> None:
    """Check a checkpoint: every file against its checksum, every tensor of the model there, nothing more or less than
    was recorded, all of it readable.

    Raises UserError at the first defect, naming the file or tensor.
    """
    path = Path(path)
    reader = open_reader(path, spec, trust_pickle)
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
