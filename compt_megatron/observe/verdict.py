"""What the chain bought, in words: its last link against the same model trained alone with the same compute."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from compt_megatron.observe import numbers
from compt_megatron.observe.family import LOWER_IS_BETTER, Family, Member, Point, gain, leading_metric

METRIC_NAMES = {
    "top1": "top-1",
    "top5": "top-5",
    "i2t_r1": "image-to-text recall at 1",
    "t2i_r1": "text-to-image recall at 1",
    "perplexity": "perplexity",
    "bits_per_byte": "bits per byte",
}
SAME_COMPUTE = 0.02  # the share by which two budgets may differ and still be called equal
EQUAL = 0.0005  # fractions closer than this print as the same per cent; of perplexities, their share of one

Outcome = Literal["won", "lost", "tied", "no control", "unfinished"]


@dataclass(frozen=True)
class Verdict:
    """`outcome` for programs, `headline` for people, `details` are sentences that qualify it."""

    outcome: Outcome
    headline: str
    details: tuple[str, ...] = ()

    @property
    def words(self) -> str:
        return " ".join((self.headline, *self.details))


def shown(metric: str, value: float | None) -> str:
    """The value of a metric as people read it: 18.8 %, or a plain number where it is no fraction."""
    return numbers.decimal(value) if metric in LOWER_IS_BETTER else numbers.percent(value)


def judge(family: Family) -> Verdict:
    """Compare the last link with the best of its controls on the run's first evaluation set."""
    done = [link for link in family.links if link.done]
    if not family.links or len(done) < len(family.links):
        names = f" ({', '.join(link.name for link in done)})" if done else ""
        return Verdict(
            "unfinished", f"Not finished: {len(done)} of {len(family.links)} links trained{names}. No result yet."
        )
    last, sets = family.links[-1], family.eval_sets
    eval_set = next((name for name in sets if last.score(name) is not None), None)
    if eval_set is None:
        return Verdict("no control", f"All {len(done)} links are trained, but nothing was evaluated: no result.")
    metric = family.metric_of(eval_set)
    reached = f"{last.name} reaches {shown(metric, last.score(eval_set))} {METRIC_NAMES[metric]} on {eval_set}"
    if metric in LOWER_IS_BETTER:
        reached = f"{last.name} reaches {METRIC_NAMES[metric]} {shown(metric, last.score(eval_set))} on {eval_set}"
    spent = last.macs_cumulative
    total = f"after {numbers.macs(spent)} in the whole chain" if spent else "at the chain's end"
    controls = [control for control in family.controls_of(last) if control.score(eval_set) is not None]
    if not controls:
        pending = family.controls_of(last)
        why = f"its control {pending[0].name} is not trained yet" if pending else "no control was trained beside it"
        return Verdict("no control", f"{reached} {total}. Whether the chain helped is not known: {why}.")
    best = max(controls, key=lambda control: gain(metric, control.score(eval_set) or 0.0, 0.0))
    return _compare(last, best, eval_set, metric, reached, len(controls))


def _compare(last: Member, best: Member, eval_set: str, metric: str, reached: str, tried: int) -> Verdict:
    ours, theirs = last.score(eval_set) or 0.0, best.score(eval_set) or 0.0  # both are known here
    gap, points = gain(metric, ours, theirs), f"{100 * abs(ours - theirs):.1f} points"
    against = f"the same model trained alone {_budget(last, best)} reaches {shown(metric, theirs)}"
    details = [_catching_up(last, best, eval_set, metric)]
    if metric in LOWER_IS_BETTER:
        gap /= theirs
        points = f"{100 * abs(gap):.1f} % of {METRIC_NAMES[metric]} (lower is better)"
        details.insert(0, "The spread between seeds is not known from one run.")
    if (noise := _standard_error(last, best, eval_set)) is not None:
        count, error = noise
        if EQUAL <= abs(gap) <= 2 * error:
            points += " (within two standard errors: no clear difference)"
        details.insert(
            0,
            f"On {count:,} images one standard error of the difference is {100 * error:.1f} points, "
            "the spread between seeds not counted.",
        )
    if tried > 1:
        details.append(f"Compared with the best of {tried} controls.")
    outcome: Outcome
    if abs(gap) < EQUAL:
        outcome, headline = "tied", f"No difference: {reached}; {against}."
    elif gap > 0:
        outcome, headline = "won", f"The chain won by {points}: {reached}; {against}."
    else:
        outcome = "lost"
        headline = f"The chain lost by {points}: {reached}; {against}. Training it alone was better here."
    return Verdict(outcome, headline, tuple(text for text in details if text))


def _budget(last: Member, best: Member) -> str:
    if not last.macs_cumulative or not best.macs_total:
        return "(its compute is not recorded)"
    ratio = best.macs_total / last.macs_cumulative
    if abs(ratio - 1) <= SAME_COMPUTE:
        return f"with the chain's total compute ({numbers.macs(last.macs_cumulative)})"
    return f"with {ratio:.2f} times the chain's total compute ({numbers.macs(best.macs_total)})"


def _standard_error(last: Member, best: Member, eval_set: str) -> tuple[int, float] | None:
    """(images, standard error of the difference): what the number of images alone explains, binomially."""
    count = last.evaluation[eval_set].get("images") or last.evaluation[eval_set].get("samples")
    ours, theirs = last.score(eval_set), best.score(eval_set)
    if not count or ours is None or theirs is None or not (0 <= ours <= 1 and 0 <= theirs <= 1):
        return None
    return int(count), math.sqrt((ours * (1 - ours) + theirs * (1 - theirs)) / count)


def _catching_up(last: Member, best: Member, eval_set: str, metric: str) -> str:
    """At how much compute the model alone first reached the chain's final result."""
    goal, curve = last.score(eval_set), curve_of(best, eval_set)
    if goal is None or not last.macs_cumulative or len(curve) < 2:
        return ""
    reached = next((macs for macs, score in curve if gain(metric, score, goal) >= 0), None)
    if reached is None:
        return "Alone it never reached the chain's result within its budget."
    share = reached / last.macs_cumulative
    return f"Alone it first reached {shown(metric, goal)} after {share:.2f} times the chain's compute."


def curve_of(member: Member, eval_set: str) -> list[tuple[float, float]]:
    """(cumulative MACs, leading metric) of a member's evaluations on one set."""
    return [(point.macs, value) for point in member.curve if (value := _value(point, eval_set)) is not None]


def _value(point: Point, eval_set: str) -> float | None:
    values = point.metrics.get(eval_set, {})
    metric = leading_metric(values)
    return values[metric] if metric else None
