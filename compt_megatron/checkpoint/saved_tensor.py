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
from itertools import product
from math import prod
from typing import Any

import numpy as np
import torch

from compt_megatron.checkpoint.contract import Region, region_shape

STORAGES = {
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
_BLOCK = 4 * 2**20  # bytes read at a time where only parts of rows are wanted
_RUN = 2**18  # bytes of a part of a row that are worth a read of their own: a disk reads ahead only in order
LOCAL_HEADER = struct.Struct("<4s5H3L2H")  # of a zip entry: ends with the lengths of its name and its extra field


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
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
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
    contiguous = strides(size) == tuple(stride) or prod(size) <= 1
    stored = entry.compress_type == zipfile.ZIP_STORED and order == b"little" and isinstance(dtype, torch.dtype)
    if not (contiguous and stored):
        return SavedTensor((), torch.uint8, 0, False)
    header = LOCAL_HEADER.unpack(os.pread(descriptor, LOCAL_HEADER.size, start + entry.header_offset))
    data = start + entry.header_offset + LOCAL_HEADER.size + header[-2] + header[-1]
    return SavedTensor(tuple(size), dtype, data + offset * dtype.itemsize, True)


def strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(prod(shape[index + 1 :]) for index in range(len(shape)))


def read_box(descriptor: int, start: int, length: int, saved: SavedTensor, box: Region) -> torch.Tensor:
    """The values of `box` of the tensor saved at bytes [start, start + length), as a new tensor."""
    if not saved.plain:
        stream: Any = io.BufferedReader(FileSlice(descriptor, start, length))
        return torch.load(stream, map_location="cpu", weights_only=True)[box].clone()
    return read_strided(descriptor, saved.start, saved.shape, saved.dtype, box)


def read_strided(descriptor: int, start: int, shape: tuple[int, ...], dtype: torch.dtype, box: Region) -> torch.Tensor:
    """Read a box of a contiguous tensor that begins at byte `start`. Memory: the box, and a block of 4 MiB."""
    out = torch.empty(region_shape(box), dtype=dtype)
    if not out.numel():
        return out
    steps = [step * dtype.itemsize for step in strides(shape)]
    view = out.reshape(-1).view(torch.uint8).numpy().data
    # below dimension `cut` the box is whole, so that each of its indices above `cut` is one run of bytes
    cut = max((at for at, size in enumerate(shape) if box[at].stop - box[at].start != size), default=0)
    run = prod(part.stop - part.start for part in box[cut:]) * dtype.itemsize
    first = start + sum(part.start * step for part, step in zip(box, steps, strict=True))
    if cut == 0:
        fill(descriptor, first, view)
        return out
    rows = box[cut - 1].stop - box[cut - 1].start
    for index in product(*(range(part.stop - part.start) for part in box[: cut - 1])):
        at = first + sum(place * step for place, step in zip(index, steps, strict=False))
        _fill_runs(descriptor, at, steps[cut - 1], view[: rows * run], run)
        view = view[rows * run :]
    return out


def _fill_runs(descriptor: int, start: int, step: int, view: memoryview, run: int) -> None:
    """Fill `view` with runs of `run` bytes, of which one begins every `step` bytes."""
    count = len(view) // run
    if run >= _RUN or step > _BLOCK or count == 1:
        for index in range(count):
            fill(descriptor, start + index * step, view[index * run : (index + 1) * run])
        return
    block = np.empty((min(count, _BLOCK // step), step), np.uint8)
    target = np.frombuffer(view, np.uint8).reshape(count, run)
    for index in range(0, count, len(block)):
        rows = min(len(block), count - index)
        length = (rows - 1) * step + run  # the last row is not read to its end, which may be that of the file
        fill(descriptor, start + index * step, block.reshape(-1)[:length].data)
        target[index : index + rows] = block[:rows, :run]


def fill(descriptor: int, start: int, view: memoryview) -> None:
    while view:
        count = os.preadv(descriptor, [view], start)
        if count <= 0:
            raise OSError("the file ends before the tensor does")
        view, start = view[count:], start + count
