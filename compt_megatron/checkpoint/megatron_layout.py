"""How the files of a torch_dist checkpoint are cut for a tensor x pipeline layout, and which layouts a model allows.

As a job of that layout would have written them: a pipeline stage has as many consecutive layers of every tower as every
other stage, the first also what comes before the layers and the last what comes after them; of a tensor that is split,
every tensor-parallel rank has its heads, units or vocabulary entries. Ranks are numbered tensor-parallel first.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from compt_megatron.checkpoint.contract import Layout, Region
from compt_megatron.errors import UserError
from compt_megatron.spec.megatron_names import PADDED_KEYS, MegatronPlace, place_on_rank
from compt_megatron.spec.table import ModelSpec

MOST_RANKS = 256  # each has a file of its own that every worker may have open


def check_layout(spec: ModelSpec, layout: Layout, path: Path) -> None:
    """Raise UserError if the model cannot be laid out like that; the message names the nearest layout that works."""
    reason = obstacle(spec, layout)
    if reason is None:
        return
    tensors = [n for n in range(1, MOST_RANKS + 1) if obstacle(spec, Layout(tensor=n)) is None]
    pipelines = [n for n in range(1, MOST_RANKS + 1) if obstacle(spec, Layout(pipeline=n)) is None]
    near = min(
        (Layout(t, p) for t in tensors for p in pipelines if t * p <= MOST_RANKS),
        key=lambda one: (abs(one.tensor - layout.tensor) + abs(one.pipeline - layout.pipeline), one.tensor),
    )
    raise UserError(
        f"{path}: '{spec.name}' cannot be laid out for tensor {layout.tensor}, pipeline {layout.pipeline}: {reason}; "
        f"the nearest layout that works is tensor {near.tensor}, pipeline {near.pipeline}"
    )


def obstacle(spec: ModelSpec, layout: Layout) -> str | None:
    """Why a model cannot be laid out like that, or None."""
    if layout.tensor < 1 or layout.pipeline < 1:
        return "both must be at least 1"
    if layout.tensor * layout.pipeline > MOST_RANKS:
        return f"more than {MOST_RANKS} ranks"
    for tower in spec.towers.values():
        where = "it" if spec.is_language_model else f"its {tower.name} tower"
        for count, what in ((tower.heads, "heads"), (tower.groups, "query groups"), (tower.mlp, "MLP units")):
            if count % layout.tensor:
                return f"{where} has {count} {what}, which tensor does not divide"
        if tower.layers % layout.pipeline:
            return f"{where} has {tower.layers} layers, which pipeline does not divide"
    for param in spec.params.values():  # a language model's vocabulary is padded
        if param.tensor_dim is None or param.stage == "layer" or spec.is_language_model:
            continue
        if (size := param.shape[param.tensor_dim]) % layout.tensor:
            return f"its vocabulary has {size} entries, which tensor does not divide"
    return None


class Cutter:
    """Which rank of a layout holds which part of a parameter's tensor."""

    def __init__(self, spec: ModelSpec, layout: Layout, padded: int | None = None) -> None:
        """`padded`: the rows of a padded vocabulary (None: as many as there are entries, the last rank has fewer)."""
        self._spec, self._layout, self._padded = spec, layout, padded

    def stage(self, name: str) -> int:
        """The pipeline stage of a parameter."""
        param = self._spec.params[name]
        if param.layer is not None:
            return param.layer * self._layout.pipeline // self._spec.towers[param.tower].layers
        return 0 if param.stage == "pre" else self._layout.pipeline - 1

    def pieces(
        self, name: str, place: MegatronPlace, offsets: tuple[int, ...], sizes: tuple[int, ...]
    ) -> Iterator[tuple[int, Region]]:
        """Cut a box of the tensor that holds parameter `name` where ranks meet: (rank, region of the box)."""
        first = self.stage(name) * self._layout.tensor
        box = tuple(slice(0, size) for size in sizes)
        if place.split is None or self._layout.tensor == 1:
            yield first, box
            return
        dim = place.split
        own = place_on_rank(self._spec, name, self._layout.tensor)
        size, period = own.shape[dim], place.shape[dim]
        if place.key in PADDED_KEYS and self._padded is not None:
            size = self._padded // self._layout.tensor
            period = self._padded
        if place.part in ("gate", "up") and dim == 0:  # every rank has its units of both halves
            size, period = size // 2, period // 2
        at, stop = offsets[dim], offsets[dim] + sizes[dim]
        while at < stop:
            rank, edge = (at % period) // size, min(stop, at - (at % period) % size + size)
            yield first + rank, (*box[:dim], slice(at - offsets[dim], edge - offsets[dim]), *box[dim + 1 :])
            at = edge
