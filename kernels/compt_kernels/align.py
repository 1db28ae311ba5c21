"""The alignment loss: the distance between a student's features and its teacher's."""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.distributed as dist

from compt_kernels import exchange
from compt_kernels.dispatch import Impl, use_kernels
from compt_kernels.ops import align as ops
from compt_kernels.ops import align_parallel as parallel
from compt_kernels.reference import align as reference

Norm = Literal["l2", "layer", "none"]
Distance = Literal["mse", "cosine", "smooth_l1"]
Reduction = Literal["mean", "sum", "none"]


def align_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    norm: Norm = "l2",
    distance: Distance = "mse",
    row_weight: torch.Tensor | None = None,
    reduction: Reduction = "mean",
    beta: float = 1.0,
    impl: Impl = "auto",
) -> torch.Tensor:
    """Reduce the distances of normalised rows to one number; 0-D fp32 (fp64 for fp64 features).

    student [..., d_s] and teacher [..., d_t] of float dtypes that may differ; the arithmetic is fp32's (fp64's where
    either is fp64). weight [d_t, d_s] and bias [d_t] project the student first; without them d_s = d_t. Both sides
    are normalised: `l2` to length 1, `layer` to mean 0 and variance 1 (no affine, eps 1e-5), `none` not at all;
    `cosine` scales to length 1 in any case, after centring under `layer`. `distance`: `mse` averages the squared
    difference over d_t; `smooth_l1` Huber's, linear from `beta` on, over beta; `cosine` is 1 - cos, not divided by
    d_t. `row_weight` [...]: non-negative numbers or a bool mask. `reduction`: `sum` of weight times distance; `mean`,
    that sum divided by the sum of the weights (the number of rows without weights); `none`, [...].

    Rows of weight 0 contribute nothing whatever they hold, NaN included; so do rows of which student or teacher has
    length 0 (under `layer`: is constant); those still count in the mean. Nothing means a zero gradient too. No rows,
    or no weight: 0. Gradients go to student, weight and bias; never to teacher or row_weight. They cannot be
    differentiated again with the kernels.

    `impl`: see `compt_kernels.dispatch`. Raises ValueError for shapes, dtypes and names that do not fit.
    """
    _check_names(norm, distance, reduction, beta)
    _check_shapes(student, teacher, weight, bias, row_weight)
    teacher = teacher.detach()
    if not use_kernels("align_loss", impl, student, teacher, weight, bias):
        settings = {"norm": norm, "distance": distance, "reduction": reduction, "beta": beta}
        return reference.align_loss(student, teacher, weight, bias, row_weight=row_weight, **settings)  # type: ignore[arg-type]
    if weight is not None:
        return ops.align_projected(student, teacher, weight, bias, row_weight, norm, distance, reduction, beta)
    return ops.align_rows(student, teacher, row_weight, norm, distance, reduction, beta)


def align_loss_parallel(
    student: torch.Tensor,
    teacher: torch.Tensor,
    group: dist.ProcessGroup | str | None,
    norm: Norm = "l2",
    distance: Distance = "mse",
    row_weight: torch.Tensor | None = None,
    reduction: Reduction = "mean",
    beta: float = 1.0,
    features: int | None = None,
    impl: Impl = "auto",
) -> torch.Tensor:
    """`align_loss` where the features are split over the ranks of `group`; every rank gets the whole loss.

    student, teacher [..., this rank's features]; rows, row_weight and settings are the same on all ranks. The gradient
    is that of this rank's features; each rank differentiates its own copy of the loss, nothing is to be summed.
    `features` over all ranks: world size times this rank's by default. Between the passes the ranks sum two numbers a
    row (their lengths; under `layer` two more, the means) and then three (distance and slopes), in fp64. A projection
    is not part of it: its weight is split as any column-parallel layer's.
    """
    _check_names(norm, distance, reduction, beta)
    _check_shapes(student, teacher, None, None, row_weight)
    name = exchange.group_name(group)
    features = features or student.shape[-1] * exchange.ranks(name)[1]
    plain = not use_kernels("align_loss_parallel", impl, student, teacher)
    settings = (norm, distance, reduction, beta, plain)
    return parallel.align_parallel(student, teacher.detach(), row_weight, name, features, *settings)


def _check_names(norm: str, distance: str, reduction: str, beta: float) -> None:
    for name, value, allowed in (
        ("norm", norm, get_args(Norm)),
        ("distance", distance, get_args(Distance)),
        ("reduction", reduction, get_args(Reduction)),
    ):
        if value not in allowed:
            raise ValueError(f"{name}={value!r}, expected one of {', '.join(allowed)}")
    if not beta >= 0:
        raise ValueError(f"beta={beta}, expected a number that is not negative")


def _check_shapes(
    student: torch.Tensor,
    teacher: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    row_weight: torch.Tensor | None,
) -> None:
    s, t = tuple(student.shape), tuple(teacher.shape)
    for name, tensor in (("student", student), ("teacher", teacher), ("weight", weight), ("bias", bias)):
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{name} must be of a float dtype, not {tensor.dtype}")
    if not s or not t or s[:-1] != t[:-1]:
        raise ValueError(f"student {s} and teacher {t} must have the same rows, [..., d]")
    if s[-1] == 0 or t[-1] == 0:
        raise ValueError(f"student {s} and teacher {t} need at least one feature")
    if weight is None:
        if bias is not None:
            raise ValueError("bias without weight")
        if s[-1] != t[-1]:
            raise ValueError(f"student {s} and teacher {t} differ in width: give weight [{t[-1]}, {s[-1]}]")
    elif tuple(weight.shape) != (t[-1], s[-1]):
        raise ValueError(f"weight {tuple(weight.shape)} must be {(t[-1], s[-1])} for student {s} and teacher {t}")
    if bias is not None and tuple(bias.shape) != (t[-1],):
        raise ValueError(f"bias {tuple(bias.shape)} must be {(t[-1],)} for teacher {t}")
    if row_weight is not None and tuple(row_weight.shape) != s[:-1]:
        raise ValueError(f"row_weight {tuple(row_weight.shape)} must be {s[:-1]}, one number a row of student {s}")
    for name, tensor in (("teacher", teacher), ("weight", weight), ("bias", bias), ("row_weight", row_weight)):
        if tensor is not None and tensor.device != student.device:
            raise ValueError(f"{name} is on {tensor.device}, student on {student.device}")
