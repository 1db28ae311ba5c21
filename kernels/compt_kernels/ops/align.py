"""The alignment loss by its row kernels: schemas, fakes, autograd. Gradients are computed in the forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from compt_kernels.ops.scale import refuse_second_derivative, scaled
from compt_kernels.products import add_product_

NORMS = {"none": 0, "l2": 1, "layer": 2}
DISTANCES = {"mse": 0, "cosine": 1, "smooth_l1": 2}
REDUCTIONS = {"none": 0, "sum": 1, "mean": 2}
CHUNK_BYTES = 128 << 20  # of projected features: enough rows for full matrix rate and few passes over dW

_SETTINGS = "int norm, int distance, int reduction, float beta"
# student, teacher [outer, inner, d]; row_weight [rows]; denominator: one number. Returns the loss, the gradient
# [rows, d] (no rows where it is not wanted), and one number that the gradient lacks as a factor (fp16; else 1).
torch.library.define(
    "compt_kernels::align_rows",
    f"(Tensor student, Tensor teacher, Tensor? row_weight, Tensor? denominator, {_SETTINGS}, bool with_gradient)"
    " -> (Tensor, Tensor, Tensor)",
)
# Returns the loss, the gradients of student [rows, d_s], weight and bias (both fp32), and the missing factor.
torch.library.define(
    "compt_kernels::align_projected",
    f"(Tensor student, Tensor teacher, Tensor weight, Tensor? bias, Tensor? row_weight, {_SETTINGS}, ScalarType dtype,"
    " int chunk_rows, bool student_gradient, bool weight_gradient) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@torch.library.register_fake("compt_kernels::align_rows")
def _(student, teacher, row_weight, denominator, norm, distance, reduction, beta, with_gradient):  # type: ignore[no-untyped-def]
    rows = student.shape[0] * student.shape[1]
    loss = student.new_empty((rows,) if reduction == 0 else (), dtype=torch.float32)
    gradient = student.new_empty((rows if with_gradient else 0, student.shape[2]))
    return loss, gradient, student.new_empty((), dtype=torch.float32)


@torch.library.register_fake("compt_kernels::align_projected")
def _(student, teacher, weight, bias, row_weight, norm, distance, reduction, beta, dtype, chunk_rows, dx, dw):  # type: ignore[no-untyped-def]
    number = student.new_empty((), dtype=torch.float32)
    rows = student.shape[0] * student.shape[1] if dx else 0
    d_weight = student.new_empty(weight.shape if dw else (0, 0), dtype=torch.float32)
    d_bias = student.new_empty(weight.shape[0] if dw else 0, dtype=torch.float32)
    return number, student.new_empty((rows, student.shape[2])), d_weight, d_bias, torch.empty_like(number)


def align_rows(
    student: torch.Tensor,
    teacher: torch.Tensor,
    row_weight: torch.Tensor | None,
    norm: str,
    distance: str,
    reduction: str,
    beta: float,
) -> torch.Tensor:
    """The loss of rows [..., d], one number or [...]; row_weight [...]."""
    x, y = as_rows(student, teacher)
    settings = (NORMS[norm], DISTANCES[distance], REDUCTIONS[reduction], beta)
    row_weight = flat(row_weight)
    if torch.is_grad_enabled() and student.requires_grad:
        loss = _AlignRows.apply(x, y, row_weight, *settings)
    else:
        loss = torch.ops.compt_kernels.align_rows(x, y, row_weight, None, *settings, False)[0]
    return loss.view(student.shape[:-1]) if reduction == "none" else loss


def align_projected(
    student: torch.Tensor,
    teacher: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    row_weight: torch.Tensor | None,
    norm: str,
    distance: str,
    reduction: str,
    beta: float,
    chunk_rows: int | None = None,
) -> torch.Tensor:
    """As `align_rows` for student @ weight.T + bias, which exists only for `chunk_rows` rows at a time.

    The products are taken in the student's dtype, or in autocast's; rows of weight 0 do not enter them. Losses of
    single rows (`reduction="none"`) cannot have the weight's gradient before the upstream gradient of each row is
    known: those keep all projected features, in the products' dtype.
    """
    dtype = _product_dtype(student, weight, bias)
    if reduction == "none":
        if row_weight is not None:
            student = student.masked_fill(row_weight.unsqueeze(-1) == 0, 0.0)
        with torch.autocast(student.device.type, enabled=False):
            cast = None if bias is None else bias.to(dtype)
            projected = torch.nn.functional.linear(student.to(dtype), weight.to(dtype), cast)
        return align_rows(projected, teacher, row_weight, norm, distance, reduction, beta)
    x, y = as_rows(student, teacher)
    chunk_rows = chunk_rows or max(1, CHUNK_BYTES // (weight.shape[0] * dtype.itemsize))
    settings = (NORMS[norm], DISTANCES[distance], REDUCTIONS[reduction], beta, dtype, chunk_rows)
    grad = torch.is_grad_enabled()
    wants = (
        grad and student.requires_grad,
        grad and (weight.requires_grad or (bias is not None and bias.requires_grad)),
    )
    row_weight = flat(row_weight)
    if any(wants):
        return _AlignProjected.apply(x, y, weight, bias, row_weight, *settings, *wants)
    return torch.ops.compt_kernels.align_projected(x, y, weight, bias, row_weight, *settings, False, False)[0]


class _AlignRows(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, student: torch.Tensor, teacher: torch.Tensor, row_weight: torch.Tensor | None, *settings: Any
    ) -> torch.Tensor:
        op = torch.ops.compt_kernels.align_rows
        loss, gradient, unit = op(student, teacher, row_weight, None, *settings, True)
        ctx.save_for_backward(gradient, unit)
        ctx.shape = student.shape
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> Any:  # type: ignore[override]
        refuse_second_derivative("align_loss")
        gradient, unit = ctx.saved_tensors
        return scaled(gradient, upstream, held_unit(gradient, unit)).view(ctx.shape), *(None,) * 6


class _AlignProjected(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, student: torch.Tensor, teacher: torch.Tensor, weight: torch.Tensor, bias: Any, *rest: Any
    ) -> torch.Tensor:
        loss, *gradients = torch.ops.compt_kernels.align_projected(student, teacher, weight, bias, *rest)
        ctx.save_for_backward(*gradients)
        ctx.shape, ctx.weight_dtype, ctx.bias_dtype = student.shape, weight.dtype, None if bias is None else bias.dtype
        ctx.wants = rest[-2:]
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> Any:  # type: ignore[override]
        refuse_second_derivative("align_loss")
        d_student, d_weight, d_bias, unit = ctx.saved_tensors
        wants_student, wants_weight = ctx.wants
        grads: list[torch.Tensor | None] = [None] * 13
        if wants_student:
            grads[0] = scaled(d_student, upstream, held_unit(d_student, unit)).view(ctx.shape)
        if wants_weight:
            grads[2] = (d_weight * upstream).to(ctx.weight_dtype)
            grads[3] = None if ctx.bias_dtype is None else (d_bias * upstream).to(ctx.bias_dtype)
        return tuple(grads)


def held_unit(gradient: torch.Tensor, unit: torch.Tensor) -> torch.Tensor | None:
    """fp16 gradients are held times a power of two: those of a mean would fall below fp16's range."""
    return unit if gradient.dtype == torch.float16 else None


def _project(
    student: torch.Tensor,
    teacher: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    row_weight: torch.Tensor | None,
    norm: int,
    distance: int,
    reduction: int,
    beta: float,
    dtype: torch.dtype,
    chunk_rows: int,
    student_gradient: bool,
    weight_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The operator `align_projected`: matrix products of a chunk of rows around the row kernel, sums in fp32."""
    outer, inner, width = student.shape
    rows, d_teacher = outer * inner, weight.shape[0]
    fp32: dict[str, Any] = {"dtype": torch.float32, "device": student.device}
    loss = torch.zeros((), dtype=torch.float64, device=student.device)
    d_student = student.new_empty((rows if student_gradient else 0, width))
    d_weight = torch.zeros(weight.shape if weight_gradient else (0, 0), **fp32)
    d_bias = torch.zeros(d_teacher if weight_gradient else 0, **fp32)
    unit = torch.ones((), **fp32)
    denominator = None
    if reduction == REDUCTIONS["mean"]:
        denominator = (
            torch.full((), rows, **fp32) if row_weight is None else row_weight.sum(dtype=torch.float64).float()
        )
    with_gradient = student_gradient or weight_gradient
    with torch.autocast(student.device.type, enabled=False):
        factor = weight.to(dtype)
        offset = None if bias is None else bias.to(dtype)
        for start, o, i in _chunks(outer, inner, chunk_rows):
            x, y = student[o, i], teacher[o, i]
            size = x.shape[0] * x.shape[1]
            here = slice(start, start + size)
            counts = None if row_weight is None else row_weight[here]
            s = x.reshape(size, width).to(dtype)
            if counts is not None:
                s = s.masked_fill(counts.unsqueeze(-1) == 0, 0.0)  # 0 * NaN is NaN
            projected = torch.mm(s, factor.T) if offset is None else torch.addmm(offset, s, factor.T)
            part, gradient, unit = torch.ops.compt_kernels.align_rows(
                projected.view(*x.shape[:2], d_teacher), y, counts, denominator, norm, distance, reduction, beta,
                with_gradient,
            )  # fmt: skip
            loss += part
            if student_gradient:
                if d_student.dtype == dtype:
                    torch.mm(gradient, factor, out=d_student[here])
                else:
                    d_student[here] = torch.mm(gradient, factor)
            if weight_gradient:
                add_product_(d_weight, gradient.T, s)
                d_bias += gradient.sum(0, dtype=torch.float32)
    if dtype == torch.float16:
        d_weight *= unit
        d_bias *= unit
        if d_student.dtype != dtype:
            d_student *= unit
    return loss.float(), d_student, d_weight, d_bias, unit


torch.library.impl("compt_kernels::align_projected", ("CPU", "CUDA"), _project)


def _chunks(outer: int, inner: int, rows: int) -> Iterator[tuple[int, slice, slice]]:
    """(first row, outer, inner): slices that cover outer x inner in order, of about `rows` rows each."""
    if inner and inner <= rows:
        step = rows // inner
        for o in range(0, outer, step):
            yield o * inner, slice(o, o + step), slice(None)
    else:
        for o in range(outer):
            for i in range(0, inner, rows):
                yield o * inner + i, slice(o, o + 1), slice(i, i + rows)


def as_rows(student: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both as [outer, inner, d], without a copy wherever two strides can say where the rows lie."""
    if student.ndim == 1:
        return student.view(1, 1, -1), teacher.view(1, 1, -1)
    if student.ndim == 2:
        return student.unsqueeze(0), teacher.unsqueeze(0)
    if student.ndim > 3:
        return as_rows(student.flatten(0, -3), teacher.flatten(0, -3))
    if _one_stride(student) and _one_stride(teacher):
        return student.flatten(0, 1).unsqueeze(0), teacher.flatten(0, 1).unsqueeze(0)
    return student, teacher


def _one_stride(x: torch.Tensor) -> bool:
    return x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1)


def flat(row_weight: torch.Tensor | None) -> torch.Tensor | None:
    """[rows], contiguous, of a dtype that the kernels read."""
    if row_weight is None:
        return None
    if row_weight.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.bool):
        row_weight = row_weight.float()
    return row_weight.detach().reshape(-1).contiguous()


def _product_dtype(student: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.dtype:
    device = student.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != student.dtype:
            raise ValueError(f"{name} is {tensor.dtype}, student {student.dtype}: cast one, or use autocast")
    return student.dtype
