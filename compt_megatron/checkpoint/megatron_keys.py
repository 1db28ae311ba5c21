"""Canonical names <-> keys of a torch_dist folder, for one model: as we write them, and as Megatron spells them."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from typing import NamedTuple

import torch

from compt_megatron.checkpoint.contract import Region, TensorInfo, region_shape
from compt_megatron.spec.megatron_names import PADDED_KEYS, MegatronPlace, Rows, megatron_place
from compt_megatron.spec.table import ModelSpec

# prefix on the boundary -> what stands before the parameter's own key; `step` goes by canonical names
STATE = {
    "weight": "",
    "master": "optimizer.state.fp32_param.",
    "exp_avg": "optimizer.state.exp_avg.",
    "exp_avg_sq": "optimizer.state.exp_avg_sq.",
}
# megatron-core's distributed optimizer, saved as fully_reshardable, calls its fp32 parameters this
_STATE_SPELLINGS = {prefix: (before,) for prefix, before in STATE.items()} | {
    "master": (STATE["master"], "optimizer.state.param.")
}
_STEP = "optimizer.state.step."
_OWN = ("weight/", "align/", "rng/", "data/")
_MOST_PADDING = 128 * 64  # rows; Megatron pads a vocabulary to a multiple of 128 x tensor-parallel ranks


class MegatronKeys:
    """What the tensors of a torch_dist folder are called, as we write them (docs/checkpoint.md)."""

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
        if prefix in STATE and rest in self.places:
            return STATE[prefix] + self.places[rest].key
        return f"{prefix}/{rest}" if prefix not in STATE or prefix == "weight" else STATE[prefix] + rest

    def other_name(self, key: str) -> str | None:
        """The boundary name of a key that is not a parameter's; None if it is none of ours."""
        if key.startswith(_STEP):
            return f"step/{key.removeprefix(_STEP)}"
        for prefix, before in STATE.items():
            if before and key.startswith(before):
                return f"{prefix}/{key.removeprefix(before)}"
        return key if key.startswith(_OWN) else None

    def key_shape(self, key: str) -> tuple[int, ...]:
        """The global shape of a weight's tensor in the file: with layer axis, fused."""
        place = self.places[self.members[key][0]]
        return place.shape if place.layer is None else (self._layers(key), *place.shape)

    def _layers(self, key: str) -> int:
        return self.spec.towers[self.spec.params[self.members[key][0]].tower].layers

    def extra_states(self, declared: Container[str]) -> Iterator[str]:
        """The keys of the `_extra_state` objects that megatron-core has for the linears of the declared weights."""
        for key, names in self.members.items():
            owner, _, leaf = key.rpartition(".")
            if leaf == "weight" and ".linear_" in owner and f"weight/{names[0]}" in declared:
                layers = self._layers(key)
                yield from (f"{owner}._extra_state/shard_{layer}_{layers}" for layer in range(layers))

    def find(self, prefix: str, name: str, stored: dict[str, TensorInfo]) -> Found | None:
        """Where `stored` holds parameter `name`, in any of Megatron's spellings; None if it does not."""
        place = self.places[name]
        for before in _STATE_SPELLINGS[prefix]:
            for key, layered, rows, shape in _spellings(place):
                if before + key in stored:
                    lead = place.layer if layered else None
                    expected = (self._layers(place.key), *shape) if layered else shape
                    return Found(before + key, lead, rows, place.transposed, expected)
        return None


def _spellings(place: MegatronPlace) -> Iterator[tuple[str, bool, Rows, tuple[int, ...]]]:
    """The keys that Megatron may use, whether the tensor has a layer axis, the parameter's rows in it, and its shape.

    Transformer Engine's names or the local layer's; all layers in one, or (`non_homogeneous_layers`) one by one, where
    newer versions also store the halves of SwiGLU apart (`singleton_local_shards`).
    """
    if place.layer is None:
        yield place.key, False, place.rows, place.shape
        return
    index = f".layers.{place.layer}."
    yield place.key, True, place.rows, place.shape
    yield place.module.replace(index, ".layers.", 1), True, place.rows, place.shape
    single = place.key.replace(".layers.", index, 1)
    yield single, False, place.rows, place.shape
    yield place.module, False, place.rows, place.shape
    if place.part in ("gate", "up"):
        size = place.shape[0] // 2
        half = f"{single}_{'w' if place.part == 'gate' else 'v'}"
        yield half, False, Rows(size, size, 0), (size, *place.shape[1:])


class Found(NamedTuple):
    """Where a parameter is stored: in tensor `key`, at index `lead` of a leading layer axis (None: no such axis), as
    `rows` of what is behind it. `shape`: what the whole tensor's shape must be."""

    key: str
    lead: int | None
    rows: Rows
    transposed: bool
    shape: tuple[int, ...]

    def padding(self, stored: tuple[int, ...]) -> int | None:
        """How many rows a tensor of shape `stored` has beyond `shape`; None if it is not this tensor."""
        if stored == self.shape:
            return 0
        padded = self.key.endswith(PADDED_KEYS) and is_padding(stored, self.shape)
        return stored[0] - self.shape[0] if padded else None


def is_padding(stored: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether a tensor of shape `stored` can be one of `shape` with a padded vocabulary."""
    return stored[1:] == shape[1:] and 0 <= stored[0] - shape[0] < _MOST_PADDING


def read_place(
    read: Callable[[Region], torch.Tensor], rows: Rows, transposed: bool, box: Region, dtype: torch.dtype
) -> torch.Tensor:
    """A box of a parameter out of the tensor that holds its rows; `read` gives boxes of that tensor."""
    if not box:
        return read(box)
    turned = box[::-1] if transposed else box
    out = torch.empty(region_shape(turned), dtype=dtype)
    first = turned[0].start
    runs = list(rows.runs(first, turned[0].stop))
    if len(runs) == 1 and not transposed:
        run = runs[0]
        return read((slice(run.at, run.at + run.stop - run.start), *turned[1:]))
    for run in runs:
        out[run.start - first : run.stop - first] = read((slice(run.at, run.at + run.stop - run.start), *turned[1:]))
    return out.t().contiguous() if transposed else out
