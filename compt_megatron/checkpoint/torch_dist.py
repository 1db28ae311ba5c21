"""torch.distributed.checkpoint folders (Megatron's `torch_dist`), read and written box by box without megatron-core.

Torch's own writer takes a finished plan and asks for each tensor when it comes to it. Here tensors arrive in the order
in which somebody made them, so the files are written directly in the same form: torch.save archives one behind the
other in `__{rank}_{worker}.distcp`, and `.metadata`, which says what lies where. Torch's own reader reads the result.
"""

from __future__ import annotations

import os
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from compt_megatron.checkpoint.contract import Region, TensorInfo, region_shape
from compt_megatron.checkpoint.dcp_metadata import Index, TensorStorage, read_dcp_metadata
from compt_megatron.checkpoint.hashed_file import HashedFile
from compt_megatron.checkpoint.open_files import OpenFiles
from compt_megatron.checkpoint.saved_tensor import SavedTensor, locate, read_box
from compt_megatron.errors import UserError

METADATA = ".metadata"
_ALIGN = 64  # bytes; archives start at multiples of it, so that tensors in a mapped file are aligned

StoredChunk = tuple[str, tuple[int, ...], tuple[int, ...], str, int, int]  # key, offsets, sizes, file, start, length
StoredBlob = tuple[str, str, int, int]  # key, file, start, length


class _Chunk(NamedTuple):
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


def _inside(chunk: _Chunk, region: Region) -> Region:
    """What a stored box and `region` share, counted from the box's own first element."""
    common = _common(chunk, region)
    return tuple(slice(low - at, high - at) for (low, high), at in zip(common, chunk.offsets, strict=True))


class StoredObject(NamedTuple):
    """Where an object that is no tensor lies."""

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

    def __init__(self, path: Path, checked: Callable[[str], Path], trust_pickle: bool) -> None:
        """`checked` gives the path of one of the folder's files, once it has been compared with its checksum."""
        self.path, self._checked = path, checked
        content = read_dcp_metadata(checked(METADATA), trust_pickle)
        self.tensors: dict[str, TensorInfo] = {}
        self.objects: dict[str, StoredObject] = {}
        self._chunks: dict[str, _Chunks] = {}
        self._located: dict[tuple[str, int], SavedTensor] = {}
        self._files = OpenFiles(os.O_RDONLY)
        try:
            for key, value in content.state_dict_metadata.items():
                if isinstance(value, TensorStorage):
                    self.tensors[key] = TensorInfo(tuple(value.size), value.properties.dtype)
                    chunks = [self._chunk(key, chunk, content.storage_data) for chunk in value.chunks]
                    self._chunks[key] = _Chunks(chunks)
                else:
                    info = self._stored(key, content.storage_data.get(Index(key)))
                    self.objects[key] = StoredObject(info.relative_path, info.offset, info.length)
        except (AttributeError, TypeError, ValueError, IndexError) as error:  # a pickle of other objects than ours
            raise UserError(f"{path / METADATA}: damaged ({error}); restore it or use another checkpoint") from error

    def _chunk(self, key: str, chunk: Any, storage: dict[Any, Any]) -> _Chunk:
        info = self._stored(key, storage.get(Index(key, chunk.offsets)))
        return _Chunk(tuple(chunk.offsets), tuple(chunk.sizes), info.relative_path, info.offset, info.length)

    def _stored(self, key: str, info: Any) -> Any:
        """torch's own record of where something lies, checked."""
        if info is None:
            raise UserError(f"{self.path / METADATA}: does not say where '{key}' lies; use another checkpoint")
        if getattr(info, "transform_descriptors", None):
            raise UserError(f"{self.path}: '{key}' is stored compressed, which is not supported; save it uncompressed")
        if Path(info.relative_path).name != info.relative_path:
            raise UserError(
                f"{self.path / METADATA}: '{info.relative_path}' is no file of this folder; use another one"
            )
        return info

    def read(self, key: str, region: Region) -> torch.Tensor:
        """The values of a box of tensor `key`; raises UserError if a file is damaged or does not hold all of it."""
        info = self.tensors[key]
        meeting = self._chunks[key].meeting(region)
        if len(meeting) == 1 and _common(meeting[0], region) == [(part.start, part.stop) for part in region]:
            return self._read_chunk(key, meeting[0], _inside(meeting[0], region))
        out = torch.empty(region_shape(region), dtype=info.dtype)
        found = 0
        for chunk in meeting:
            common, inside = _common(chunk, region), _inside(chunk, region)
            target = tuple(slice(low - p.start, high - p.start) for (low, high), p in zip(common, region, strict=True))
            values = self._read_chunk(key, chunk, inside)
            out[target] = values
            found += values.numel()
        if found != out.numel():
            raise UserError(f"{self.path}: '{key}' is not stored whole; use another checkpoint")
        return out

    def _read_chunk(self, key: str, chunk: _Chunk, inside: Region) -> torch.Tensor:
        descriptor = self._files.descriptor(self._checked(chunk.file))
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

    def close(self) -> None:
        self._files.close()


class ChunkFile:
    """One data file: boxes of tensors in the order in which they come."""

    def __init__(self, path: Path) -> None:
        self._file = HashedFile(path)
        self.chunks: list[StoredChunk] = []
        self.blobs: list[StoredBlob] = []
        self._told = (0, 0)  # how many of them `progress` has told

    def _append(self, value: Any) -> tuple[str, int, int]:
        self._file.write(bytes(-self._file.size % _ALIGN))
        start = self._file.size
        torch.save(value, self._file)  # type: ignore[arg-type]  # it needs no more of a stream than write and flush
        return self._file.name, start, self._file.size - start

    def write(self, key: str, offsets: tuple[int, ...], tensor: torch.Tensor) -> None:
        """Append a box of tensor `key`. torch.save would write the whole storage of a view, so views are copied."""
        tensor = tensor.detach().cpu().contiguous()
        if tensor.untyped_storage().nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        self.chunks.append((key, offsets, tuple(tensor.shape), *self._append(tensor)))

    def write_object(self, key: str, value: Any) -> None:
        self.blobs.append((key, *self._append(value)))

    def progress(self) -> list[Any]:
        """Make all durable; returns what `resume` must know of what was written since the last call."""
        told, self._told = self._told, (len(self.chunks), len(self.blobs))
        return [self._file.progress(), self.chunks[told[0] :], self.blobs[told[1] :]]

    def resume(self, progress: list[Any]) -> bool:
        """Whether what an earlier run noted is there; if so, the file goes on behind it."""
        place, chunks, blobs = progress
        if not self._file.resume(place):
            return False
        self.chunks += [(key, tuple(offsets), tuple(sizes), *rest) for key, offsets, sizes, *rest in chunks]
        self.blobs += [tuple(blob) for blob in blobs]
        self._told = len(self.chunks), len(self.blobs)
        return True

    def finish(self) -> tuple[str, str, int]:
        """Make the file durable; returns (name, hash, bytes)."""
        return self._file.finish()

    def close(self) -> None:
        self._file.close()


class ChunkFiles:
    """The data files of one worker: `__{rank}_{worker}.distcp` for every model-parallel rank that it has boxes of."""

    def __init__(self, folder: Path, worker: int) -> None:
        self._folder, self._worker = folder, worker
        self._files: dict[int, ChunkFile] = {}  # made by its first box: a rank that has none here leaves no file

    def _file(self, rank: int) -> ChunkFile:
        if rank not in self._files:
            self._files[rank] = ChunkFile(self._folder / f"__{rank}_{self._worker}.distcp")
        return self._files[rank]

    def write(self, rank: int, key: str, offsets: tuple[int, ...], tensor: torch.Tensor) -> None:
        """Append a box of tensor `key` to the file of a model-parallel rank."""
        self._file(rank).write(key, offsets, tensor)

    def write_object(self, rank: int, key: str, value: Any) -> None:
        self._file(rank).write_object(key, value)

    def progress(self) -> dict[str, Any]:
        """Make all durable; returns what `resume` must know of what was written since the last call."""
        return {str(rank): file.progress() for rank, file in self._files.items()}

    def resume(self, progress: dict[str, Any]) -> bool:
        """Whether what an earlier run noted is there; if so, the files go on behind it."""
        return all(self._file(int(rank)).resume(own) for rank, own in progress.items())

    @property
    def chunks(self) -> list[StoredChunk]:
        return [chunk for file in self._files.values() for chunk in file.chunks]

    @property
    def blobs(self) -> list[StoredBlob]:
        return [blob for file in self._files.values() for blob in file.blobs]

    def finish(self) -> list[tuple[str, str, int]]:
        """Make the files durable; returns (name, hash, bytes) of each."""
        return [file.finish() for file in self._files.values()]

    def close(self) -> None:
        for file in self._files.values():
            file.close()
