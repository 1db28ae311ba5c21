"""Which implementation runs: `impl` is auto, cuda, eager or emulated.

auto      the CUDA kernels where tensors, dtypes and machine allow, else the reference; says once which and why
cuda      the CUDA kernels, or an error that says why not
eager     the reference: plain PyTorch, any device, any float dtype
emulated  the CUDA kernels' own source run on the CPU, thread by thread: for tests, thousands of times slower
"""

from __future__ import annotations

import logging
from typing import Literal, get_args

import torch

from compt_kernels.build import BuildError, load_cuda, load_emulated

Impl = Literal["auto", "cuda", "eager", "emulated"]
KERNEL_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})

log = logging.getLogger("compt_kernels")
_said: set[tuple[str, str]] = set()


def use_kernels(op: str, impl: Impl, *tensors: torch.Tensor | None) -> bool:
    """Whether `op` runs its kernels (on CUDA or emulated) or its reference, for these float tensors.

    Raises ValueError where `impl` asks for kernels that these tensors cannot have, BuildError where the machine has no
    such kernels.
    """
    if impl not in get_args(Impl):
        raise ValueError(f"{op}: impl={impl!r}, expected one of {', '.join(get_args(Impl))}")
    present = [t for t in tensors if t is not None]
    devices = tuple(sorted({t.device.type for t in present}))
    dtypes = tuple(sorted({str(t.dtype).removeprefix("torch.") for t in present if t.dtype not in KERNEL_DTYPES}))
    return _decide(op, impl, devices, dtypes)


@torch.compiler.assume_constant_result
def _decide(op: str, impl: str, devices: tuple[str, ...], other_dtypes: tuple[str, ...]) -> bool:
    """Constant for torch.compile: it loads libraries and logs."""
    if impl == "eager":
        return False
    wanted = "cpu" if impl == "emulated" else "cuda"
    reason = ""
    if devices != (wanted,):
        reason = f"the tensors are on {' and '.join(devices)}, not on {wanted}"
    elif other_dtypes:
        reason = f"{' and '.join(other_dtypes)} is not float32, bfloat16 or float16"
    if reason:
        if impl != "auto":
            raise ValueError(f"{op}: impl={impl!r}, but {reason}")
        return _say(op, False, reason)
    try:
        load_emulated() if impl == "emulated" else load_cuda()
    except BuildError as error:
        if impl != "auto":
            raise
        return _say(op, False, str(error))
    return _say(op, True, f"impl={impl!r}")


def _say(op: str, kernels: bool, reason: str) -> bool:
    """Log a choice the first time it is made."""
    choice = f"{'CUDA kernels' if kernels else 'plain PyTorch'}: {reason}"
    if (op, choice) not in _said:
        _said.add((op, choice))
        log.info("%s runs as %s", op, choice)
    return kernels
