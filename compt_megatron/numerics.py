"""The precision that losses are computed in, and the one way rows are normalised."""

from __future__ import annotations

import torch

TINY_NORM = 1e-12  # rows of at most this length count as zero rows: their direction is rounding noise


def math_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """The dtype to compute a loss of `tensors` in: fp64 where one of them has it, else fp32 (never bf16 or fp16)."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def full_precision(device: torch.device) -> torch.autocast:
    """A context in which autocast is off, so that products of fp32 tensors are fp32 products."""
    return torch.autocast(device.type, enabled=False)


def unit_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale the rows (last dimension) of `x` to length 1, in x's own dtype.

    Returns (unit, live): unit [..., d]; live [..., 1] bool, false for zero rows (length at most TINY_NORM). A zero
    row comes out as zeros and its gradient is zero; plain x / |x| would give it gradients of 1e11 or NaN. A row with
    a NaN or an infinity stays live and comes out as NaN: a broken model must not look like an empty row.
    """
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    live = ~(norm <= TINY_NORM)
    unit = x / torch.where(live, norm, torch.ones_like(norm))
    return torch.where(live, unit, torch.zeros_like(unit)), live
