"""The kernels' own source on the CPU, under the thread schedules that a seed chooses."""

from __future__ import annotations

import ctypes
from contextlib import contextmanager
from functools import cache

from compt_kernels.build import build, emulated_toolchain, load_emulated


@cache
def _library() -> ctypes.CDLL:
    load_emulated()
    return ctypes.CDLL(str(build(emulated_toolchain())))


@contextmanager
def schedule(seed: int):
    """Run blocks and threads in an order of this seed; 0 is their own order."""
    _library().compt_emulator_seed(seed)
    try:
        yield
    finally:
        _library().compt_emulator_seed(0)
