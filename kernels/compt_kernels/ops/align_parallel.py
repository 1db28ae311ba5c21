"""The alignment loss where each rank holds a part of the features.

One operator holds the passes over the features and the collectives between them, which sum a few numbers a row;
`plain` runs the passes in PyTorch.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from compt_kernels import exchange
from compt_kernels.ops.align import DISTANCES, NORMS, REDUCTIONS, as_rows, flat, held_unit
from compt_kernels.ops.scale import refuse_second_derivative, scaled
from compt_kernels.reference import align as reference

_PAIR = "Tensor student, Tensor teacher"  # [outer, inner, this rank's features]
torch.library.define("compt_kernels::align_totals", f"({_PAIR}) -> Tensor")
torch.library.define("compt_kernels::align_squares", f"({_PAIR}, Tensor? means) -> Tensor")
torch.library.define("compt_kernels::align_distance", f"({_PAIR}, Tensor affine, int distance, float beta) -> Tensor")
torch.library.define(
    "compt_kernels::align_gradient", f"({_PAIR}, Tensor affine, Tensor through, int distance, float beta) -> Tensor"
)
# Returns loss, gradient [rows, d] and the factor it lacks, as align_rows does. group: the name of a process group.
torch.library.define(
    "compt_kernels::align_parallel",
    f"({_PAIR}, Tensor? row_weight, str group, int features, int norm, int distance, int reduction, float beta,"
    " bool with_gradient, bool plain) -> (Tensor, Tensor, Tensor)",
)


def _sums(numbers: int, student: torch.Tensor) -> torch.Tensor:
    return student.new_empty((numbers, student.shape[0] * student.shape[1]), dtype=torch.float64)


@torch.library.register_fake("compt_kernels::align_totals")
def _(student, teacher):  # type: ignore[no-untyped-def]
    return _sums(2, student)


@torch.library.register_fake("compt_kernels::align_squares")
def _(student, teacher, means):  # type: ignore[no-untyped-def]
    return _sums(2, student)


@torch.library.register_fake("compt_kernels::align_distance")
def _(student, teacher, affine, distance, beta):  # type: ignore[no-untyped-def]
    return _sums(3, student)


@torch.library.register_fake("compt_kernels::align_gradient")
def _(student, teacher, affine, through, distance, beta):  # type: ignore[no-untyped-def]
    return student.new_empty((student.shape[0] * student.shape[1], student.shape[2]))


@torch.library.register_fake("compt_kernels::align_parallel")
def _(student, teacher, row_weight, group, features, norm, distance, reduction, beta, with_gradient, plain):  # type: ignore[no-untyped-def]
    rows = student.shape[0] * student.shape[1]
    dtype = _math_dtype(student, teacher)
    loss = student.new_empty((rows,) if reduction == 0 else (), dtype=dtype)
    gradient = student.new_empty((rows if with_gradient else 0, student.shape[2]))
    return loss, gradient, student.new_empty((), dtype=dtype)


def align_parallel(
    student: torch.Tensor,
    teacher: torch.Tensor,
    row_weight: torch.Tensor | None,
    group: str,
    features: int,
    norm: str,
    distance: str,
    reduction: str,
    beta: float,
    plain: bool,
) -> torch.Tensor:
    """The loss of rows [..., d of this rank] of `features` features over the group, the same on every rank."""
    x, y = as_rows(student, teacher)
    settings = (group, features, NORMS[norm], DISTANCES[distance], REDUCTIONS[reduction], beta)
    row_weight = flat(row_weight)
    if torch.is_grad_enabled() and student.requires_grad:
        loss = _AlignParallel.apply(x, y, row_weight, *settings, plain)
    else:
        loss = torch.ops.compt_kernels.align_parallel(x, y, row_weight, *settings, False, plain)[0]
    return loss.view(student.shape[:-1]) if reduction == "none" else loss


class _AlignParallel(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, student: torch.Tensor, teacher: torch.Tensor, row_weight: torch.Tensor | None, *rest: Any
    ) -> torch.Tensor:
        *settings, plain = rest
        op = torch.ops.compt_kernels.align_parallel
        loss, gradient, unit = op(student, teacher, row_weight, *settings, True, plain)
        ctx.save_for_backward(gradient, unit)
        ctx.shape, ctx.plain = student.shape, plain
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> Any:  # type: ignore[override]
        refuse_second_derivative("align_loss_parallel")
        gradient, unit = ctx.saved_tensors
        unit = held_unit(gradient, unit)
        if ctx.plain:
            upstream = upstream if unit is None else upstream * unit
            return (gradient * upstream.unsqueeze(-1)).to(gradient.dtype).view(ctx.shape), *(None,) * 9
        return scaled(gradient, upstream, unit).view(ctx.shape), *(None,) * 9


def _align_parallel(
    student: torch.Tensor,
    teacher: torch.Tensor,
    row_weight: torch.Tensor | None,
    group: str,
    features: int,
    norm: int,
    distance: int,
    reduction: int,
    beta: float,
    with_gradient: bool,
    plain: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The operator `align_parallel`. Numbers a row are fp64: they are few, and the passes' own sums stay exact."""
    passes: Any = torch.ops.compt_kernels
    totals, squares_of = (
        (reference.part_totals, reference.part_squares) if plain else (passes.align_totals, passes.align_squares)
    )
    distance_of = reference.part_distance if plain else passes.align_distance
    gradient_of = reference.part_gradient if plain else passes.align_gradient
    dtype = _math_dtype(student, teacher)
    rows = student.shape[0] * student.shape[1]
    counts = torch.ones(rows, dtype=torch.float64, device=student.device)
    if row_weight is not None:
        counts = row_weight.double()

    means = torch.zeros((2, rows), dtype=torch.float64, device=student.device)
    if norm == NORMS["layer"]:
        means = exchange.all_sum_(totals(student, teacher), group) / features
    scales, live = torch.ones_like(means), counts != 0
    if norm != NORMS["none"] or distance == DISTANCES["cosine"]:
        squares = squares_of(student, teacher, means.to(dtype) if norm == NORMS["layer"] else None)
        squares = exchange.all_sum_(squares, group)
        some = ~(squares.sqrt() <= reference.TINY_NORM)
        live = live & some.all(0)
        if norm == NORMS["layer"] and distance != DISTANCES["cosine"]:
            squares = squares / features + reference.LAYER_EPS
        scales = torch.where(some, squares, torch.ones_like(squares)).rsqrt()
    affine = torch.stack([means[0], scales[0], means[1], scales[1], live.double()]).to(dtype)

    sums = exchange.all_sum_(distance_of(student, teacher, affine, distance, beta), group)
    constant = 0.5 if distance == DISTANCES["cosine"] else 1 / features
    losses = torch.where(live, counts * constant * sums[0], torch.zeros_like(counts))
    divisor = reference.whole(counts) if reduction == REDUCTIONS["mean"] else torch.ones_like(losses.sum())
    loss = (losses if reduction == REDUCTIONS["none"] else losses.sum() / divisor).to(dtype)

    unit = torch.ones_like(divisor)
    if not with_gradient:
        return loss, student.new_empty((0, student.shape[2])), unit.to(dtype)
    constant = {"mse": 2 / features, "cosine": 1.0, "smooth_l1": 1 / features}[_name(DISTANCES, distance)]
    factor = counts * constant / divisor
    if student.dtype == torch.float16:  # held_unit
        unit_rows = norm == NORMS["l2"] or distance == DISTANCES["cosine"]
        spread = max(math.frexp(features)[1] - 4, 0) if unit_rows else 0
        unit = torch.exp2(torch.floor(torch.log2(constant / divisor)) - spread)
        factor = factor / unit
    centred = norm == NORMS["layer"]
    along = torch.zeros_like(counts)
    if norm == NORMS["l2"] or distance == DISTANCES["cosine"]:
        along = sums[1]
    elif centred:
        along = sums[1] / features
    mean = sums[2] / features if centred else torch.zeros_like(counts)
    through = torch.stack([factor * scales[0], mean, along])
    through = torch.where(live, through, torch.zeros_like(through)).to(dtype)
    return loss, gradient_of(student, teacher, affine, through, distance, beta), unit.to(dtype)


torch.library.impl("compt_kernels::align_parallel", ("CPU", "CUDA"), _align_parallel)


def _name(names: dict[str, int], number: int) -> str:
    return next(name for name, value in names.items() if value == number)


def _math_dtype(*tensors: torch.Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
