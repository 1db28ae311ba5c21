"""Permutations of any size that need no memory: the n-th entry is computed from n and the seed alone.

A Feistel network over the smallest power of two that holds the size, its two halves as equal as they can be; what falls
outside goes through it again until it falls inside (cycle walking: Black and Rogaway 2002).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from compt_megatron.data.seeds import mix

Array = np.ndarray[Any, np.dtype[Any]]

_ROUNDS = 6  # each changes one half
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # splitmix64's multipliers
_WORD = (1 << 64) - 1


def shuffled(places: Array, count: int, *parts: int) -> Array:
    """Entries `places` [n] of the permutation of range(count) that `parts` seed; int64 [n]."""
    low_bits, masks, keys = _network(count, parts)
    low, high = np.uint64(low_bits), [np.uint64(mask) for mask in masks]
    out = np.empty(len(places), np.int64)
    left, values = np.arange(len(places)), places.astype(np.uint64)
    while len(left):
        halves = [values & high[0], values >> low]
        for number, key in enumerate(keys):
            changed = number % 2
            halves[changed] = halves[changed] ^ (_mixed(halves[1 - changed], key) & high[changed])
        values = (halves[1] << low) | halves[0]
        inside = values < count
        out[left[inside]] = values[inside]
        left, values = left[~inside], values[~inside]
    return out


def shuffled_one(place: int, count: int, *parts: int) -> int:
    """One entry of the permutation of `shuffled`, without arrays."""
    low, masks, keys = _network(count, parts)
    value = place
    while True:
        halves = [value & masks[0], value >> low]
        for number, key in enumerate(keys):
            changed = number % 2
            bits = (halves[1 - changed] ^ key) * _FIRST & _WORD
            bits = (bits ^ (bits >> 32)) * _SECOND & _WORD
            halves[changed] ^= bits >> 32 & masks[changed]
        value = halves[1] << low | halves[0]
        if value < count:
            return value


@lru_cache(maxsize=64)
def _network(count: int, parts: tuple[int, ...]) -> tuple[int, tuple[int, int], list[int]]:
    """Bits of the low half, masks of the low and the high one, and a key for each round."""
    bits = max(2, (count - 1).bit_length())
    low = bits // 2
    return low, ((1 << low) - 1, (1 << (bits - low)) - 1), [mix(*parts, number) for number in range(_ROUNDS)]


def _mixed(half: Array, key: int) -> Array:
    """32 well-mixed bits of each entry of a uint64 array."""
    bits = (half ^ np.uint64(key)) * np.uint64(_FIRST)
    bits ^= bits >> np.uint64(32)
    bits *= np.uint64(_SECOND)
    bits >>= np.uint64(32)
    return bits
