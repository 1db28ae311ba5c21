"""How one dimension of one tensor grows: segments of the target's indices, and their product over all dimensions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

from compt_megatron.growth.plan import Constant, Contrast, Copy, Part, Piece, Random, Reduce
from compt_megatron.spec.table import Param, Tower


@dataclass(frozen=True)
class Segment:
    """Target indices [start, stop) of one dimension.

    `old`: source indices from `source` on, times `scale`; `mean`: the mean of all source rows times `scale`; `free`: a
    fresh value times `scale`; `value`: the number `value`. `contrast`: see the pieces of plan.py.
    """

    start: int
    stop: int
    what: Literal["old", "mean", "free", "value"]
    source: int = 0
    scale: float = 1.0
    contrast: Contrast | None = None
    value: float = 0.0


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
        return Copy(source, start, scale)
    assert len(means) == 1, f"{param.name}: two averaged dimensions"
    return Reduce(source, means[0], source_shape[means[0]], start, scale, meeting[means[0]].contrast)


def repeated(site: Site, times: int, scale: float = 1.0) -> list[Segment]:
    """The source's indices `times` times over."""
    return [Segment(k * site.old, (k + 1) * site.old, "old", scale=scale) for k in range(times)]


def leading(site: Site, rest: Segment | None, scale: float = 1.0) -> list[Segment]:
    """The source's indices first, then `rest` (its start and stop are filled in) if the dimension grew."""
    old = Segment(0, site.old, "old", scale=scale)
    return [old] if rest is None or site.new == site.old else [old, replace(rest, start=site.old, stop=site.new)]


def per_head(site: Site, inside: Segment, beyond: Segment, scale: float = 1.0) -> list[Segment]:
    """The source's heads first, each in the leading part of a target head whose rest is `inside`; then `beyond`.

    Heads are head-major: head h owns indices h * head_dim .. (h + 1) * head_dim.
    """
    assert site.source is not None
    assert site.target is not None
    heads, small, large = site.source.heads, site.source.head_dim, site.target.head_dim
    if small == large:
        return leading(site, beyond, scale)
    segments = []
    for head in range(heads):
        at = head * large
        segments.append(Segment(at, at + small, "old", source=head * small, scale=scale))
        segments.append(replace(inside, start=at + small, stop=at + large))
    if heads * large < site.new:
        segments.append(replace(beyond, start=heads * large, stop=site.new))
    return segments


FREE = Segment(0, 0, "free")
ZERO = Segment(0, 0, "value", value=0.0)
