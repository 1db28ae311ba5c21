"""A safetensors file that is filled in place: tensors arrive in any order, as boxes, from several ranks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from math import prod
from pathlib import Path

import numpy as np
import torch

from compt_megatron.checkpoint.contract import Region, TensorInfo
from compt_megatron.checkpoint.out_file import OutFile, no_room, reserve
from compt_megatron.checkpoint.saved_tensor import read_strided

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


class FlatFile:
    """The layout of one safetensors file, and this process's handle on it.

    Wide dtypes come first, as safetensors itself orders them, so that every tensor is aligned to its element.
    """

    def __init__(self, path: Path, tensors: dict[str, TensorInfo]) -> None:
        self.path, self.tensors = path, tensors
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        at = 0
        starts: dict[str, int] = {}
        for key in sorted(tensors, key=lambda key: -tensors[key].dtype.itemsize):
            info = tensors[key]
            starts[key], end = at, at + info.nbytes
            header[key] = {"dtype": _NAMES[info.dtype], "shape": list(info.shape), "data_offsets": [at, end]}
            at = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._header = len(text).to_bytes(8, "little") + text
        self._starts = {key: len(self._header) + start for key, start in starts.items()}
        self._size = len(self._header) + at
        self._out: OutFile | None = None
        self._header_is_ours = False

    @property
    def out(self) -> OutFile:
        assert self._out is not None, f"{self.path} is not open"
        return self._out

    def create(self) -> None:
        """Make the file, whole in size; one rank does this before any rank opens it. One that a killed run left in
        this layout is kept, with all that was written to it."""
        self._header_is_ours = True
        if self._is_there():
            return
        with no_room(self.path), open(self.path, "wb") as file:
            file.write(self._header)
            file.flush()
            if not reserve(file.fileno(), 0, self._size, longer=True):
                file.truncate(self._size)

    def _is_there(self) -> bool:
        if not self.path.is_file() or self.path.stat().st_size != self._size:
            return False
        with open(self.path, "rb") as file:
            return file.read(len(self._header)) == self._header

    def open(self) -> None:
        self._out = OutFile(self.path)
        if self._header_is_ours:
            self._out.sums.update(0, memoryview(self._header))

    def position(self, key: str) -> int:
        """The byte at which tensor `key` begins."""
        return self._starts[key]

    def write(self, key: str, offsets: tuple[int, ...], tensor: torch.Tensor) -> None:
        """Store a box of tensor `key`."""
        info = self.tensors[key]
        for at, data in self._runs(self._starts[key], info.shape, offsets, tensor.cpu().contiguous()):
            self.out.put(at, data)

    def _runs(
        self, start: int, shape: tuple[int, ...], offsets: tuple[int, ...], box: torch.Tensor
    ) -> Iterator[tuple[int, np.ndarray]]:
        """The runs of bytes that a box is in the file, and where each begins."""
        if not shape or tuple(box.shape[1:]) == shape[1:]:
            at = offsets[0] * prod(shape[1:]) * box.dtype.itemsize if shape else 0
            yield start + at, box.reshape(-1).view(torch.uint8).numpy()
            return
        step = prod(shape[1:]) * box.dtype.itemsize
        for index in range(box.shape[0]):
            yield from self._runs(start + (offsets[0] + index) * step, shape[1:], offsets[1:], box[index])

    def read_back(self, key: str, region: Region) -> torch.Tensor:
        """A box of tensor `key` as an earlier run left it in the file; its bytes are noted in the file's sums."""
        info = self.tensors[key]
        values = read_strided(self.out.descriptor, self._starts[key], info.shape, info.dtype, region)
        for at, data in self._runs(self._starts[key], info.shape, tuple(side.start for side in region), values):
            self.out.sums.update(at, data.data)
        return values

    def finish(self) -> None:
        """Make durable what this process wrote."""
        self.out.sync()
        self.out.close()

    def close(self) -> None:
        if self._out is not None:
            self._out.close()
