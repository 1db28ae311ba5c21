"""The run checkpoint: Megatron's `torch_dist` folder and compt.json. Both engines write and read it.

Which keys it has is in docs/checkpoint.md. Parameters lie where Megatron looks for them (`megatron_names`): all layers
of one in a tensor with a leading layer axis, q, k and v fused and interleaved per query group.
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compt_megatron.checkpoint.commit import SINGLE_FILES, HashedFile
from compt_megatron.checkpoint.contract import (
    Format,
    Region,
    Task,
    TensorInfo,
    checked_region,
    region_shape,
    split_name,
)
from compt_megatron.checkpoint.dcp_metadata import dcp_metadata_bytes
from compt_megatron.checkpoint.guard import Guard
from compt_megatron.checkpoint.manifest import read_manifest, recorded_spec
from compt_megatron.checkpoint.torch_dist import METADATA, ChunkFile, TorchDistFolder
from compt_megatron.checkpoint.writing import BoxWriter, FileRow, one_dtype
from compt_megatron.errors import UserError
from compt_megatron.spec.megatron_names import MegatronPlace, fused_rows, megatron_place
from compt_megatron.spec.table import ModelSpec

_BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
_BACKEND_FILE = "metadata.json"
_PENDING_LIMIT = 256 * 2**20  # bytes of fused tensors held in memory until all their rows have come

# prefix on the boundary -> what stands before the parameter's own key; `step` goes by canonical names
_STATE = {
    "weight": "",
    "master": "optimizer.state.fp32_param.",
    "exp_avg": "optimizer.state.exp_avg.",
    "exp_avg_sq": "optimizer.state.exp_avg_sq.",
}
_STEP = "optimizer.state.step."
_OWN = ("weight/", "align/", "rng/", "data/")


@dataclass(frozen=True)
class Run:
    """Rows [start, stop) of a part of the fused tensor are rows [at, at + stop - start) of it."""

    start: int
    stop: int
    at: int


class MegatronKeys:
    """Canonical names <-> keys of a torch_dist folder, for one model."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self.places: dict[str, MegatronPlace] = {name: megatron_place(spec, name) for name in spec.params}
        self.members: dict[str, list[str]] = {}  # key of a weight -> the parameters that it holds
        for name, place in self.places.items():
            self.members.setdefault(place.key, []).append(name)

    def key(self, prefix: str, rest: str) -> str:
        """The key of tensor `prefix/rest`: a parameter's own, or one of ours for anything that the model lacks."""
        if prefix == "step":
            return _STEP + rest
        if prefix in _STATE and rest in self.places:
            return _STATE[prefix] + self.places[rest].key
        return f"{prefix}/{rest}" if prefix not in _STATE or prefix == "weight" else _STATE[prefix] + rest

    def other_name(self, key: str) -> str | None:
        """The boundary name of a key that is not a parameter's; None if it is none of ours."""
        if key.startswith(_STEP):
            return f"step/{key.removeprefix(_STEP)}"
        for prefix, before in _STATE.items():
            if before and key.startswith(before):
                return f"{prefix}/{key.removeprefix(before)}"
        return key if key.startswith(_OWN) else None

    def key_shape(self, key: str) -> tuple[int, ...]:
        """The global shape of a weight's tensor in the file: with layer axis, fused."""
        names = self.members[key]
        first = self.spec.params[names[0]]
        if self.places[first.name].layer is None:
            return first.shape
        layers = self.spec.towers[first.tower].layers
        rows = sum(self.spec.params[name].shape[0] for name in names if self.places[name].layer == 0)
        return (layers, rows, *first.shape[1:])

    def extra_states(self, declared: Container[str]) -> Iterator[str]:
        """The keys of the `_extra_state` objects that megatron-core has for the linears of the declared weights."""
        for key, names in self.members.items():
            owner, _, leaf = key.rpartition(".")
            if leaf == "weight" and ".linear_" in owner and f"weight/{names[0]}" in declared:
                layers = self.spec.towers[self.spec.params[names[0]].tower].layers
                yield from (f"{owner}._extra_state/shard_{layer}_{layers}" for layer in range(layers))

    def runs(self, name: str, start: int, stop: int) -> Iterator[Run]:
        """Where rows [start, stop) of a q, k or v parameter lie in the fused tensor of its layer."""
        place, param = self.places[name], self.spec.params[name]
        assert place.part is not None
        size = self.spec.towers[param.tower].head_dim
        rows = {self.places[n].part: self.spec.params[n].shape[0] for n in self.members[place.key]}
        heads, groups = rows["q"] // size, rows["k"] // size
        pending: Run | None = None
        for head in range(start // size, -(-stop // size)):
            first, last = max(start, head * size), min(stop, (head + 1) * size)
            at = fused_rows(place.part, head, heads, groups, size).start + first - head * size
            if pending and pending.at + pending.stop - pending.start == at:
                pending = Run(pending.start, last, pending.at)
                continue
            if pending:
                yield pending
            pending = Run(first, last, at)
        if pending:
            yield pending


class MegatronReader:
    """A run checkpoint, or a torch_dist folder that Megatron wrote for one of our models."""

    def __init__(self, path: Path, spec: ModelSpec | None = None, trust_pickle: bool = False) -> None:
        self.path = path
        self._manifest = read_manifest(path)
        found = recorded_spec(self._manifest, spec, path)
        if found is None:
            raise UserError(f"{path}: does not record which model it holds; name its model config with --from")
        self.spec: ModelSpec | None = found
        self._keys = MegatronKeys(found)
        self._folder = TorchDistFolder(path, Guard(path, self._manifest), trust_pickle)
        self._tensors = dict(self._parameters()) | self._others()
        self._check_complete(found)

    def _parameters(self) -> Iterator[tuple[str, TensorInfo]]:
        for prefix, before in _STATE.items():
            for name, place in self._keys.places.items():
                stored = self._folder.tensors.get(before + place.key)
                if stored is None:
                    continue
                shape = self._keys.key_shape(place.key)
                if stored.shape != shape:
                    raise UserError(
                        f"{self.path}: checkpoint of another model: '{before + place.key}' has shape "
                        f"{stored.shape}, the model needs {shape}; name the right model config"
                    )
                yield f"{prefix}/{name}", TensorInfo(self._keys.spec.params[name].shape, stored.dtype)

    def _others(self) -> dict[str, TensorInfo]:
        params = {before + key for before in _STATE.values() for key in self._keys.members}
        others: dict[str, TensorInfo] = {}
        for key, info in self._folder.tensors.items():
            if key in params:
                continue
            name = self._keys.other_name(key)
            if name is None:
                raise UserError(
                    f"{self.path}: checkpoint of another model: unknown tensor '{key}'; name the right config"
                )
            others[name] = info
        return others

    def _check_complete(self, spec: ModelSpec) -> None:
        missing = [name for name in spec.params if f"weight/{name}" not in self._tensors]
        # Ours may hold something else than weights; a foreign folder without any is one of another model.
        if missing and (len(missing) < len(spec.params) or self._manifest is None):
            raise UserError(
                f"{self.path}: checkpoint of another model than '{spec.name}': it has no '{missing[0]}' "
                f"({len(missing)} of {len(spec.params)} parameters missing); name the right model config"
            )

    def tensors(self) -> dict[str, TensorInfo]:
        return dict(self._tensors)

    def read(self, name: str, region: Region | None = None) -> torch.Tensor:
        info = self._tensors[name]
        box = checked_region(name, info.shape, region)
        prefix, rest = split_name(name)
        key, place = self._keys.key(prefix, rest), self._keys.places.get(rest)
        if prefix not in _STATE or place is None or place.layer is None:
            return self._folder.read(key, box)
        layer = slice(place.layer, place.layer + 1)
        if place.part is None:
            return self._folder.read(key, (layer, *box))[0]
        out = torch.empty(region_shape(box), dtype=info.dtype)
        for run in self._keys.runs(rest, box[0].start, box[0].stop):
            rows = slice(run.at, run.at + run.stop - run.start)
            target = slice(run.start - box[0].start, run.stop - box[0].start)
            out[target] = self._folder.read(key, (layer, rows, *box[1:]))[0]
        return out

    def metadata(self) -> dict[str, Any]:
        return dict(self._manifest or {})

    def close(self) -> None:
        self._folder.close()


class _Pending:
    """A layer's fused q, k, v, until all its rows have come: then it is stored as one box."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.values = torch.empty(shape, dtype=dtype)
        self.present = torch.zeros(shape[0], dtype=torch.bool)

    def runs(self) -> Iterator[slice]:
        """The rows that have come, as runs."""
        edges = torch.diff(self.present.to(torch.int8), prepend=torch.zeros(1), append=torch.zeros(1))
        starts, stops = (edges > 0).nonzero().flatten().tolist(), (edges < 0).nonzero().flatten().tolist()
        yield from (slice(start, stop) for start, stop in zip(starts, stops, strict=True))


class MegatronWriter(BoxWriter):
    """Writes a run checkpoint. Every rank has its own data file; rank 0 adds what describes the whole."""

    format_name = "megatron"

    def __init__(self, task: Task) -> None:
        if task.path.suffix in SINGLE_FILES:
            raise UserError(f"{task.path}: a megatron checkpoint is a folder; name one, or choose --format open_clip")
        super().__init__(task)
        self._keys = MegatronKeys(task.spec)
        self._file = ChunkFile(self.folder, task.rank)
        self._pending: dict[tuple[str, int], _Pending] = {}
        self._pending_bytes = 0

    def _accept(self, tensors: dict[str, TensorInfo]) -> None:
        for name in tensors:
            prefix, rest = split_name(name)
            if prefix in _STATE and rest in self._keys.places:
                members = self._keys.members[self._keys.places[rest].key]
                one_dtype(name, [n for m in members if (n := f"{prefix}/{m}") in self.declared], self.declared)

    def _put(self, name: str, offsets: tuple[int, ...], tensor: torch.Tensor) -> None:
        prefix, rest = split_name(name)
        key, place = self._keys.key(prefix, rest), self._keys.places.get(rest)
        if prefix not in _STATE or place is None or place.layer is None:
            self._file.write(key, offsets, tensor)
        elif place.part is None:
            self._file.write(key, (place.layer, *offsets), tensor[None])
        else:
            self._put_part(key, place, rest, offsets, tensor)

    def _put_part(
        self, key: str, place: MegatronPlace, rest: str, offsets: tuple[int, ...], tensor: torch.Tensor
    ) -> None:
        assert place.layer is not None
        shape = self._keys.key_shape(place.key)[1:]
        runs = list(self._keys.runs(rest, offsets[0], offsets[0] + tensor.shape[0]))
        if tensor.shape[1:] != shape[1:]:  # some columns only: a box for every head
            for run in runs:
                values = tensor[run.start - offsets[0] : run.stop - offsets[0]]
                self._file.write(key, (place.layer, run.at, *offsets[1:]), values[None])
            return
        pending = self._pending.get((key, place.layer))
        if pending is None:
            pending = self._pending[key, place.layer] = _Pending(shape, tensor.dtype)
            self._pending_bytes += pending.values.nbytes
        for run in runs:
            rows = slice(run.at, run.at + run.stop - run.start)
            pending.values[rows] = tensor[run.start - offsets[0] : run.stop - offsets[0]]
            pending.present[rows] = True
        if bool(pending.present.all()):
            self._flush(key, place.layer)
        while self._pending_bytes > _PENDING_LIMIT:
            self._flush(*next(iter(self._pending)))

    def _flush(self, key: str, layer: int) -> None:
        pending = self._pending.pop((key, layer))
        self._pending_bytes -= pending.values.nbytes
        for rows in pending.runs():
            after = (0,) * (pending.values.dim() - 1)
            self._file.write(key, (layer, rows.start, *after), pending.values[rows][None])

    def _finish_rank(self) -> tuple[list[FileRow], Any]:
        while self._pending:
            self._flush(*next(iter(self._pending)))
        if self.party.leads:
            # megatron-core wants this object for every linear when it loads; what it saves there is a list of None
            for key in self._keys.extra_states(self.declared):
                self._file.write_object(key, [None])
        return self._file.finish(), (self._file.chunks, self._file.blobs)

    def _stored(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        stored: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for name, info in self.declared.items():
            prefix, rest = split_name(name)
            key, shape = self._keys.key(prefix, rest), info.shape
            if prefix in _STATE and rest in self._keys.places:
                plain = self._keys.places[rest].key
                shape = self._keys.key_shape(plain)
                absent = [m for m in self._keys.members[plain] if f"{prefix}/{m}" not in self.declared]
                assert not absent, f"{name} is declared without {prefix}/{absent[0]}, which shares its tensor"
            stored[key] = (shape, info.dtype)
        return stored

    def _finish_folder(self, parts: list[Any], metadata: dict[str, Any]) -> list[FileRow]:
        chunks = [chunk for found, _ in parts for chunk in found]
        blobs = [blob for _, found in parts for blob in found]
        step = int((metadata.get("train") or {}).get("step", 0))
        files = []
        for name in (METADATA, _BACKEND_FILE, "common.pt"):
            file = HashedFile(self.folder / name)
            if name == METADATA:
                file.write(dcp_metadata_bytes(self._stored(), chunks, blobs))
            elif name == _BACKEND_FILE:
                file.write(json.dumps(_BACKEND).encode())
            else:
                torch.save({"iteration": step, "checkpoint_version": 3.0}, file)  # type: ignore[arg-type]
            files.append(file.finish())
        return files

    def _release(self) -> None:
        self._file.close()


def _recognises(path: Path) -> bool:
    return path.is_dir() and (path / METADATA).is_file() and (path / _BACKEND_FILE).is_file()


FORMAT = Format("megatron", _recognises, MegatronReader, MegatronWriter)
