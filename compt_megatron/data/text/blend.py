"""Which data set each sample of a blend comes from, as exactly in the asked proportions as whole samples can be."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from fractions import Fraction
from math import lcm

import numpy as np

from compt_megatron.errors import UserError

PARTS = 100_000  # proportions are whole numbers of these, where they have no smaller common denominator


class Blend:
    """The schedule of a blend of data sets with the given weights (any positive numbers; None: equal ones).

    After any number k of samples, data set i was chosen less than one sample more or less often than k · its share.
    Nothing is random: the choice repeats with the smallest period in which every data set has whole samples.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self.shares = _shares(weights)
        self.period = sum(self.shares)
        self._chosen = _schedule(self.shares)
        self._number = np.zeros(self.period, np.int64)
        for index, share in enumerate(self.shares):
            self._number[self._chosen == index] = np.arange(share)

    def __call__(self, sample: int) -> tuple[int, int]:
        """(data set, which of that set's own samples it is) of a sample of the blend."""
        rounds, place = divmod(sample, self.period)
        index = int(self._chosen[place])
        return index, rounds * self.shares[index] + int(self._number[place])


def _shares(weights: Sequence[float]) -> list[int]:
    """Whole numbers in proportion to the weights, exactly if their sum is at most PARTS, else rounded to that sum."""
    if not all(0 < weight < float("inf") for weight in weights):
        raise UserError(f"the weights of a blend are {', '.join(map(str, weights))}; they must be numbers above 0")
    exact = [Fraction(str(weight)) for weight in weights]
    exact = [weight / sum(exact) for weight in exact]
    whole = lcm(*(weight.denominator for weight in exact))
    if whole <= PARTS:
        return [int(weight * whole) for weight in exact]
    shares = [max(1, int(weight * PARTS)) for weight in exact]
    by_rest = sorted(range(len(exact)), key=lambda index: shares[index] - exact[index] * PARTS)
    for index in by_rest[: max(0, PARTS - sum(shares))]:
        shares[index] += 1
    return shares


def _schedule(shares: Sequence[int]) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    """One period. The j-th sample of a set with share w has the slots from floor((j - 1) / w) to ceil(j / w) - 1; the
    released one with the earliest deadline goes first, which meets all of them (Baruah et al. 1996, Pfair)."""
    period = sum(shares)
    done = [0] * len(shares)
    waiting = [(0, index) for index in range(len(shares))]  # by the slot in which the next sample is released
    ready: list[tuple[int, int]] = []  # by deadline
    chosen = np.zeros(period, np.int32)
    for slot in range(period):
        while waiting and waiting[0][0] <= slot:
            index = heapq.heappop(waiting)[1]
            heapq.heappush(ready, (-(-(done[index] + 1) * period // shares[index]), index))
        index = heapq.heappop(ready)[1]
        chosen[slot] = index
        done[index] += 1
        if done[index] < shares[index]:
            heapq.heappush(waiting, (done[index] * period // shares[index], index))
    return chosen
