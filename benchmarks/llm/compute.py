"""How much compute training alone needs for a loss, from the losses that it reached with several budgets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class Point(NamedTuple):
    """A training to the end of its schedule: MACs spent, and the held-out loss reached."""

    macs: float
    loss: float


class Compute(NamedTuple):
    """MACs for a loss, and whether they lie outside what was measured."""

    macs: float
    extrapolated: bool


def frontier(points: Sequence[Point]) -> list[Point]:
    """The points by compute, without those that spent more than another one for no lower loss."""
    kept: list[Point] = []
    for point in sorted(points):
        if not kept or point.loss < kept[-1].loss:
            kept.append(point)
    return kept


def equal_compute(points: Sequence[Point], loss: float) -> Compute | None:
    """The MACs at which the curve through `points` has `loss`: straight lines in log MACs and log loss; beyond the ends
    the nearest line goes on. None where fewer than two points say how loss falls with compute."""
    curve = frontier(points)
    if len(curve) < 2:
        return None
    right = next((place for place in range(1, len(curve)) if curve[place].loss <= loss), len(curve) - 1)
    before, after = curve[right - 1], curve[right]
    slope = math.log(after.macs / before.macs) / math.log(after.loss / before.loss)
    macs = math.exp(math.log(before.macs) + slope * math.log(loss / before.loss))
    return Compute(macs, not curve[-1].loss <= loss <= curve[0].loss)


def next_rates(losses: dict[float, float], start: float) -> list[float]:
    """Learning rates to measure next, on a grid of factors of two, until the best has a worse neighbour on either side.

    `losses`: {rate: loss} so far. Empty once the best rate is known.
    """
    best = min(losses, key=lambda rate: losses[rate]) if losses else start
    return [rate for rate in (best, best / 2, best * 2) if rate not in losses]
