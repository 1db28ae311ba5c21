"""Optimizer state of a grown model: it follows the gradient's own map, not the weights'.

A parameter that is multiplied by s has its gradient divided by s, so exp_avg / s and exp_avg_sq / s². Under `tile` a
repeated row gets 1/k of the gradient and a divided column all of it (the slopes of the axis modes). So

- `exp_avg`: old entries times their slope; new ones 0. Later copies of an entry start from 0 too, which parts them from
  the first (kept with moments "grow-all", for comparison: copies with the same state stay the same for ever);
- `exp_avg_sq`: old entries, all copies, times slope²; new ones get the mean of the old ones of their row or column
  (with 0, their first steps would be several times the learning rate);
- `master`: as the weights, from the source's own fp32 copy;
- `step`: the source's.

The slopes are the gradient's exactly, with two exceptions that no rule for the moments can foresee: under `mean_pad`
LayerNorm's backward also takes the mean over the new entries, and where a query group becomes several, each copy of its
key and value gets what its own heads send, an equal share only on average.

Adam's step does not see the size of the gradient, so an entry that was multiplied by s moves 1/s times too far for its
size: `step_factors` gives the learning rate (s) and weight decay (1/s) under which its step is s times the source's.

Source: Staged Training (arXiv 2203.06211) grows the moments with the weights; slopes, means and factors are this
project's.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import product
from math import prod

from compt_megatron.checkpoint.contract import TensorInfo
from compt_megatron.errors import UserError
from compt_megatron.growth.plan import Constant, Copy, GrowthPlan, Part, Piece, Reduce, TensorPlan
from compt_megatron.growth.request import Moments
from compt_megatron.growth.segments import Segment, merged
from compt_megatron.spec.table import Param

_ONE_STEP = "step/optimizer"  # the first run checkpoints have one count for all parameters


@dataclass(frozen=True)
class Origin:
    """What a target tensor is made from: the source's parameter and the segments of each dimension. `silent`: it is
    of a block that adds nothing yet, a later copy of the source's."""

    param: Param
    segments: list[list[Segment]]
    silent: bool


def grown_states(
    tensors: dict[str, TensorPlan], origins: dict[str, Origin], moments: Moments
) -> dict[str, dict[str, TensorPlan]]:
    """The plans of all optimizer state by its prefix, from those of the weights."""
    states: dict[str, dict[str, TensorPlan]] = {"master": tensors, "exp_avg": {}, "exp_avg_sq": {}, "step": {}}
    for name, tensor in tensors.items():
        origin = origins[name]
        reset = moments == "grow"
        states["exp_avg"][name] = _replan(tensor, [_first(part, reset, origin.silent) for part in tensor.parts])
        states["exp_avg_sq"][name] = _replan(tensor, _second(origin))
        states["step"][name] = TensorPlan(name, (), tensor.exactness, (Part((), Copy(origin.param.name, ())),))
    return states


def _replan(tensor: TensorPlan, parts: Iterable[Part]) -> TensorPlan:
    return replace(tensor, parts=tuple(merged(list(parts))))


def _first(part: Part, reset: bool, silent: bool) -> Part:
    piece = part.piece
    if isinstance(piece, Copy) and not (reset and (piece.again or silent)):
        return Part(part.box, Copy(piece.source, piece.start, piece.gradient))
    return Part(part.box, Constant(0.0))


def _second(origin: Origin) -> list[Part]:
    return [
        Part(tuple((s.start, s.stop) for s in meeting), _second_piece(origin.param, meeting))
        for meeting in product(*origin.segments)
    ]


def _second_piece(param: Param, meeting: tuple[Segment, ...]) -> Piece:
    start = tuple(segment.source if segment.what == "old" else 0 for segment in meeting)
    slope = prod(segment.slope for segment in meeting if segment.what == "old")
    new = [dim for dim, segment in enumerate(meeting) if segment.what != "old"]
    if not new:
        return Copy(param.name, start, slope**2)
    assert len(new) <= 2, f"{param.name}: three dimensions grow"
    across = (new[1], param.shape[new[1]]) if len(new) == 2 else None
    return Reduce(param.name, new[0], param.shape[new[0]], start, slope**2, None, across)


def with_source_states(plan: GrowthPlan, tensors: dict[str, TensorInfo]) -> GrowthPlan:
    """The plan without the kinds of optimizer state that the source does not have.

    `tensors`: the source checkpoint's, by boundary name. Raises UserError where it has no moments at all, or not those
    of every parameter.
    """
    if not plan.states:
        return plan
    planned, states = dict(plan.states), {}
    if _ONE_STEP in tensors:
        one = (Part((), Copy(_ONE_STEP.removeprefix("step/"), ())),)
        planned["step"] = {name: replace(tensor, parts=one) for name, tensor in planned["step"].items()}
    for prefix, grown in planned.items():
        sources = {source for tensor in grown.values() for source in tensor.sources()}
        missing = sorted(name for name in sources if f"{prefix}/{name}" not in tensors)
        if len(missing) == len(sources):
            continue
        if missing:
            raise UserError(
                f"the source checkpoint has no {prefix} of {missing[0]} (and {len(missing) - 1} others); use --moments "
                "fresh"
            )
        states[prefix] = grown
    if not {"exp_avg", "exp_avg_sq"} <= states.keys():
        raise UserError("the source checkpoint holds no optimizer moments to grow; use --moments fresh")
    return replace(plan, states=states)


def step_factors(plan: GrowthPlan) -> dict[str, tuple[float, float]]:
    """Factors on learning rate and weight decay, by tensor, under which a grown entry's step is its source's.

    Tensors whose old entries were all multiplied by one s, other than 1: (s, 1/s). Divided columns under `tile` get
    (1/k, k).
    """
    factors = {}
    for name, tensor in plan.tensors.items():
        scales = {part.piece.scale for part in tensor.parts if isinstance(part.piece, Copy)}
        if len(scales) == 1 and (scale := scales.pop()) != 1.0:
            factors[name] = (scale, 1 / scale)
    return factors
