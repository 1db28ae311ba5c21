"""Read a box of a tensor that torch.save wrote at some offset of a file, without reading the rest of it.

torch.save makes an uncompressed zip archive: `data.pkl` names the dtype, shape and strides, `data/0` is the storage.
Megatron and torch.distributed.checkpoint lay such archives one behind the other. Only tensors of torch.save's plain
form are read this way; anything else goes through torch.load(weights_only=True), whole.
"""

from __future__ import annotations

import collections
import io
import os
import pickle
import struct
import zipfile
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from compt_megatron.checkpoint.contract import Region, region_shape

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")  # of a zip entry: ends with the lengths of its name and its extra field


@dataclass(frozen=True)
class SavedTensor:
    """Where the elements of a saved tensor lie: byte `start` of the file on, contiguous. `plain` False: unknown."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int
    plain: bool


class FileSlice(io.RawIOBase):
    """Bytes [start, start + length) of an open file as a file of its own (reads do not move the descriptor)."""

    def __init__(self, descriptor: int, start: int, length: int) -> None:
        super().__init__()
        self._descriptor, self._start, self._length, self._at = descriptor, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = max(0, (0, self._at, self._length)[whence] + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")[: max(0, self._length - self._at)]
        count = os.preadv(self._descriptor, [view], self._start + self._at) if view else 0
        self._at += count
        return count


class _Described(pickle.Unpickler):
    """Reads `data.pkl` of one tensor as a description. Nothing but the names of that form is looked up."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *rest: (storage, offset, size, stride)
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise pickle.UnpicklingError(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        return pid  # ("storage", dtype, key, location, element count)


def locate(descriptor: int, start: int, length: int) -> SavedTensor:
    """Find the elements of the tensor saved at bytes [start, start + length) of an open file."""
    try:
        with zipfile.ZipFile(io.BufferedReader(FileSlice(descriptor, start, length))) as archive:
            entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
            described = _Described(io.BytesIO(archive.read(entries["data.pkl"]))).load()
            (_, dtype, key, _, _), offset, size, stride = described
            entry = entries[f"data/{key}"]
            order = archive.read(entries["byteorder"]) if "byteorder" in entries else b"little"
    except (zipfile.BadZipFile, pickle.UnpicklingError, KeyError, ValueError, TypeError, AttributeError):
        return SavedTensor((), torch.uint8, 0, False)
    contiguous = _strides(size) == tuple(stride) or prod(size) <= 1
    stored = entry.compress_type == zipfile.ZIP_STORED and order == b"little" and isinstance(dtype, torch.dtype)
    if not (contiguous and stored):
        return SavedTensor((), torch.uint8, 0, False)
    header = _LOCAL_HEADER.unpack(os.pread(descriptor, _LOCAL_HEADER.size, start + entry.header_offset))
    data = start + entry.header_offset + _LOCAL_HEADER.size + header[-2] + header[-1]
    return SavedTensor(tuple(size), dtype, data + offset * dtype.itemsize, True)


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(prod(shape[index + 1 :]) for index in range(len(shape)))


def read_box(descriptor: int, start: int, length: int, saved: SavedTensor, box: Region) -> torch.Tensor:
    """The values of `box` of the tensor saved at bytes [start, start + length), as a new tensor."""
    if not saved.plain:
        stream: Any = io.BufferedReader(FileSlice(descriptor, start, length))
        return torch.load(stream, map_location="cpu", weights_only=True)[box].clone()
    return read_strided(descriptor, saved.start, saved.shape, saved.dtype, box)


def read_strided(descriptor: int, start: int, shape: tuple[int, ...], dtype: torch.dtype, box: Region) -> torch.Tensor:
    """Read a box of a contiguous tensor that begins at byte `start`: one read of the rows it touches."""
    out = torch.empty(region_shape(box), dtype=dtype)
    if not out.numel():
        return out
    lead = 0  # dimensions of which the box holds one index: they only move the start
    while lead < len(shape) and box[lead].stop - box[lead].start == 1:
        lead += 1
    row = prod(shape[lead + 1 :])
    first = sum(part.start * step for part, step in zip(box[: lead + 1], _strides(shape), strict=False))
    rows = 1 if lead >= len(shape) else box[lead].stop - box[lead].start
    if all(part.stop - part.start == size for part, size in zip(box[lead + 1 :], shape[lead + 1 :], strict=True)):
        _fill(descriptor, start + first * dtype.itemsize, out)
        return out
    slab = torch.empty((rows, *shape[lead + 1 :]), dtype=dtype)
    _fill(descriptor, start + first * dtype.itemsize, slab)
    assert slab.numel() == rows * row
    return out.copy_(slab[(slice(None), *box[lead + 1 :])].reshape(out.shape))


def _fill(descriptor: int, start: int, out: torch.Tensor) -> None:
    view = out.reshape(-1).view(torch.uint8).numpy().data
    while view:
        count = os.preadv(descriptor, [view], start)
        if count <= 0:
            raise OSError("the file ends before the tensor does")
        view, start = view[count:], start + count
