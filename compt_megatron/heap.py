"""How a process gets its memory from glibc. Elsewhere (macOS, musl) these do nothing."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -2, -3, -8  # malloc.h
_MIB = 2**20


def one_heap() -> None:
    """For a process that does nothing but stream tensors: one heap for all threads, as each of the usual many keeps the
    holes that large tensors leave. And it keeps what was freed at its end: to clear fresh pages again and again costs
    more than to make the values that go there."""
    _set({_M_ARENA_MAX: 1, _M_MMAP_THRESHOLD: 32 * _MIB, _M_TRIM_THRESHOLD: 128 * _MIB})


def kept_heap() -> None:
    """For a process that trains on a CPU: what is freed stays with it. Each step wants the same memory as the one
    before, and fresh pages cost a step of a small model some 7 % of its time. Its peak does not grow."""
    _set({_M_MMAP_THRESHOLD: 1024 * _MIB, _M_TRIM_THRESHOLD: -1, _M_TOP_PAD: 64 * _MIB})


def _set(options: dict[int, int]) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in options.items():
            mallopt(option, value)
