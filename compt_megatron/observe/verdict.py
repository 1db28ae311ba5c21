"""What the chain bought, in words: its last link against the same model trained alone with the same compute."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from compt_megatron.observe import numbers
from compt_megatron.observe.family import Family, Member, Point, leading_metric

METRIC_NAMES = {
    "top1": "top-1",
    "top5": "top-5",
    "i2t_r1": "image-to-text recall at 1",
    "t2i_r1": "text-to-image recall at 1",
}
SAME_COMPUTE = 0.02  # the share by which two budgets may differ and still be called equal
EQUAL = 0.0005  # fractions closer than this print as the same per cent


@dataclass(frozen=True)
class Verdict:
    """`outcome` for programs, `headline` for people, `details` are sentences that qualify it."""

    outcome: Literal["won", "lost", "tied", "no control", "unfinished"]
    headline: str
    details: tuple[str, ...] = ()

    @property
    def words(self) -> str:
        return " ".join((self.headline, *self.details))


def judge(family: Family) -> Verdict:
    """Compare the last link with the best of its controls on the run's first evaluation set."""
    done = [link for link in family.links if link.done]
    if not family.links or len(done) < len(family.links):
        newest = f"; {done[-1].name} is the last of them" if done else ""
        return Verdict("unfinished", f"{len(done)} of {len(family.links)} links are trained{newest}. No result yet.")
    last, sets = family.links[-1], family.eval_sets
    eval_set = next((name for name in sets if last.score(name) is not None), None)
    if eval_set is None:
        return Verdict("no control", f"All {len(done)} links are trained, but nothing was evaluated: no result.")
    metric = METRIC_NAMES[family.metric_of(eval_set)]
    reached = f"{last.name} reaches {numbers.percent(last.score(eval_set))} {metric} on {eval_set}"
    spent = last.macs_cumulative
    total = f"after {numbers.macs(spent)} in the whole chain" if spent else "at the chain's end"
    controls = [control for control in family.controls_of(last) if control.score(eval_set) is not None]
    if not controls:
        pending = family.controls_of(last)
        why = f"its control {pending[0].name} is not trained yet" if pending else "no control was trained beside it"
        return Verdict("no control", f"{reached} {total}. Whether the chain helped is not known: {why}.")
    best = max(controls, key=lambda control: control.score(eval_set) or 0.0)
    return _compare(last, best, eval_set, reached, len(controls))


def _compare(last: Member, best: Member, eval_set: str, reached: str, tried: int) -> Verdict:
    ours, theirs = last.score(eval_set) or 0.0, best.score(eval_set) or 0.0  # both are known here
    gap, points = ours - theirs, f"{100 * abs(ours - theirs):.1f} points"
    against = f"the same model trained alone {_budget(last, best)} reaches {numbers.percent(theirs)}"
    details = [text for text in (_noise(last, best, eval_set), _catching_up(last, best, eval_set)) if text]
    if tried > 1:
        details.append(f"Compared with the best of {tried} controls.")
    if abs(gap) < EQUAL:
        return Verdict("tied", f"No difference: {reached}; {against}.", tuple(details))
    if gap > 0:
        return Verdict("won", f"The chain won by {points}: {reached}; {against}.", tuple(details))
    return Verdict(
        "lost", f"The chain lost by {points}: {reached}; {against}. Training it alone was better here.", tuple(details)
    )


def _budget(last: Member, best: Member) -> str:
    if not last.macs_cumulative or not best.macs_total:
        return "(its compute is not recorded)"
    ratio = best.macs_total / last.macs_cumulative
    if abs(ratio - 1) <= SAME_COMPUTE:
        return f"with the chain's total compute ({numbers.macs(last.macs_cumulative)})"
    return f"with {ratio:.2f} times the chain's total compute ({numbers.macs(best.macs_total)})"


def _noise(last: Member, best: Member, eval_set: str) -> str:
    """How large the difference is against the spread that so many images alone explain (binomial standard errors)."""
    count = last.evaluation[eval_set].get("images") or last.evaluation[eval_set].get("samples")
    ours, theirs = last.score(eval_set), best.score(eval_set)
    if not count or ours is None or theirs is None:
        return ""
    error = math.sqrt((ours * (1 - ours) + theirs * (1 - theirs)) / count)
    small = abs(ours - theirs) <= 2 * error and abs(ours - theirs) >= EQUAL
    reading = " That is within two of them: read it as no difference shown." if small else ""
    return (
        f"On {int(count):,} images one standard error of that difference is {100 * error:.1f} points; "
        f"the spread between seeds is not in it.{reading}"
    )


def _catching_up(last: Member, best: Member, eval_set: str) -> str:
    """At how much compute the model alone first reached the chain's final result."""
    goal, curve = last.score(eval_set), curve_of(best, eval_set)
    if goal is None or not last.macs_cumulative or len(curve) < 2:
        return ""
    reached = next((macs for macs, score in curve if score >= goal), None)
    if reached is None:
        return "Alone it never reached the chain's result within its budget."
    return f"Alone it first reached that after {reached / last.macs_cumulative:.2f} times the chain's compute."


def curve_of(member: Member, eval_set: str) -> list[tuple[float, float]]:
    """(cumulative MACs, leading metric as a fraction) of a member's evaluations on one set."""
    return [(point.macs, value) for point in member.curve if (value := _value(point, eval_set)) is not None]


def _value(point: Point, eval_set: str) -> float | None:
    values = point.metrics.get(eval_set, {})
    metric = leading_metric(values)
    return values[metric] if metric else None
