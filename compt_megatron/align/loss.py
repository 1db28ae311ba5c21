"""The alignment loss: the distance between a student's features and its teacher's. The formulas: docs/alignment.md."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch.nn import functional as F

from compt_megatron.numerics import full_precision, math_dtype, unit_rows

Distance = Literal["mse", "cosine", "smooth_l1"]
Norm = Literal["l2", "none"]
Reduction = Literal["mean", "sum"]


def align_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    *,
    distance: Distance = "mse",
    norm: Norm = "l2",
    weights: torch.Tensor | None = None,
    reduction: Reduction = "mean",
    beta: float = 1.0,
) -> torch.Tensor:
    """Reduce the distances of normalised rows to one number; the gradient goes to `student` only.

    student, teacher: [..., d] of any float dtypes (dense features are [b, tokens, d]); computed in fp32, or in fp64
    if one of them is fp64. `distance`: `mse`, the squared difference averaged over d; `smooth_l1`, Huber's (turning
    linear at `beta`) averaged over d; `cosine`, 1 - cos, not divided by d. `norm`: `l2` scales rows to length 1 first
    (`cosine` always does). `weights` [...] non-negative numbers or a bool mask, one a row. `reduction`: `sum`, of
    weight times distance; `mean`, that sum divided by the sum of the weights (the number of rows without weights).

    Rows of weight 0 contribute nothing whatever they hold, NaN included; so do, where rows are normalised, rows of
    which student or teacher is zero (they still count as rows in the mean). Nothing means a zero gradient too. No
    rows: 0.
    """
    assert student.shape == teacher.shape, f"student {tuple(student.shape)}, teacher {tuple(teacher.shape)}"
    assert distance in get_args(Distance), distance
    assert norm in get_args(Norm), norm
    assert reduction in get_args(Reduction), reduction
    dtype = math_dtype(student, teacher)
    with full_precision(student.device):
        x, y = student.to(dtype), teacher.detach().to(dtype)
        counts = weights.detach().to(dtype) if weights is not None else x.new_ones(x.shape[:-1])
        assert counts.shape == x.shape[:-1], f"weights {tuple(counts.shape)} for rows {tuple(x.shape[:-1])}"
        live = counts.unsqueeze(-1) != 0
        if weights is not None:  # before any arithmetic: 0 * NaN is NaN, in the gradient too
            x, y = x.masked_fill(~live, 0.0), y.masked_fill(~live, 0.0)
        if norm == "l2" or distance == "cosine":
            (x, x_live), (y, y_live) = unit_rows(x), unit_rows(y)
            live = live & x_live & y_live
        rows = _distance(x, y, distance, beta).masked_fill(~live.squeeze(-1), 0.0)
        summed = (counts * rows).sum()
        if reduction == "sum":
            return summed
        whole = counts.sum()
        return summed / torch.where(whole > 0, whole, torch.ones_like(whole))


def _distance(x: torch.Tensor, y: torch.Tensor, distance: Distance, beta: float) -> torch.Tensor:
    """One number a row, [..., d] -> [...]."""
    if distance == "smooth_l1":
        return F.smooth_l1_loss(x, y, reduction="none", beta=beta).mean(-1)
    squares = (x - y).square()
    # 1 - cos of unit vectors is half their squared distance; fp32 keeps 1 - x.y only to 13 % at a misfit of 1e-3
    return squares.mean(-1) if distance == "mse" else 0.5 * squares.sum(-1)
