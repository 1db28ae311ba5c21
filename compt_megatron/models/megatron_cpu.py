"""Makes megatron-core importable and correct on a machine without CUDA. Run before anything imports megatron.core.

Only what the models need is changed, and only inside megatron-core's own modules: torch and torch.cuda stay as they
are, so DeepSpeed and everything else in the process sees a plain CPU torch. With CUDA nothing is changed at all.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

_installed = False


def install() -> None:
    """Import megatron-core quietly and, where there is no CUDA, mend what its models touch. Idempotent."""
    global _installed
    if _installed:
        return
    if not torch.cuda.is_available():
        _skip_triton_import()
    with warnings.catch_warnings():
        # Transformer Engine and apex are optional and their absence is announced four times at import
        warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
        importlib.import_module("megatron.core")
    if not torch.cuda.is_available():
        _use_cpu_random_state()
    _installed = True


def _skip_triton_import() -> None:
    """Stand in for the one module of megatron-core >= 0.18 that imports triton on the way to its pipeline schedules.

    It holds kernels of a mixture-of-experts feature that we do not use. A stand-in for `triton` itself would make
    torch's compiler believe that triton is there.
    """
    name = "megatron.core.transformer.moe.ops.paged_stash"
    if name in sys.modules or importlib.util.find_spec("triton") is not None:
        return
    module = types.ModuleType(name, "Kernels that need triton; absent here.")

    def absent(attribute: str) -> Any:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        return None

    module.__getattr__ = absent  # type: ignore[method-assign]
    sys.modules[name] = module


def _use_cpu_random_state() -> None:
    """Let megatron's activation checkpointing and random-state tracker keep the CPU generator's state.

    They ask for the state of the CUDA generator, which raises without CUDA; setting it would queue a callback that
    never runs.
    """
    random: Any = importlib.import_module("megatron.core.tensor_parallel.random")

    def get_state(*_: Any, **__: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(state: torch.Tensor, *_: Any, **__: Any) -> None:
        torch.set_rng_state(state)

    random._get_cuda_rng_state = get_state
    random._set_cuda_rng_state = set_state


@contextmanager
def cuda_seeding_on_cpu() -> Iterator[None]:
    """While open and without CUDA, torch.cuda's seed and state functions use the CPU generator; it is restored after.

    megatron's tracker makes its named states through those functions. Patching them for good would change torch.
    """
    if torch.cuda.is_available():
        yield
        return
    state = torch.get_rng_state()
    with mock.patch.multiple(torch.cuda, manual_seed=torch.manual_seed, get_rng_state=torch.get_rng_state):
        yield
    torch.set_rng_state(state)
