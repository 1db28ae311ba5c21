"""torch.distributed.checkpoint folders (Megatron's `torch_dist`), read and written box by box without megatron-core.

Torch's own writer takes a finished plan and asks for each tensor when it comes to it. Here tensors arrive in the order
in which somebody made them, so the files are written directly in the same form: torch.save archives one behind the
other in `__{rank}_0.distcp`, and `.metadata`, which says what lies where. Torch's own reader reads the result.
"""

from __future__ import annotations

import os
from bisect import bisect_left, bisect_right
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from compt_megatron.checkpoint.commit import HashedFile
from compt_megatron.checkpoint.contract import Region, TensorInfo, region_shape
from compt_megatron.checkpoint.dcp_metadata import read_dcp_metadata
from compt_megatron.checkpoint.guard import Guard
from compt_megatron.checkpoint.saved_tensor import SavedTensor, locate, read_box
from compt_megatron.errors import UserError

METADATA = ".metadata"
_ALIGN = 64  # bytes; archives start at multiples of it, so that tensors in a mapped file are aligned


class _Chunk(NamedTuple):
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


class _Chunks:
    """The stored boxes of one tensor, ordered by their first index."""

    def __init__(self, chunks: list[_Chunk]) -> None:
        self._chunks = sorted(chunks)
        self._starts = [chunk.offsets[:1] for chunk in self._chunks]
        self._longest = max((chunk.sizes[0] for chunk in chunks if chunk.sizes), default=0)

    def meeting(self, region: Region) -> list[_Chunk]:
        """The boxes that share at least one element with `region`."""
        near = self._chunks
        if region:
            first, last = (region[0].start - self._longest,), (region[0].stop,)
            near = near[bisect_right(self._starts, first) : bisect_left(self._starts, last)]
        return [chunk for chunk in near if all(low < high for low, high in _common(chunk, region))]


def _common(chunk: _Chunk, region: Region) -> list[tuple[int, int]]:
    return [
        (max(part.start, offset), min(part.stop, offset + size))
        for part, offset, size in zip(region, chunk.offsets, chunk.sizes, strict=True)
    ]


class TorchDistFolder:
    """An open torch_dist folder: tensors by their key in the file."""

    def __init__(self, path: Path, guard: Guard, trust_pickle: bool) -> None:
        self.path, self._guard = path, guard
        content = read_dcp_metadata(guard.file(METADATA), trust_pickle)
        self.tensors: dict[str, TensorInfo] = {}
        self.objects: list[str] = []
        self._chunks: dict[str, _Chunks] = {}
        self._located: dict[tuple[str, int], SavedTensor] = {}
        self._descriptors: dict[str, int] = {}
        try:
            for key, value in content.state_dict_metadata.items():
                if isinstance(value, TensorStorageMetadata):
                    self.tensors[key] = TensorInfo(tuple(value.size), value.properties.dtype)
                    chunks = [self._chunk(key, chunk, content.storage_data) for chunk in value.chunks]
                    self._chunks[key] = _Chunks(chunks)
                else:
                    self.objects.append(key)
        except (AttributeError, TypeError, ValueError, IndexError) as error:  # a pickle of other objects than ours
            raise UserError(f"{path / METADATA}: damaged ({error}); restore it or use another checkpoint") from error

    def _chunk(self, key: str, chunk: Any, storage: dict[Any, Any]) -> _Chunk:
        info = storage.get(MetadataIndex(key, chunk.offsets))
        if info is None:
            raise UserError(f"{self.path / METADATA}: does not say where '{key}' lies; use another checkpoint")
        if getattr(info, "transform_descriptors", None):
            raise UserError(f"{self.path}: '{key}' is stored compressed, which is not supported; save it uncompressed")
        if Path(info.relative_path).name != info.relative_path:
            raise UserError(
                f"{self.path / METADATA}: '{info.relative_path}' is no file of this folder; use another one"
            )
        return _Chunk(tuple(chunk.offsets), tuple(chunk.sizes), info.relative_path, info.offset, info.length)

    def read(self, key: str, region: Region) -> torch.Tensor:
        """The values of a box of tensor `key`; raises UserError if a file is damaged or does not hold all of it."""
        info = self.tensors[key]
        out = torch.empty(region_shape(region), dtype=info.dtype)
        found = 0
        for chunk in self._chunks[key].meeting(region):
            common = _common(chunk, region)
            inside = tuple(slice(low - at, high - at) for (low, high), at in zip(common, chunk.offsets, strict=True))
            target = tuple(slice(low - p.start, high - p.start) for (low, high), p in zip(common, region, strict=True))
            values = self._read_chunk(key, chunk, inside)
            out[target] = values
            found += values.numel()
        if found != out.numel():
            raise UserError(f"{self.path}: '{key}' is not stored whole; use another checkpoint")
        return out

    def _read_chunk(self, key: str, chunk: _Chunk, inside: Region) -> torch.Tensor:
        descriptor = self._open(chunk.file)
        place = (chunk.file, chunk.start)
        try:
            if place not in self._located:
                if chunk.start + chunk.length > os.fstat(descriptor).st_size:
                    raise OSError("the file is truncated")
                self._located[place] = locate(descriptor, chunk.start, chunk.length)
            saved = self._located[place]
            if saved.plain and saved.shape != chunk.sizes:
                raise ValueError(f"shape {saved.shape} where {chunk.sizes} is expected")
            values = read_box(descriptor, chunk.start, chunk.length, saved, inside)
            if values.dtype != self.tensors[key].dtype:
                raise ValueError(f"{values.dtype} where {self.tensors[key].dtype} is expected")
            return values
        except Exception as error:  # torch.load raises nearly anything for damaged bytes
            name, reason = self.path / chunk.file, " ".join(str(error).split()).partition(". ")[0]
            raise UserError(f"{name}: cannot read '{key}' ({reason}); restore it or use another checkpoint") from error

    def _open(self, name: str) -> int:
        if name not in self._descriptors:
            self._descriptors[name] = os.open(self._guard.file(name), os.O_RDONLY)
        return self._descriptors[name]

    def close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()


class ChunkFile:
    """This rank's data file: boxes of tensors in the order in which they come."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._path = folder / f"__{rank}_0.distcp"
        self._file: HashedFile | None = None  # made by the first box: a rank that has none leaves no file
        self.chunks: list[tuple[str, tuple[int, ...], tuple[int, ...], str, int, int]] = []
        self.blobs: list[tuple[str, str, int, int]] = []

    def _append(self, value: Any) -> tuple[str, int, int]:
        if self._file is None:
            self._file = HashedFile(self._path)
        self._file.write(bytes(-self._file.size % _ALIGN))
        start = self._file.size
        torch.save(value, self._file)  # type: ignore[arg-type]  # it needs no more of a stream than write and flush
        return self._path.name, start, self._file.size - start

    def write(self, key: str, offsets: tuple[int, ...], tensor: torch.Tensor) -> None:
        """Append a box of tensor `key`. torch.save would write the whole storage of a view, so views are copied."""
        tensor = tensor.detach().cpu().contiguous()
        if tensor.untyped_storage().nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        self.chunks.append((key, offsets, tuple(tensor.shape), *self._append(tensor)))

    def write_object(self, key: str, value: Any) -> None:
        self.blobs.append((key, *self._append(value)))

    def finish(self) -> list[tuple[str, str, int]]:
        """Make the file durable; returns (name, hash, bytes), or nothing if there is no file."""
        return [] if self._file is None else [self._file.finish()]

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
