"""Megatron-LM's older checkpoints (`--ckpt-format torch`): `mp_rank_XX[_YYY]/model_optim_rng.pt`, a file a rank.

XX is the tensor-parallel, YYY the pipeline rank. Each holds the rank's own module: its layers, numbered from 0, and its
part of every split tensor; with a virtual pipeline the stages' chunks `model0`, `model1`, ... Read only, and only the
weights: the optimizer state in these folders depends on the job's data-parallel size and buckets.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compt_megatron.checkpoint.contract import Format, Layout, Region, TensorInfo, checked_region, region_shape
from compt_megatron.checkpoint.megatron_args import check_args
from compt_megatron.checkpoint.megatron_foreign import EVERY_CLASS, Common
from compt_megatron.checkpoint.megatron_home import TRACKER, find_home, tracked
from compt_megatron.checkpoint.megatron_keys import is_padding, read_place
from compt_megatron.checkpoint.megatron_layout import obstacle
from compt_megatron.checkpoint.open_files import OpenFiles
from compt_megatron.checkpoint.saved_archive import SavedArchive, StoredTensor
from compt_megatron.errors import UserError
from compt_megatron.spec.megatron_names import OUTPUT_LAYER, PADDED_KEYS, MegatronPlace, megatron_place, place_on_rank
from compt_megatron.spec.table import ModelSpec

_FOLDER = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?(?:_(\d{3,}))?")
_FILES = ("model_optim_rng.pt", "model_rng.pt")
_CHUNK = re.compile(r"model(\d*)")
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
_BUFFERS = ("_extra_state", "inv_freq")  # the ends of names that are no parameters


@dataclass(frozen=True)
class _Part:
    """The tensor that one tensor-parallel rank has of a parameter."""

    archive: SavedArchive
    tensor: StoredTensor


class LegacyReader:
    """The weights of a checkpoint that a job of several model-parallel ranks saved, read as if they were one's."""

    def __init__(self, path: Path, spec: ModelSpec | None = None, trust_pickle: bool = False) -> None:
        self.path = path
        home = find_home(path)
        found = home.spec(spec)
        if not found.is_language_model:
            raise UserError(
                f"{path}: a checkpoint of Megatron-LM, '{found.name}' is no language model; name its config"
            )
        self.spec: ModelSpec | None = found
        self._files = OpenFiles(os.O_RDONLY)
        try:
            self._open(home.folder, found)
        except BaseException:
            self.close()
            raise

    def _open(self, folder: Path, spec: ModelSpec) -> None:
        ranks = _ranks(folder)
        self._tensor, self._pipeline = (1 + max(rank[dim] for rank in ranks) for dim in (0, 1))
        archives: dict[tuple[int, int], SavedArchive] = {}
        for pipeline in range(self._pipeline):
            for tensor in range(self._tensor):
                if (tensor, pipeline) not in ranks:
                    raise UserError(
                        f"{folder}: has no {_name(tensor, pipeline, self._pipeline > 1)}, the folder of a rank; "
                        "restore it or use another checkpoint"
                    )
                file = _file(ranks[tensor, pipeline])
                archives[tensor, pipeline] = SavedArchive(file, self._files, inert=EVERY_CLASS)
        first = archives[0, 0].content
        self._common = Common(first)
        self._check_job(folder)
        self._notes = check_args(spec, self._common.args, self.path)
        if (isinstance(first, dict) and "optimizer" in first) or any(folder.glob("*/*optim*.pt")):
            self._notes.append("left out: the optimizer state, which is not read from Megatron's mp_rank folders")
        self._parts: dict[str, list[_Part]] = {}
        self._find_parameters(archives, spec)

    def _check_job(self, folder: Path) -> None:
        args = self._common.args
        for name, found in (
            ("tensor_model_parallel_size", self._tensor),
            ("pipeline_model_parallel_size", self._pipeline),
        ):
            if isinstance(wanted := args.get(name), int) and wanted != found:
                raise UserError(
                    f"{folder}: has the files of {found} ranks, the job had {name} {wanted}; restore the missing ones"
                )
        assert self.spec is not None
        if (reason := obstacle(self.spec, Layout(tensor=self._tensor))) is not None:
            raise UserError(
                f"{folder}: checkpoint of another model than '{self.spec.name}': saved with tensor {self._tensor}, but "
                f"{reason}; name the right model config with --from"
            )
        if args.get("num_experts") or (args.get("expert_model_parallel_size") or 1) > 1:
            raise UserError(f"{folder}: holds a mixture of experts, which is not supported; use another checkpoint")

    def _find_parameters(self, archives: dict[tuple[int, int], SavedArchive], spec: ModelSpec) -> None:
        """Give every parameter its part of each rank, and see that no tensor is left over."""
        owners: dict[str, str] = {}  # name in the whole module -> one canonical name
        members: dict[str, list[str]] = {}
        for name in spec.params:
            place = megatron_place(spec, name)
            for spelling in (place.module, _with_layer(place)):
                owners[spelling] = place.module
            members.setdefault(place.module, []).append(name)
        for tensor in range(self._tensor):
            stages = [archives[tensor, pipeline] for pipeline in range(self._pipeline)]
            for key, part in _whole_names(stages, spec):
                if key not in owners:
                    if spec.towers["text"].tied and key == OUTPUT_LAYER:  # the last stage's copy of the embedding
                        continue
                    raise UserError(
                        f"{part.archive.path}: checkpoint of another model than '{spec.name}': it also has '{key}'; "
                        "name the right model config with --from"
                    )
                for name in members[owners[key]]:
                    self._parts.setdefault(name, []).append(part)
        for name in spec.params:
            self._check(spec, name)

    def _check(self, spec: ModelSpec, name: str) -> None:
        parts = self._parts.get(name, [])
        if len(parts) != self._tensor:
            raise UserError(
                f"{self.path}: checkpoint of another model than '{spec.name}': it has no '{name}'; "
                "name the right model config with --from"
            )
        place, own = megatron_place(spec, name), place_on_rank(spec, name, self._tensor)
        for part in parts:
            shape = part.tensor.shape
            padded = place.key in PADDED_KEYS and is_padding((shape[0] * self._tensor, *shape[1:]), place.shape)
            if (shape != own.shape and not padded) or part.tensor.dtype != parts[0].tensor.dtype:
                raise UserError(
                    f"{part.archive.path}: checkpoint of another model than '{spec.name}': its part of '{name}' has "
                    f"shape {shape}, the model needs {own.shape}; name the right model config with --from"
                )

    def tensors(self) -> dict[str, TensorInfo]:
        assert self.spec is not None
        return {
            f"weight/{name}": TensorInfo(param.shape, self._parts[name][0].tensor.dtype)
            for name, param in self.spec.params.items()
        }

    def read(self, name: str, region: Region | None = None) -> torch.Tensor:
        assert self.spec is not None
        rest = name.removeprefix("weight/")
        box = checked_region(name, self.spec.params[rest].shape, region)
        place, parts = place_on_rank(self.spec, rest, self._tensor), self._parts[rest]
        turned = box[::-1] if place.transposed else box
        if place.split is None or self._tensor == 1:
            out = _read(parts[0], place, turned)
        else:
            out = torch.empty(region_shape(turned), dtype=parts[0].tensor.dtype)
            for part, inside, target in self._pieces(rest, place, turned):
                out[target] = _read(part, place, inside)
        return out.t().contiguous() if place.transposed else out

    def _pieces(self, name: str, place: MegatronPlace, box: Region) -> list[tuple[_Part, Region, Region]]:
        """For every rank that has some of `box`: its part, the box of its own share, and where that belongs."""
        assert self.spec is not None
        assert place.split is not None
        dim, parts = place.split, self._parts[name]
        shape = self.spec.params[name].shape
        whole = (shape[::-1] if place.transposed else shape)[dim]
        share = parts[0].tensor.shape[0] if place.key in PADDED_KEYS else whole // self._tensor
        found = []
        for rank, part in enumerate(parts):
            start, stop = max(box[dim].start, rank * share), min(box[dim].stop, (rank + 1) * share)
            if start < stop:
                inside, target = list(box), [slice(0, one.stop - one.start) for one in box]
                inside[dim] = slice(start - rank * share, stop - rank * share)
                target[dim] = slice(start - box[dim].start, stop - box[dim].start)
                found.append((part, tuple(inside), tuple(target)))
        return found

    def metadata(self) -> dict[str, Any]:
        found = self._common.metadata(self._notes)
        return {**found, "layout": found["layout"] or {"tensor": self._tensor, "pipeline": self._pipeline}}

    def close(self) -> None:
        self._files.close()


def _read(part: _Part, place: MegatronPlace, box: Region) -> torch.Tensor:
    return read_place(lambda rows: part.archive.read(part.tensor, rows), place.rows, False, box, part.tensor.dtype)


def _with_layer(place: MegatronPlace) -> str:
    """A parameter's name in the module, in Transformer Engine's spelling."""
    return place.key if place.layer is None else place.key.replace(".layers.", f".layers.{place.layer}.", 1)


def _whole_names(stages: list[SavedArchive], spec: ModelSpec) -> list[tuple[str, _Part]]:
    """The tensors of one tensor-parallel rank's pipeline, under their names in the undivided module.

    A virtual pipeline deals its chunks round: chunk 0 of every stage, then chunk 1, and so on.
    """
    chunks = [(number, archive, tensors) for archive in stages for number, tensors in _chunks(archive)]
    found, before = [], 0
    for _, archive, tensors in sorted(chunks, key=lambda chunk: chunk[0]):  # stable: by stage within a chunk's number
        layers = 0
        for key, tensor in tensors.items():
            if (layer := _LAYER.match(key)) is not None:
                layers = max(layers, int(layer[1]) + 1)
                key = f"decoder.layers.{before + int(layer[1])}.{key[layer.end() :]}"
            found.append((key, _Part(archive, tensor)))
        before += layers
    if before != (wanted := spec.towers["text"].layers):
        raise UserError(
            f"{stages[0].path}: the checkpoint has {before} layers, '{spec.name}' has {wanted}; name the right model "
            "config with --from"
        )
    return found


def _chunks(archive: SavedArchive) -> list[tuple[int, dict[str, StoredTensor]]]:
    """The module of a rank, or its chunks with their numbers."""
    content = archive.content if isinstance(archive.content, dict) else {}
    found = []
    for key, module in content.items():
        if isinstance(key, str) and (chunk := _CHUNK.fullmatch(key)) and isinstance(module, dict):
            if "language_model" in module:
                raise UserError(
                    f"{archive.path}: has the names of Megatron before megatron-core; convert it with Megatron-LM's "
                    "tools/checkpoint/convert.py first"
                )
            tensors = {
                name: value
                for name, value in module.items()
                if isinstance(value, StoredTensor) and not name.endswith(_BUFFERS)
            }
            found.append((int(chunk[1] or 0), tensors))
    if not found:
        raise UserError(f"{archive.path}: holds no model; restore it or use another checkpoint")
    return found


def _ranks(folder: Path) -> dict[tuple[int, int], Path]:
    """The folders of the ranks by (tensor, pipeline)."""
    ranks = {}
    for entry in sorted(folder.iterdir()):
        found = _FOLDER.fullmatch(entry.name)
        if found is None or not entry.is_dir():
            continue
        if found[3] is not None:
            raise UserError(f"{entry}: a rank of a mixture of experts, which is not supported; use another checkpoint")
        ranks[int(found[1]), int(found[2] or 0)] = entry
    return ranks


def _name(tensor: int, pipeline: int, pipelined: bool) -> str:
    return f"mp_rank_{tensor:02d}" + (f"_{pipeline:03d}" if pipelined else "")


def _file(folder: Path) -> Path:
    for name in _FILES:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{folder / _FILES[0]}: this file of the checkpoint is missing; restore it or use another one")


def holds_ranks(folder: Path) -> bool:
    """Whether a folder is an iteration's in this format."""
    return folder.is_dir() and any(_FOLDER.fullmatch(entry.name) and entry.is_dir() for entry in folder.iterdir())


def _recognises(path: Path) -> bool:
    if path.is_dir() and (path / TRACKER).is_file():
        return holds_ranks(path / tracked(path))
    return holds_ranks(path)


FORMAT = Format("megatron-legacy", _recognises, LegacyReader, None, prefixes=("weight",))
