"""A safetensors file read by boxes: its header is checked against the file, then values are read where they lie.

The file is not mapped, so that what a process has read does not count as its memory, and a file that shrinks under a
reader is an error and not a signal.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from compt_megatron.checkpoint.contract import Region, TensorInfo
from compt_megatron.checkpoint.flat_file import SAFETENSORS_DTYPES
from compt_megatron.checkpoint.saved_tensor import read_strided
from compt_megatron.errors import UserError

_MOST_HEADER = 100 * 10**6  # bytes, safetensors' own limit
_MOST_DIMS = 64


def is_safetensors(path: Path) -> bool:
    """Whether the file begins as a safetensors file does."""
    with open(path, "rb") as file:
        head = file.read(9)
    return len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") < 2**40


def header_bytes(path: Path) -> bytes:
    """The JSON text at the beginning of a safetensors file. Raises ValueError for a length that cannot be right."""
    with open(path, "rb") as file:
        size, head = os.fstat(file.fileno()).st_size, file.read(8)
        length = int.from_bytes(head, "little")
        if len(head) < 8 or not 2 <= length <= min(size - 8, _MOST_HEADER):
            raise ValueError(f"a header of {length} bytes in a file of {size}" if len(head) == 8 else "it is too short")
        return file.read(length)


class SafetensorsFile:
    """One open safetensors file. Raises UserError if it is truncated or its header does not describe it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = -1
        try:
            text = header_bytes(path)
            self._tensors, self._starts = _parsed(text, path)
            end = len(text) + 8 + sum(info.nbytes for info in self._tensors.values())
            size = path.stat().st_size
            if size != end:
                raise ValueError(f"truncated or changed: {size} bytes where its header describes {end}")
            self._starts = {key: start + 8 + len(text) for key, start in self._starts.items()}
            self._descriptor = os.open(path, os.O_RDONLY)
        except (ValueError, OSError, RecursionError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise UserError(f"{path}: damaged safetensors file ({reason}); restore it or use another") from error

    def tensors(self) -> dict[str, TensorInfo]:
        """Shape and dtype of every tensor, in the order of the header."""
        return dict(self._tensors)

    def read(self, key: str, region: Region) -> torch.Tensor:
        """A new tensor with the values of a box of tensor `key`. Memory: the box, and a block of 4 MiB."""
        info = self._tensors[key]
        try:
            return read_strided(self._descriptor, self._starts[key], info.shape, info.dtype, region)
        except OSError as error:
            raise UserError(f"{self.path}: cannot read '{key}' ({error}); restore it or use another") from error

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _parsed(text: bytes, path: Path) -> tuple[dict[str, TensorInfo], dict[str, int]]:
    """Tensors, and where their data begin, relative to the end of the header.

    Raises ValueError unless the tensors lie one behind the other, without gaps, each as long as its shape says.
    """
    header = json.loads(text, object_pairs_hook=_without_doubles)
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    header.pop("__metadata__", None)
    tensors: dict[str, TensorInfo] = {}
    spans: dict[str, tuple[int, int]] = {}
    for key, entry in header.items():
        tensors[key], spans[key] = _entry(key, entry, path)
    at = 0
    for key, (start, stop) in sorted(spans.items(), key=lambda item: item[1]):
        if start != at:
            raise ValueError(f"'{key}' begins at byte {start} where {at} is expected: tensors overlap or leave gaps")
        at = stop
    return tensors, {key: start for key, (start, _) in spans.items()}


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("its header names something twice")
    return found


def _entry(key: str, entry: Any, path: Path) -> tuple[TensorInfo, tuple[int, int]]:
    described = isinstance(entry, dict) and entry.keys() >= {"dtype", "shape", "data_offsets"}
    if not described or not isinstance(entry["dtype"], str):
        raise ValueError(f"its header does not describe '{key}'")
    if entry["dtype"] not in SAFETENSORS_DTYPES:
        raise UserError(f"{path}: '{key}' has dtype {entry['dtype']!r}, which is not supported; convert it first")
    shape, span = entry["shape"], entry["data_offsets"]
    if not _counts(shape) or len(shape) > _MOST_DIMS or not _counts(span) or len(span) != 2:
        raise ValueError(f"its header has no sound shape or place for '{key}'")
    info = TensorInfo(tuple(shape), SAFETENSORS_DTYPES[entry["dtype"]])
    if span[1] - span[0] != info.nbytes:
        raise ValueError(f"'{key}' has {span[1] - span[0]} bytes, its shape {shape} needs {info.nbytes}")
    return info, (span[0], span[1])


def _counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**62 for value in values)
