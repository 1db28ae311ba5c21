"""The distance between a teacher's and a student's vocabulary distributions, from hidden states and heads."""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.distributed as dist

from compt_kernels import exchange
from compt_kernels.dispatch import Impl, use_kernels
from compt_kernels.ops.distill import MEMORY, distill_loss
from compt_kernels.products import common_dtype, sum_dtype
from compt_kernels.reference import distill as reference

Reduction = Literal["mean", "sum", "none"]


def distill_kl(
    student_hidden: torch.Tensor,
    student_head: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_head: torch.Tensor,
    temperature: float = 1.0,
    mask: torch.Tensor | None = None,
    top_k: int | None = None,
    reduction: Reduction = "mean",
    group: dist.ProcessGroup | str | None = None,
    impl: Impl = "auto",
) -> torch.Tensor:
    """KL(teacher || student) of softmax(hidden @ head.T / temperature), in fp32, without the factor temperature^2.

    Hidden states [..., h_s] and [..., h_t], heads [V, h_s] and [V, h_t], of any float dtypes. The student's hidden
    states and head get gradients where they require them; the teacher gets none. `mask` [...]: bool, or non-negative
    weights of the tokens; a token of weight 0 contributes nothing, whatever it holds, and its gradient is zero.
    `top_k`: the teacher's distribution is cut to the columns whose logit is at least its top_k-th largest and scaled
    to sum to 1; the student's stays whole. `reduction`: `mean`, the weighted mean over tokens (0 without any); `sum`;
    `none`, weight times KL of each token [...], whose backward multiplies all products once more.

    `group`: the heads are cut along the vocabulary over its ranks (in equal parts or not), hidden states are the same
    on all ranks. The loss and the gradient of the hidden states are then complete on every rank, the head's gradient
    is that of its part.

    Extra memory of the kernels: 2.5 GB at 8,192 tokens and 131,072 columns in bf16; `compt_kernels.ops.distill.plan`
    has the formula.
    """
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction={reduction!r}, expected one of {', '.join(get_args(Reduction))}")
    if temperature <= 0 or (top_k is not None and top_k < 1):
        raise ValueError(f"temperature={temperature} must be above 0 and top_k={top_k} at least 1")
    shape = student_hidden.shape[:-1]
    if teacher_hidden.shape[:-1] != shape or (mask is not None and mask.shape != shape):
        raise ValueError(f"student_hidden, teacher_hidden and mask must have the same tokens, not {tuple(shape)}, ...")
    if student_head.shape[0] != teacher_head.shape[0]:
        raise ValueError(f"heads of {student_head.shape[0]} and {teacher_head.shape[0]} columns")
    if mask is not None and mask.device != student_hidden.device:
        raise ValueError(f"student_hidden is on {student_hidden.device}, mask on {mask.device}")
    sums = sum_dtype(common_dtype(student_hidden, student_head, teacher_hidden, teacher_head))
    weight = student_hidden.new_ones(shape.numel(), dtype=sums)
    if mask is not None:
        weight = mask.detach().reshape(-1).to(sums)
    if reduction == "mean":
        whole = weight.sum()
        weight = weight / torch.where(whole > 0, whole, 1.0)
    tensors = (
        student_hidden.reshape(-1, student_hidden.shape[-1]),
        student_head,
        teacher_hidden.detach().reshape(-1, teacher_hidden.shape[-1]),
        teacher_head.detach(),
    )
    name, reduce = exchange.group_name(group), reduction != "none"
    if use_kernels("distill_kl", impl, *tensors):
        losses = distill_loss(
            *tensors,
            weight,
            temperature,
            top_k=top_k,
            masked=mask is not None,
            reduce=reduce,
            group=name,
            memory=MEMORY,
            plain=False,
        )
    else:
        losses = reference.distill_kl(*tensors, temperature, weight, top_k, name)
        losses = losses.sum() if reduce else losses
    return losses if reduce else losses.view(shape)
