"""Writes torch_dist folders: boxes come in canonical names, in any order, and go to the files of a layout's ranks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch

from compt_megatron.checkpoint.commit import SINGLE_FILES
from compt_megatron.checkpoint.contract import Layout, Task, TensorInfo, split_name
from compt_megatron.checkpoint.dcp_metadata import dcp_metadata_bytes
from compt_megatron.checkpoint.hashed_file import HashedFile
from compt_megatron.checkpoint.journal import Entry
from compt_megatron.checkpoint.megatron_keys import STATE, MegatronKeys
from compt_megatron.checkpoint.megatron_layout import Cutter, check_layout
from compt_megatron.checkpoint.torch_dist import METADATA, ChunkFiles
from compt_megatron.checkpoint.writing import BoxWriter, FileRow, one_dtype
from compt_megatron.errors import UserError
from compt_megatron.spec.megatron_names import PADDED_KEYS, MegatronPlace
from compt_megatron.spec.table import ModelSpec

BACKEND_FILE, COMMON_FILE = "metadata.json", "common.pt"
_BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
_PENDING_LIMIT = 256 * 2**20  # bytes of fused tensors held in memory until all their rows have come


class _Pending:
    """Some columns (or all) of a layer's fused q, k, v, until all rows have come: then they are stored as one box.

    `name`: one of the parameters that share the tensor; `after`: the box's offsets behind the first dimension.
    """

    def __init__(self, name: str, after: tuple[int, ...], shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.name, self.after = name, after
        self.values = torch.empty(shape, dtype=dtype)
        self.present = torch.zeros(shape[0], dtype=torch.bool)

    def runs(self) -> Iterator[slice]:
        """The rows that have come, as runs."""
        edges = torch.diff(self.present.to(torch.int8), prepend=torch.zeros(1), append=torch.zeros(1))
        starts, stops = (edges > 0).nonzero().flatten().tolist(), (edges < 0).nonzero().flatten().tolist()
        yield from (slice(start, stop) for start, stop in zip(starts, stops, strict=True))


class MegatronWriter(BoxWriter):
    """Writes a run checkpoint. Every rank has its own data files; rank 0 adds what describes the whole.

    Boxes are cut as the task's layout asks for. The fused tensors of a layer are gathered before they are stored, as
    far as _PENDING_LIMIT allows.
    """

    format_name = "megatron"
    inner: ClassVar[str] = ""  # the folder, in that of the checkpoint, that the files are in

    def __init__(self, task: Task) -> None:
        if task.path.suffix in SINGLE_FILES:
            raise UserError(f"{task.path}: a {self.format_name} checkpoint is a folder; name one")
        check_layout(task.spec, task.layout, task.path)
        super().__init__(task)
        self._inside = self.folder / self.inner
        self.party.lead(lambda: self._inside.mkdir(exist_ok=True))
        self._keys = MegatronKeys(task.spec)
        self._cutter = Cutter(task.spec, task.layout, self._padded_vocabulary())
        self._files = ChunkFiles(self._inside, task.rank)
        self._pending: dict[tuple[Any, ...], _Pending] = {}  # by key, layer and columns
        self._pending_bytes = 0

    @classmethod
    def file_sizes(
        cls, path: Path, spec: ModelSpec, tensors: dict[str, TensorInfo], layout: Layout, workers: int
    ) -> dict[str, int]:
        ranks = layout.tensor * layout.pipeline
        own = sum(info.nbytes for info in tensors.values()) // ranks
        inner = f"{cls.inner}/" if cls.inner else ""
        if workers == 1:
            return {f"{inner}__{rank}_0.distcp": own for rank in range(ranks)}
        return {f"{inner}__{rank}_*.distcp, of {workers} workers": own for rank in range(ranks)}

    def _padded_vocabulary(self) -> int | None:
        """The rows that embedding and output layer have in the files; None: one for each entry of the vocabulary."""
        return None

    def _accept(self, tensors: dict[str, TensorInfo]) -> None:
        for name in tensors:
            prefix, rest = split_name(name)
            if prefix in STATE and rest in self._keys.places:
                members = self._keys.members[self._keys.places[rest].key]
                one_dtype(name, [n for m in members if (n := f"{prefix}/{m}") in self.declared], self.declared)

    def _put(self, name: str, offsets: tuple[int, ...], tensor: torch.Tensor) -> None:
        prefix, rest = split_name(name)
        key, place = self._keys.key(prefix, rest), self._keys.places.get(rest)
        if prefix not in STATE or place is None:
            self._files.write(0, key, offsets, tensor)
            return
        if place.transposed:
            offsets, tensor = offsets[::-1], tensor.contiguous().t().contiguous()  # torch's fast way to transpose
        if place.part in ("q", "k", "v"):
            self._put_part(key, place, rest, offsets, tensor)
        else:
            self._store(key, rest, (place.rows.first + offsets[0], *offsets[1:]) if offsets else (), tensor)

    def _put_part(
        self, key: str, place: MegatronPlace, name: str, offsets: tuple[int, ...], tensor: torch.Tensor
    ) -> None:
        runs = list(place.rows.runs(offsets[0], offsets[0] + tensor.shape[0]))
        after, columns = offsets[1:], tuple(tensor.shape[1:])
        own = self.spec.params[name].shape[-1 if place.transposed else 0]
        if columns != place.shape[1:] and tensor.shape[0] != own:  # an edge of a flat partition: nothing fits to it
            for run in runs:
                self._store(key, name, (run.at, *after), tensor[run.start - offsets[0] : run.stop - offsets[0]])
            return
        where = (key, place.layer, after, columns)
        pending = self._pending.get(where)
        if pending is None:
            pending = self._pending[where] = _Pending(name, after, (place.shape[0], *columns), tensor.dtype)
            self._pending_bytes += pending.values.nbytes
        for run in runs:
            rows = slice(run.at, run.at + run.stop - run.start)
            pending.values[rows] = tensor[run.start - offsets[0] : run.stop - offsets[0]]
            pending.present[rows] = True
        if bool(pending.present.all()):
            self._flush(where)
        while self._pending_bytes > _PENDING_LIMIT:
            self._flush(next(iter(self._pending)))

    def _flush(self, where: tuple[Any, ...]) -> None:
        pending = self._pending.pop(where)
        self._pending_bytes -= pending.values.nbytes
        for rows in pending.runs():
            self._store(where[0], pending.name, (rows.start, *pending.after), pending.values[rows])

    def _store(self, key: str, name: str, offsets: tuple[int, ...], values: torch.Tensor) -> None:
        """Store a box of the tensor (of one layer) that holds parameter `name`, each rank's part in its file."""
        place = self._keys.places[name]
        for rank, region in self._cutter.pieces(name, place, offsets, tuple(values.shape)):
            at = tuple(offset + part.start for offset, part in zip(offsets, region, strict=True))
            if place.layer is None:
                self._files.write(rank, key, at, values[region])
            else:
                self._files.write(rank, key, (place.layer, *at), values[region][None])

    def _end_unit(self) -> None:
        while self._pending:
            self._flush(next(iter(self._pending)))

    def _interleaved(self, name: str) -> tuple[Any, int] | None:
        prefix, rest = split_name(name)
        place = self._keys.places.get(rest)
        if prefix not in STATE or place is None or place.part not in ("q", "k", "v"):
            return None
        param = self.spec.params[rest]
        groups = self.spec.towers[param.tower].groups
        return (prefix, place.key, place.layer), param.shape[0] if place.transposed else groups

    def _sync(self) -> Any:
        return self._files.progress()

    def _restore(self, entry: Entry) -> bool:
        return self._files.resume(entry.state)

    def _finish_rank(self) -> tuple[list[FileRow], Any]:
        self._end_unit()
        if self.party.leads:
            # megatron-core wants this object for every linear when it loads; what it saves there is a list of None
            for key in self._keys.extra_states(self.declared):
                self._files.write_object(0, key, [None])
        return self._named(self._files.finish()), (self._files.chunks, self._files.blobs)

    def _named(self, rows: list[FileRow]) -> list[FileRow]:
        """Files under their names in the checkpoint's folder."""
        return [(f"{self.inner}/{name}" if self.inner else name, digest, size) for name, digest, size in rows]

    def _stored(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        stored: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for name, info in self.declared.items():
            prefix, rest = split_name(name)
            key, shape = self._keys.key(prefix, rest), info.shape
            if prefix in STATE and rest in self._keys.places:
                plain = self._keys.places[rest].key
                shape = self._keys.key_shape(plain)
                if plain in PADDED_KEYS:
                    shape = (self._padded_vocabulary() or shape[0], *shape[1:])
                absent = [m for m in self._keys.members[plain] if f"{prefix}/{m}" not in self.declared]
                if absent:  # such as layers that were frozen in training
                    raise UserError(
                        f"{self.destination.path}: '{name}' comes without '{prefix}/{absent[0]}', and Megatron keeps "
                        "both in one tensor; choose another --format, or one that holds weights only"
                    )
            stored[key] = (shape, info.dtype)
        return stored

    def _common(self, metadata: dict[str, Any]) -> dict[str, Any]:
        """What common.pt holds: what is the same for all ranks."""
        step = int((metadata.get("train") or {}).get("step", 0))
        return {"iteration": step, "checkpoint_version": 3.0}

    def _finish_folder(self, parts: list[Any], metadata: dict[str, Any]) -> list[FileRow]:
        chunks = [chunk for found, _ in parts for chunk in found]
        blobs = [blob for _, found in parts for blob in found]
        if self.layout != Layout():
            metadata["layout"] = {"tensor": self.layout.tensor, "pipeline": self.layout.pipeline}
        files = []
        for name in (METADATA, BACKEND_FILE, COMMON_FILE):
            file = HashedFile(self._inside / name)
            if name == METADATA:
                file.write(dcp_metadata_bytes(self._stored(), chunks, blobs))
            elif name == BACKEND_FILE:
                file.write(json.dumps(_BACKEND).encode())
            else:
                torch.save(self._common(metadata), file)  # type: ignore[arg-type]
            files.append(file.finish())
        return self._named(files)

    def _release(self) -> None:
        self._files.close()
