"""Makes megatron-core importable and correct on a machine without CUDA. Run before anything imports megatron.core.

Only what the models need is changed, and only inside megatron-core's own modules: torch and torch.cuda stay as they
are, so DeepSpeed and everything else in the process sees a plain CPU torch. With CUDA nothing is changed at all.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import sys
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from compt_megatron.models.transformer_engine import import_beside

_installed = False


def install() -> None:
    """Import megatron-core quietly and, where there is no CUDA, mend what its models touch. Idempotent."""
    global _installed
    if _installed:
        return
    with warnings.catch_warnings():
        # Transformer Engine and apex are optional and their absence is announced four times at import
        warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
        warnings.filterwarnings("ignore", message="Apex is not installed")
        # torch for CUDA warns of a compiler without a GPU when its extensions are imported
        logging.getLogger("torch.utils.cpp_extension").addFilter(_is_not_of_a_missing_gpu)
        import_beside("megatron.core", _import_megatron)
    if not torch.cuda.is_available():
        warnings.filterwarnings("ignore", message="When using async grad allreduce")  # advice about CUDA streams
        _use_cpu_random_state()
    _installed = True


def _is_not_of_a_missing_gpu(record: logging.LogRecord) -> bool:
    return "No CUDA runtime is found" not in record.getMessage()


def _import_megatron() -> None:
    if not torch.cuda.is_available():
        _skip_triton_import()
    importlib.import_module("megatron.core")
    importlib.import_module("megatron.core.models.backends")


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


# modules of megatron-core that ask torch for CUDA's current device, streams, or tensors on "cuda"
_ASK_FOR_CUDA = (
    "utils",
    "distributed.distributed_data_parallel",
    "distributed.param_and_grad_buffer",
    "optimizer.clip_grads",
    "optimizer.distrib_optimizer",
    "optimizer.optimizer",
    "pipeline_parallel.p2p_communication",
    "pipeline_parallel.schedules",
    "tensor_parallel.layers",
    "tensor_parallel.mappings",
)
_FACTORIES = ("empty", "full", "ones", "tensor", "zeros")


def use_cpu_in_training() -> None:
    """Let the parts of megatron-core that train, exchange and step find the CPU where they name CUDA. Idempotent.

    Each of those modules gets a `torch` of its own that answers differently to a few names; torch itself stays.
    """
    if torch.cuda.is_available():
        return
    for name in _ASK_FOR_CUDA:
        module: Any = importlib.import_module(f"megatron.core.{name}")
        if module.torch is torch:
            module.torch = _TorchOnCpu()


class _TorchOnCpu(types.ModuleType):
    """torch, where "cuda" means the CPU."""

    def __init__(self) -> None:
        super().__init__("torch")
        self.cuda = _CudaOnCpu()
        for name in _FACTORIES:
            setattr(self, name, _on_cpu(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


class _CudaOnCpu(types.ModuleType):
    """torch.cuda, whose device is the CPU and which has nothing to wait for."""

    def __init__(self) -> None:
        super().__init__("torch.cuda")

    def current_device(self) -> torch.device:
        return torch.device("cpu")

    def current_stream(self) -> None:
        pass  # megatron-core >= 0.18 lets it wait for the events of CUDA graphs, if there are any

    def synchronize(self, *_: Any, **__: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)


def _on_cpu(make: Any) -> Any:
    @functools.wraps(make)
    def made(*args: Any, **options: Any) -> Any:
        if str(options.get("device", "")).startswith("cuda"):
            options["device"] = "cpu"
        return make(*args, **options)

    return made


@contextmanager
def cuda_types_on_cpu() -> Iterator[None]:
    """While open and without CUDA, `Tensor.type()` spells CPU types as CUDA's, which megatron's optimizers look for."""
    if torch.cuda.is_available():
        yield
        return
    original: Any = torch.Tensor.type

    def spelled(self: torch.Tensor, *args: Any, **options: Any) -> Any:
        found = original(self, *args, **options)
        return found if args or options else found.replace("torch.", "torch.cuda.", 1)

    with mock.patch.object(torch.Tensor, "type", spelled):
        yield


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
