"""Seeded choices of the data pipeline: pure functions of integers, the same on every rank, worker and platform."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

import numpy as np
import torch

_MASK = (1 << 64) - 1


class Use(IntEnum):
    """What a seed is for: keeps the draws for different uses independent."""

    SHARDS = 1
    WINDOW = 2
    AUGMENT = 3
    CAPTIONS = 4
    DOCUMENTS = 5
    SEQUENCES = 6


def mix(*parts: int) -> int:
    """64 well-mixed bits of a tuple of integers (splitmix64, Steele et al. 2014, chained over the parts)."""
    state = 0
    for part in parts:
        state = (state + part + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


def permutation(count: int, *parts: int) -> np.ndarray:
    """A permutation of range(count), int64. RandomState's streams are frozen by numpy's compatibility policy."""
    bits = mix(*parts)
    return np.random.RandomState([bits & 0xFFFFFFFF, bits >> 32]).permutation(count)


def draw_captions(available: int, wanted: int, *parts: int) -> list[int]:
    """Indices of `wanted` captions out of `available`: distinct where there are enough, else each caption equally
    often (up to one) in a seeded order."""
    if available == 1:
        return [0] * wanted
    pool = list(range(available))
    for place in range(min(wanted, available)):
        other = place + mix(*parts, place) % (available - place)
        pool[place], pool[other] = pool[other], pool[place]
    return [pool[place % available] for place in range(wanted)]


@contextmanager
def forked_random_state() -> Iterator[None]:
    """Seeding and drawing inside leaves the process's torch (CPU), numpy and Python generators as they were."""
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(torch_state)
        np.random.set_state(numpy_state)
        random.setstate(python_state)


def seed_all(bits: int) -> None:
    """Seed the CPU generators that image transforms draw from. Only inside `forked_random_state`."""
    torch.default_generator.manual_seed(bits >> 1)  # torch.manual_seed would reseed the accelerators as well
    random.seed(bits)
    np.random.seed(bits & 0xFFFFFFFF)
