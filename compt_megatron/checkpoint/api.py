"""Checkpoints as whole things: look at one, check one (defects.py), turn one into another format (convert.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compt_megatron.checkpoint.contract import TensorInfo, dtype_name, split_name
from compt_megatron.checkpoint.convert import convert, keep_apart
from compt_megatron.checkpoint.defects import check, defects
from compt_megatron.checkpoint.digest import weight_hash
from compt_megatron.checkpoint.formats import detect, open_reader
from compt_megatron.spec.table import ModelSpec

__all__ = ["check", "convert", "defects", "inspect", "keep_apart", "weight_hash"]


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
