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
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, prod
from pathlib import Path
from typing import Any

from compt_megatron.checkpoint.deepspeed_files import ZeroFiles, zero_files
from compt_megatron.checkpoint.flat_pieces import Parts, Piece, Shape, Shares, Tensors
from compt_megatron.checkpoint.open_files import OpenFiles
from compt_megatron.checkpoint.saved_archive import SavedArchive, StoredTensor
from compt_megatron.errors import UserError

MOMENTS = ("exp_avg", "exp_avg_sq")


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
        self._trust = trust_pickle
        model = self._open(files.model[0])
        self.model: dict[str, Any] = model.content
        try:
            self._check_ranks(files)
            if not files.optimizer:
                self._read_whole_weights(model)
                self._read_plain(model)
            elif int(self._state(self._open(files.optimizer[0])).get("zero_stage", 1)) == 3:
                self._read_sharded(files)
            else:
                self._read_whole_weights(model)
                self._read_partitions(files)
        except (KeyError, TypeError, IndexError, AttributeError, ValueError, ArithmeticError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"{folder}: not laid out as DeepSpeed does ({reason}); use another checkpoint") from error
        self._drop_masters_that_are_the_weights()

    def _open(self, path: Path) -> SavedArchive:
        return SavedArchive(path, self._files, self._trust)

    @staticmethod
    def _state(archive: SavedArchive) -> dict[str, Any]:
        found: dict[str, Any] = archive.content["optimizer_state_dict"]
        return found

    def _check_ranks(self, files: ZeroFiles) -> None:
        ranks = int(self.model["dp_world_size"])
        if self.model.get("param_shapes") is None:
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
            self.states["weight"].add(name, _whole(model, tensor))

    def _module_tensors(self) -> dict[str, StoredTensor]:
        """The parameters of the module's state dict: no buffers, tied ones once."""
        found: dict[str, StoredTensor] = {}
        buffers = set(self.model.get("buffer_names") or ())
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

    def _read_partitions(self, files: ZeroFiles) -> None:
        flats, first = self._flats(files.optimizer, _flat_groups)
        counts, ranks = first["partition_count"], len(flats)
        if {int(count) for count in (counts if isinstance(counts, list) else [counts])} != {ranks}:
            raise UserError(f"{self.folder}: groups are cut over {counts} of {ranks} ranks; experts are not supported")
        for index, shapes in enumerate(self.model["param_shapes"]):
            paddings = (first.get("param_alignment_paddings") or [[]] * (index + 1))[index] or [0] * len(shapes)
            size = flats[0][index].size  # of every partition: only that of the last rank with any is cut short
            at = 0
            for (name, shape), padding in zip(shapes.items(), paddings, strict=True):
                self.shapes.setdefault(name, tuple(shape))
                start, at = at, at + prod(shape)
                own = range(start // size, ceil(at / size))
                for kind in flats[0][index].tensors:
                    stored = [(flats[rank][index].archive, flats[rank][index].tensors[kind]) for rank in own]
                    parts = (_part(*pair, start, at, rank * size, size) for rank, pair in zip(own, stored, strict=True))
                    self.states[kind].add(name, Parts(tuple(parts)))
                self._count(name, flats[0][index])
                at += padding

    def _flats(self, files: list[Path], read: Callable[[SavedArchive], list[_Flat]]) -> tuple[list[list[_Flat]], Any]:
        """Each rank's flat tensors, and the state of the first rank. What else is in the files is not kept."""
        flats, first = [], None
        for path in files:
            archive = self._open(path)
            first = self._state(archive) if first is None else first
            flats.append(read(archive))
            archive.content = None
        return flats, first

    def _count(self, name: str, flat: _Flat) -> None:
        if flat.step is not None:
            self.steps[name] = _number(flat.archive, flat.step)

    # -- ZeRO 3 ------------------------------------------------------------------------------------------------------

    def _read_sharded(self, files: ZeroFiles) -> None:
        flats, first = self._flats(files.optimizer, _sub_groups)
        if first.get("ds_zero_partition_groups"):
            raise UserError(f"{self.folder}: experts are not supported; only dense models can be read")
        for index, shapes in enumerate(self.model["param_shapes"]):
            stored = {
                kind: [(rank[index].archive, rank[index].tensors[kind]) for rank in flats]
                for kind in flats[0][index].tensors
            }
            at = 0
            for name, shape in shapes.items():
                self.shapes[name] = tuple(shape)
                for kind, pairs in stored.items():
                    shares = Shares(pairs, at, prod(shape))
                    self.states[kind].add(name, shares)
                self._count(name, flats[0][index])
                at += shares.share
            for archive, tensor in (pair for pairs in stored.values() for pair in pairs):
                Piece(archive, tensor, 0, at, 0).check()
        for name, tensor in self._module_tensors().items():
            if name in self.shapes:  # kept as the master; the module says in which dtype it trains
                self.states["weight"].add(name, self.states["master"].pieces[name], tensor.dtype)
        if frozen := self.model.get("frozen_param_shapes"):
            self._read_frozen(files, frozen)

    def _read_frozen(self, files: ZeroFiles, frozen: dict[str, Any]) -> None:
        archives = [self._open(path) for path in files.model]
        for name, shape in frozen.items():
            stored = [(archive, archive.content["frozen_param_fragments"][name]) for archive in archives]
            self.shapes[name] = tuple(shape)
            self.states["weight"].add(name, Shares(stored, 0, prod(shape)))

    # -- ZeRO 0 ------------------------------------------------------------------------------------------------------

    def _read_plain(self, model: SavedArchive) -> None:
        stored = self.model.get("optimizer")
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
                        part = Parts((_part(model, state[kind], at, stop, 0, stop),)) if flat is not None else None
                        self.states[kind].add(name, part or _whole(model, state[kind]))
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

    archive: SavedArchive
    tensors: dict[str, StoredTensor]
    size: int
    step: Any


def _flat(archive: SavedArchive, master: StoredTensor, state: dict[str, Any], group: dict[str, Any]) -> _Flat:
    tensors = {"master": master} | {kind: state[kind] for kind in MOMENTS if kind in state}
    return _Flat(archive, tensors, master.numel, state.get("step", group.get("step")))


def _flat_groups(archive: SavedArchive) -> list[_Flat]:
    """What a rank's file of ZeRO 1 or 2 holds, by parameter group."""
    rank = archive.content["optimizer_state_dict"]
    base, found = rank["base_optimizer_state"], []
    for index, master in enumerate(rank["single_partition_of_fp32_groups"]):
        if isinstance(base, list):  # "elastic": states without padding, the step beside
            state, group = base[index], {"step": rank.get("base_optimizer_state_step")}
        else:
            group = base["param_groups"][index]
            state = base["state"].get(group["params"][0], {})
        found.append(_flat(archive, master, state, group))
    return found


def _sub_groups(archive: SavedArchive) -> list[_Flat]:
    """What a rank's file of ZeRO 3 holds, by sub-group."""
    rank = archive.content["optimizer_state_dict"]
    base = rank["optimizer_state_dict"]
    groups = {number: group for group in base["param_groups"] for number in group["params"]}
    return [
        _flat(archive, master, base["state"].get(index, {}), groups.get(index, {}))
        for index, master in enumerate(rank["fp32_flat_groups"])
    ]


def _whole(archive: SavedArchive, tensor: StoredTensor) -> Parts:
    return Parts((Piece(archive, tensor, 0, tensor.numel, 0),))


def _part(archive: SavedArchive, flat: StoredTensor, start: int, stop: int, base: int, size: int) -> Piece:
    """What a partition, which is the elements [base, base + size) of its group, holds of the elements [start, stop)."""
    low, high = max(start, base), min(stop, base + size)
    piece = Piece(archive, flat, low - start, high - start, low - base)
    piece.check()
    return piece


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
