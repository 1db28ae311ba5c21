"""How one dimension of one tensor grows: segments of the target's indices, and their product over all dimensions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from math import prod
from typing import Literal

from compt_megatron.growth.plan import Constant, Contrast, Copy, Level, Noise, Part, Piece, Random, Reduce
from compt_megatron.spec.table import Param, Tower


@dataclass(frozen=True)
class Segment:
    """Target indices [start, stop) of one dimension.

    `old`: source indices from `source` on, times `scale`; `mean`: the mean of all source rows times `scale`; `level`:
    the root mean square of all source entries; `free`: a fresh value times `scale`; `value`: the number `value`.
    `contrast` and `weights`: see the pieces of plan.py. Of `old` only:
    `gradient`, that of an element in units of its source element's (None: 1 / scale); `copy`, how many earlier
    segments have the same source indices; `noise`, times a fresh value, that of index `noise_at` for the first element.
    """

    start: int
    stop: int
    what: Literal["old", "mean", "level", "free", "value"]
    source: int = 0
    scale: float = 1.0
    contrast: Contrast | None = None
    weights: str | None = None
    value: float = 0.0
    gradient: float | None = None
    copy: int = 0
    noise: float = 0.0
    noise_at: int = 0

    @property
    def slope(self) -> float:
        """The gradient of an element in units of its source element's."""
        return 1 / self.scale if self.gradient is None else self.gradient


@dataclass(frozen=True)
class Site:
    """One dimension of one target parameter, and the sizes it has before and after."""

    param: Param
    index: int  # of the dimension
    old: int
    new: int
    source: Tower | None  # the towers the parameter belongs to; None for parameters of the whole model
    target: Tower | None
    pre_gamma: str | None = None  # the scale of the norm before the first block, where the tower has one
    scaled_by: str | None = None  # the source's multiplier of what this parameter writes, where it has one
    noise: float = 0.0  # how far copies of a unit are pushed apart, in units of a fresh value

    @property
    def tied_norm(self) -> bool:
        """Whether this is the norm whose output is multiplied by the token embedding: the head of a tied model."""
        return self.target is not None and self.target.tied and self.param.stage == "post"

    @property
    def axis(self) -> str:
        return self.param.dims[self.index].axis

    @property
    def role(self) -> str:
        return self.param.dims[self.index].role


def segment_parts(param: Param, source: str, source_shape: tuple[int, ...], dims: list[list[Segment]]) -> list[Part]:
    """The parts of a target tensor from the segments of its dimensions.

    Where segments of different kinds meet, a value wins over free, free over mean, mean over old: a zero column keeps
    a new unit silent whatever its rows are, and a new unit's input is fresh over the whole width.
    """
    return merged(
        [
            Part(tuple((s.start, s.stop) for s in meeting), _piece(param, source, source_shape, meeting))
            for meeting in product(*dims)
        ]
    )


def merged(parts: list[Part]) -> list[Part]:
    """Neighbouring boxes of the same fresh or constant values as one, so that each is made in one go."""
    for dim in reversed(range(len(parts[0].box))):
        kept: list[Part] = []
        for part in sorted(parts, key=lambda part: (part.box[:dim], part.box[dim + 1 :], part.box[dim])):
            last = kept[-1] if kept else None
            if last and _joins(last, part, dim):
                side = (last.box[dim][0], part.box[dim][1])
                kept[-1] = Part((*part.box[:dim], side, *part.box[dim + 1 :]), part.piece)
            else:
                kept.append(part)
        parts = sorted(kept, key=lambda part: part.box)
    return parts


def _joins(first: Part, second: Part, dim: int) -> bool:
    plain = isinstance(first.piece, Random) or (isinstance(first.piece, Constant) and not first.piece.contrast)
    others = (*first.box[:dim], *first.box[dim + 1 :]) == (*second.box[:dim], *second.box[dim + 1 :])
    return plain and first.piece == second.piece and others and first.box[dim][1] == second.box[dim][0]


def _piece(param: Param, source: str, source_shape: tuple[int, ...], meeting: tuple[Segment, ...]) -> Piece:
    for segment in meeting:
        if segment.what == "value":
            assert segment.contrast is None or len(meeting) == 1, param.name
            return Constant(segment.value, segment.contrast)
        if segment.what == "level":
            assert len(meeting) == 1, param.name
            return Level(source, source_shape[0])
    free = [segment.scale for segment in meeting if segment.what == "free"]
    scale = 1.0
    if free:
        for factor in free:
            scale *= factor
        return Random(scale)
    for segment in meeting:
        scale *= segment.scale
    start = tuple(segment.source for segment in meeting)
    means = [dim for dim, segment in enumerate(meeting) if segment.what == "mean"]
    if not means:
        slope = prod(segment.slope for segment in meeting)
        return Copy(source, start, scale, _noise(param, meeting), slope, any(segment.copy for segment in meeting))
    assert len(means) == 1, f"{param.name}: two averaged dimensions"
    mean = meeting[means[0]]
    return Reduce(source, means[0], source_shape[means[0]], start, scale, mean.contrast, weights=mean.weights)


def _noise(param: Param, meeting: tuple[Segment, ...]) -> Noise | None:
    noisy = [segment for segment in meeting if segment.noise]
    assert len(noisy) <= 1, f"{param.name}: noise on two dimensions"
    if not noisy:
        return None
    return Noise(noisy[0].noise, tuple(s.noise_at if s is noisy[0] else s.start for s in meeting))


def leading(site: Site, rest: Segment | None, scale: float = 1.0) -> list[Segment]:
    """The source's indices first, then `rest` (its start and stop are filled in) if the dimension grew."""
    old = Segment(0, site.old, "old", scale=scale)
    return [old] if rest is None or site.new == site.old else [old, replace(rest, start=site.old, stop=site.new)]


FREE = Segment(0, 0, "free")
ZERO = Segment(0, 0, "value", value=0.0)
