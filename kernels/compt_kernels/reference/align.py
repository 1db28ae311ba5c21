"""The alignment loss in plain PyTorch: the formulas, and what runs where the kernels do not."""

from __future__ import annotations

import torch
from torch.nn import functional as F

TINY_NORM = 1e-12  # rows of at most this length count as zero rows: their direction is rounding noise
LAYER_EPS = 1e-5  # of layer normalisation, as in torch


def align_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    norm: str = "l2",
    distance: str = "mse",
    row_weight: torch.Tensor | None = None,
    reduction: str = "mean",
    beta: float = 1.0,
) -> torch.Tensor:
    """`compt_kernels.align_loss` by autograd, in fp32, or in fp64 where one of the features is fp64."""
    if row_weight is not None:  # before any arithmetic: 0 * NaN is NaN, in the gradients too
        dead = row_weight.detach().unsqueeze(-1) == 0
        student, teacher = student.masked_fill(dead, 0.0), teacher.masked_fill(dead, 0.0)
    if weight is not None:
        student = F.linear(student, weight, bias)
    dtype = torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32
    with torch.autocast(student.device.type, enabled=False):
        x, y = student.to(dtype), teacher.detach().to(dtype)
        counts = x.new_ones(x.shape[:-1]) if row_weight is None else row_weight.detach().to(dtype)
        (x, x_live), (y, y_live) = normalised(x, norm, distance), normalised(y, norm, distance)
        live = (counts != 0) & x_live & y_live
        rows = counts * distances(x, y, distance, beta).masked_fill(~live, 0.0)
        if reduction == "none":
            return rows
        return rows.sum() if reduction == "sum" else rows.sum() / whole(counts)


def normalised(x: torch.Tensor, norm: str, distance: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [..., d] as they are compared, and [...] whether they count.

    `l2` scales to length 1, `layer` to mean 0 and variance 1 (Ba et al. 2016, without affine), `none` not at all;
    `cosine` looks at directions alone and so scales the row, centred under `layer`, to length 1. Rows of length 0
    (under `layer`: constant rows) do not count. A row with a NaN or an infinity does: a broken model must not look
    like an empty row.
    """
    if norm == "none" and distance != "cosine":
        return x, torch.ones_like(x[..., 0], dtype=torch.bool)
    if norm == "layer":
        x = x - x[..., :1].detach()  # so that a constant row is exactly constant
        x = x - x.mean(-1, keepdim=True)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    live = ~(length <= TINY_NORM)
    if norm == "layer" and distance != "cosine":
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + LAYER_EPS), live.squeeze(-1)
    unit = x / torch.where(live, length, torch.ones_like(length))
    return torch.where(live, unit, torch.zeros_like(unit)), live.squeeze(-1)


def distances(x: torch.Tensor, y: torch.Tensor, distance: str, beta: float) -> torch.Tensor:
    """One number a row, [..., d] -> [...]."""
    if distance == "smooth_l1":
        return F.smooth_l1_loss(x, y, reduction="none", beta=beta).mean(-1)
    squares = (x - y).square()
    # 1 - cos of unit vectors is half their squared distance; fp32 keeps 1 - x.y only to 13 % at a misfit of 1e-3
    return squares.mean(-1) if distance == "mse" else 0.5 * squares.sum(-1)


def whole(counts: torch.Tensor) -> torch.Tensor:
    """What a mean divides by: the sum of the weights, or 1 where there is none."""
    total = counts.sum()
    return torch.where(total > 0, total, torch.ones_like(total))


def part_totals(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Where features are split over ranks: the sums of student and teacher [..., d] over this rank's, fp64 [2, rows].

    This and the next three do what the passes of csrc/align_parts.cu do.
    """
    return torch.stack([x.flatten(0, -2).sum(-1, dtype=torch.float64) for x in (student, teacher)])


def part_squares(student: torch.Tensor, teacher: torch.Tensor, means: torch.Tensor | None) -> torch.Tensor:
    """The sums of squares around means [2, rows], fp64 [2, rows]; computed in the dtype of the means, else in fp32."""
    sides = []
    for side, x in enumerate((student, teacher)):
        x = x.flatten(0, -2)
        x = x.float() if means is None and x.dtype != torch.float64 else x
        x = x if means is None else x.to(means.dtype) - means[side].unsqueeze(-1)
        sides.append(x.square().sum(-1, dtype=torch.float64))
    return torch.stack(sides)


def part_distance(
    student: torch.Tensor, teacher: torch.Tensor, affine: torch.Tensor, distance: int, beta: float
) -> torch.Tensor:
    """The sums of loss, of slope times normalised student, and of slope, fp64 [3, rows]; affine: csrc/align.h."""
    x, error, slope = _part(student, teacher, affine, distance, beta)
    loss = error.square()
    if distance == 2:
        size = error.abs()
        loss = torch.where(size < beta, 0.5 * error * slope, size - 0.5 * beta)
    return torch.stack([v.sum(-1, dtype=torch.float64) for v in (loss, slope * x, slope)])


def part_gradient(
    student: torch.Tensor,
    teacher: torch.Tensor,
    affine: torch.Tensor,
    through: torch.Tensor,
    distance: int,
    beta: float,
) -> torch.Tensor:
    """This rank's part of the gradient [rows, d] in the student's dtype; through: csrc/align.h."""
    x, _, slope = _part(student, teacher, affine, distance, beta)
    factor, mean, along = through.unsqueeze(-1)
    return (factor * (slope - mean - along * x)).to(student.dtype)


def _part(
    student: torch.Tensor, teacher: torch.Tensor, affine: torch.Tensor, distance: int, beta: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normalised student, its difference from the teacher, and the slope of the distance there; 0 in dead rows."""
    s_mean, s_scale, t_mean, t_scale, live = affine.unsqueeze(-1)
    dead = live == 0
    x = ((student.flatten(0, -2).to(affine.dtype) - s_mean) * s_scale).masked_fill(dead, 0.0)
    y = ((teacher.flatten(0, -2).to(affine.dtype) - t_mean) * t_scale).masked_fill(dead, 0.0)
    error = x - y
    if distance != 2:
        return x, error, error
    return x, error, torch.where(error.abs() < beta, error / beta, error.sign()) if beta else error.sign()
