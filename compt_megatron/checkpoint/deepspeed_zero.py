"""Where the files of a DeepSpeed training checkpoint hold each parameter, its fp32 master and its moments.

- ZeRO 0: whole tensors in `mp_rank_00_model_states.pt`; the optimizer numbers its states in the order of its groups.
- ZeRO 1 and 2: the weights as for 0. Masters and moments of each parameter group are one flat tensor: the parameters in
  the order of `param_shapes`, each padded by `param_alignment_paddings`, cut into equal partitions, one a rank. That
  order is also right under `round_robin_gradients` (where `param_slice_mappings` is not).
- ZeRO 3: of every parameter a rank has ceil(elements / ranks), one behind the other in a flat tensor for each
  sub-group; the weights are kept as masters only.

Read in DeepSpeed 0.19.8: runtime/engine.py, runtime/zero/stage_1_and_2.py, runtime/zero/stage3.py,
runtime/bf16_optimizer.py, runtime/fp16/.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import ceil, prod
from pathlib import Path
from typing import Any

import torch

from compt_megatron.checkpoint.contract import Region, flat_boxes, region_shape
from compt_megatron.checkpoint.deepspeed_files import ZeroFiles, zero_files
from compt_megatron.checkpoint.open_files import OpenFiles
from compt_megatron.checkpoint.saved_archive import SavedArchive, StoredTensor
from compt_megatron.errors import UserError

MOMENTS = ("exp_avg", "exp_avg_sq")
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """Elements [start, stop) of a parameter are those from `at` on of a stored tensor."""

    archive: SavedArchive
    tensor: StoredTensor
    start: int
    stop: int
    at: int


@dataclass
class Tensors:
    """What one kind of state (weight, master, exp_avg, exp_avg_sq) holds: parameter -> its pieces and dtype."""

    pieces: dict[str, list[Piece]] = field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)

    def add(self, name: str, pieces: Iterable[Piece]) -> None:
        self.pieces[name] = list(pieces)
        self.dtypes[name] = self.pieces[name][0].tensor.dtype

    def read(self, name: str, shape: Shape, box: Region) -> torch.Tensor:
        """The values of a box of parameter `name`, seen as a tensor of `shape`, in its dtype."""
        out = torch.empty(region_shape(box), dtype=self.dtypes[name])
        if not out.numel():
            return out
        for piece in self.pieces[name]:
            if piece.tensor.shape == shape and not piece.start and not piece.at:
                return piece.archive.read(piece.tensor, box).to(out.dtype)
            for stored, flat in flat_boxes(shape, piece.start, piece.stop):
                common = [(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(stored, box)]
                if any(low >= high for low, high in common):
                    continue
                inside = tuple(slice(low - part.start, high - part.start) for (low, high), part in zip(common, stored))
                target = tuple(slice(low - part.start, high - part.start) for (low, high), part in zip(common, box))
                at = piece.at + flat.start
                out[target] = piece.archive.read_flat(piece.tensor, at, region_shape(stored), inside)
        return out


class ZeroFolder:
    """One training checkpoint, by the names of the module that was trained.

    `shapes`: every parameter; `states`: kind of state -> its tensors; `steps`: optimizer steps taken, by parameter;
    `notes`: what could not be read. Raises UserError if files are missing, damaged, or laid out in a way not supported.
    """

    def __init__(self, folder: Path, trust_pickle: bool = False) -> None:
        self.folder = folder
        self.shapes: dict[str, Shape] = {}
        self.states: dict[str, Tensors] = {kind: Tensors() for kind in ("weight", "master", *MOMENTS)}
        self.steps: dict[str, float] = {}
        self.notes: list[str] = []
        self._files = OpenFiles(os.O_RDONLY)
        files = zero_files(folder)
        model = [SavedArchive(path, self._files, trust_pickle) for path in files.model]
        self.model: dict[str, Any] = model[0].content
        try:
            self._check_ranks(files)
            optimizer = [SavedArchive(path, self._files, trust_pickle) for path in files.optimizer]
            states = [archive.content["optimizer_state_dict"] for archive in optimizer]
            stage = int(states[0].get("zero_stage", 1)) if states else 0
            if stage == 3:
                self._read_sharded(model, optimizer, states)
            else:
                self._read_whole_weights(model[0])
                if stage:
                    self._read_partitions(optimizer, states)
                else:
                    self._read_plain(model[0])
        except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"{folder}: not laid out as DeepSpeed does ({reason}); use another checkpoint") from error
        self._drop_masters_that_are_the_weights()

    def _check_ranks(self, files: ZeroFiles) -> None:
        ranks = int(self.model["dp_world_size"])
        if self.model["param_shapes"] is None:
            return
        sharded = files.model[0].name.startswith("zero_")
        for kind, found in (("model", files.model if sharded else []), ("optimizer", files.optimizer)):
            if (found or kind == "optimizer") and len(found) != ranks:
                raise UserError(
                    f"{self.folder}: the {kind} files of {len(found)} ranks are there, {ranks} wrote it; restore them "
                    "or use another checkpoint"
                )

    def _read_whole_weights(self, model: SavedArchive) -> None:
        for name, tensor in self._module_tensors().items():
            self.shapes[name] = tensor.shape
            self.states["weight"].add(name, [_whole(model, tensor)])

    def _module_tensors(self) -> dict[str, StoredTensor]:
        """The parameters of the module's state dict: no buffers, tied ones once."""
        found: dict[str, StoredTensor] = {}
        buffers = set(self.model["buffer_names"])
        seen: set[tuple[int, Shape]] = set()
        for name, tensor in self.model["module"].items():
            if not isinstance(tensor, StoredTensor) or name in buffers:
                continue
            if tensor.numel and (tensor.start, tensor.shape) in seen:
                continue
            seen.add((tensor.start, tensor.shape))
            found[name] = tensor
        return found

    # -- ZeRO 1 and 2 ------------------------------------------------------------------------------------------------

    def _read_partitions(self, archives: list[SavedArchive], ranks: list[dict[str, Any]]) -> None:
        counts = ranks[0]["partition_count"]
        if {int(count) for count in (counts if isinstance(counts, list) else [counts])} != {len(ranks)}:
            raise UserError(
                f"{self.folder}: groups are cut over {counts} of {len(ranks)} ranks; experts are not supported"
            )
        flats = [_flat_groups(rank) for rank in ranks]
        for index, shapes in enumerate(self.model["param_shapes"]):
            paddings = (ranks[0].get("param_alignment_paddings") or [[]] * (index + 1))[index] or [0] * len(shapes)
            size = flats[0][index].size  # of every partition: only that of the last rank with any is cut short
            at = 0
            for (name, shape), padding in zip(shapes.items(), paddings, strict=True):
                self.shapes.setdefault(name, tuple(shape))
                start, at = at, at + prod(shape)
                for kind in flats[0][index].tensors:
                    pieces = [
                        _part(archives[rank], flats[rank][index].tensors[kind], start, at, rank * size, size)
                        for rank in range(len(ranks))
                        if rank * size < at and start < (rank + 1) * size
                    ]
                    self.states[kind].add(name, pieces)
                if (step := flats[0][index].step) is not None:
                    self.steps[name] = _number(archives[0], step)
                at += padding

    # -- ZeRO 3 ------------------------------------------------------------------------------------------------------

    def _read_sharded(
        self, model: list[SavedArchive], archives: list[SavedArchive], ranks: list[dict[str, Any]]
    ) -> None:
        if ranks[0].get("ds_zero_partition_groups"):
            raise UserError(f"{self.folder}: experts are not supported; only dense models can be read")
        flats = [_sub_groups(rank) for rank in ranks]
        for index, shapes in enumerate(self.model["param_shapes"]):
            at = 0
            for name, shape in shapes.items():
                numel = prod(shape)
                share = ceil(numel / len(ranks))
                self.shapes[name] = tuple(shape)
                for kind in flats[0][index].tensors:
                    stored = [flat[index].tensors[kind] for flat in flats]
                    self.states[kind].add(name, _shares(archives, stored, at, numel, share))
                if (step := flats[0][index].step) is not None:
                    self.steps[name] = _number(archives[0], step)
                at += share
        weight = self.states["weight"]
        for name, tensor in self._module_tensors().items():
            if name in self.shapes:  # kept as the master; the module says in which dtype it trains
                weight.pieces[name], weight.dtypes[name] = self.states["master"].pieces[name], tensor.dtype
        for name, shape in (self.model.get("frozen_param_shapes") or {}).items():
            fragments = [archive.content["frozen_param_fragments"][name] for archive in model]
            self.shapes[name] = tuple(shape)
            weight.add(name, _shares(model, fragments, 0, prod(shape), ceil(prod(shape) / len(model))))

    # -- ZeRO 0 ------------------------------------------------------------------------------------------------------

    def _read_plain(self, model: SavedArchive) -> None:
        stored = self.model["optimizer"]
        if not stored:
            return
        base = stored.get("optimizer_state_dict", stored)
        numbers = [list(group["params"]) for group in base["param_groups"]]
        flat = stored.get("fp32_groups_flat")  # the fused optimizer keeps a flat tensor for every group
        masters = stored.get("fp32_groups") or []
        if flat is not None:
            groups = _flat_members(self.shapes, [tensor.numel for tensor in flat])
        else:
            first = {number: base["state"][number]["exp_avg"] for group in numbers for number in group if base["state"]}
            shapes = masters or [[first[number] for number in group] for group in numbers if first]
            groups = _members(self.shapes, [[tensor.shape for tensor in group] for group in shapes])
        if groups is None:
            self.notes.append(
                "optimizer state left out: with ZeRO 0 the files do not say which of several groups a parameter is in"
            )
            return
        for index, names in enumerate(groups):
            at = 0
            for place, name in enumerate(names):
                number = numbers[index][0 if flat is not None else place]
                state = dict(base["state"].get(number, {}))
                if flat is not None:
                    state["master"] = flat[index]
                elif masters:
                    state["master"] = masters[index][place]
                stop = at + prod(self.shapes[name])
                for kind in ("master", *MOMENTS):
                    if kind in state:
                        flat_part = _part(model, state[kind], at, stop, 0, stop) if flat is not None else None
                        self.states[kind].add(name, [flat_part or _whole(model, state[kind])])
                if "step" in state:
                    self.steps[name] = _number(model, state["step"])
                at = stop

    def _drop_masters_that_are_the_weights(self) -> None:
        """Where weights are trained in the dtype of the masters they are the same, and one of them is enough."""
        weights, masters = self.states["weight"], self.states["master"]
        for name in list(masters.pieces):
            if weights.dtypes.get(name) == masters.dtypes[name]:
                del masters.pieces[name], masters.dtypes[name]

    def close(self) -> None:
        self._files.close()


@dataclass(frozen=True)
class _Flat:
    """One rank's flat tensors of a group, by kind of state; `size`: elements in each; `step`: the group's count."""

    tensors: dict[str, StoredTensor]
    size: int
    step: Any


def _flat_groups(rank: dict[str, Any]) -> list[_Flat]:
    """What a rank's file of ZeRO 1 or 2 holds, by parameter group."""
    base = rank["base_optimizer_state"]
    found = []
    for index, master in enumerate(rank["single_partition_of_fp32_groups"]):
        if isinstance(base, list):  # "elastic": states without padding, the step beside
            state, group = base[index], {"step": rank.get("base_optimizer_state_step")}
        else:
            group = base["param_groups"][index]
            state = base["state"].get(group["params"][0], {})
        tensors = {"master": master} | {kind: state[kind] for kind in MOMENTS if kind in state}
        found.append(_Flat(tensors, master.numel, state.get("step", group.get("step"))))
    return found


def _sub_groups(rank: dict[str, Any]) -> list[_Flat]:
    """What a rank's file of ZeRO 3 holds, by sub-group."""
    states = rank["optimizer_state_dict"]["state"]
    groups = {number: group for group in rank["optimizer_state_dict"]["param_groups"] for number in group["params"]}
    found = []
    for index, master in enumerate(rank["fp32_flat_groups"]):
        state = states.get(index, {})
        tensors = {"master": master} | {kind: state[kind] for kind in MOMENTS if kind in state}
        found.append(_Flat(tensors, master.numel, state.get("step", groups.get(index, {}).get("step"))))
    return found


def _whole(archive: SavedArchive, tensor: StoredTensor) -> Piece:
    return Piece(archive, tensor, 0, tensor.numel, 0)


def _part(archive: SavedArchive, flat: StoredTensor, start: int, stop: int, base: int, size: int) -> Piece:
    """What a partition, which is the elements [base, base + size) of its group, holds of the elements [start, stop)."""
    low, high = max(start, base), min(stop, base + size)
    piece = Piece(archive, flat, low - start, high - start, low - base)
    _check_room(archive, flat, piece)
    return piece


def _shares(archives: list[SavedArchive], stored: list[StoredTensor], at: int, numel: int, share: int) -> list[Piece]:
    """The pieces of a parameter that is cut into equal shares, one a rank, which lies at `at` in each rank's tensor."""
    pieces = []
    for rank, (archive, flat) in enumerate(zip(archives, stored, strict=True)):
        start, stop = rank * share, min((rank + 1) * share, numel)
        if start < stop:
            pieces.append(Piece(archive, flat, start, stop, at))
            _check_room(archive, flat, pieces[-1])
    return pieces


def _check_room(archive: SavedArchive, flat: StoredTensor, piece: Piece) -> None:
    if len(flat.shape) != 1 or piece.at + piece.stop - piece.start > flat.room:
        raise UserError(
            f"{archive.path}: holds {flat.numel} elements of a group where more are expected; use a checkpoint whose "
            "parameters and optimizer state are not offloaded to NVMe"
        )


def _number(archive: SavedArchive, value: Any) -> float:
    return float(archive.read(value, ())) if isinstance(value, StoredTensor) else float(value)


def _members(shapes: dict[str, Shape], groups: list[list[Shape]]) -> list[list[str]] | None:
    """Which parameters each group holds, given the shapes in it. In a group they are in the module's order, so each
    next parameter is the next one of some group; None if its shape fits several groups, or none."""
    if len(groups) == 1:
        return [list(shapes)] if [shapes[name] for name in shapes] == groups[0] else None
    members: list[list[str]] = [[] for _ in groups]
    for name, shape in shapes.items():
        fitting = [
            index
            for index, group in enumerate(groups)
            if len(members[index]) < len(group) and group[len(members[index])] == shape
        ]
        if len(fitting) != 1:
            return None
        members[fitting[0]].append(name)
    return members if all(len(found) == len(group) for found, group in zip(members, groups)) else None


def _flat_members(shapes: dict[str, Shape], sizes: list[int]) -> list[list[str]] | None:
    """The same for flat groups of `sizes` elements: known for a single group only."""
    return [list(shapes)] if sizes == [sum(prod(shape) for shape in shapes.values())] else None
