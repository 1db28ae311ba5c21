"""KL between a teacher's and a student's vocabulary distributions, from hidden states and heads, in chunks of tokens.

A chunk's logits of student and teacher are multiplied out in fp32, two kernels read them (the sums of the softmaxes;
then loss and logit gradient, in one pass), and they are overwritten by the next chunk's. The gradient is made in the
forward: the logit gradients of many chunks, 16-bit, are kept until one product each gives those of hidden states and
head. Where all tokens' fit, the head's gradient is one product, summed inside it in fp32; else it is summed in fp32
over as few products as the memory allows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from compt_kernels import exchange
from compt_kernels.ops.distill_rows import distill_rows
from compt_kernels.ops.scale import refuse_second_derivative, scaled, wanted_only
from compt_kernels.products import add_product_, aligned, common_dtype, product_, sum_dtype
from compt_kernels.reference.distill import kth_largest

MEMORY = 2_420_000_000  # bytes beyond the results, where that is enough
FP16_GAIN = 2.0**14  # fp16 would lose logit gradients below 6e-5

torch.library.define(
    "compt_kernels::distill",
    "(Tensor student_hidden, Tensor student_head, Tensor teacher_hidden, Tensor teacher_head, Tensor weight, "
    "float temperature, int? top_k, bool masked, str group, int memory, bool plain, bool hidden_gradient, "
    "bool head_gradient) "
    "-> (Tensor rows, Tensor d_hidden, Tensor d_head)",
)


class Plan(NamedTuple):
    """How many tokens a chunk of logits has, and how many tokens' logit gradients are kept for one product."""

    chunk: int
    kept: int


def plan(tokens: int, vocabulary: int, hidden: int, dtype: torch.dtype, head_gradient: bool, memory: int) -> Plan:
    """Chunks that keep within `memory` bytes, or 256 tokens a chunk and 1024 kept where nothing does.

    Bytes: 8 per logit of a chunk (student and teacher); 2 per kept 16-bit logit gradient. In fp32 the student's logits
    become their gradient: 4 per logit of a chunk and 4 per kept. If the head's 16-bit gradient is not made by one
    product: 4 per weight.
    """
    wide = dtype.itemsize >= 4
    logit, gradient = (4, 4) if wide else (8, 2)
    logit, gradient = logit * vocabulary, gradient * vocabulary
    if not head_gradient:
        chunk = _within(memory // (logit + gradient), tokens, 128, 1024)
        return Plan(chunk, chunk)
    if dtype == torch.bfloat16 and tokens * gradient + 128 * logit <= memory:
        return Plan(_within((memory - tokens * gradient) // logit, tokens, 128, 1024), tokens)
    left = memory - (0 if wide else 4 * vocabulary * hidden)
    kept = _within((left - 256 * logit) // gradient, tokens, 1024, tokens)
    return Plan(_within((left - kept * gradient) // logit, kept, 256, 1024), kept)


def _within(count: int, tokens: int, least: int, most: int) -> int:
    """A multiple of 128 near `count`, between `least` and `most`, but not more than there are tokens."""
    return max(1, min(tokens, max(least, min(most, count // 128 * 128))))


class _Mean(torch.autograd.Function):
    """sum_i weight_i KL_i; its gradient is computed in the forward."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        student_hidden: torch.Tensor,
        student_head: torch.Tensor,
        teacher_hidden: torch.Tensor,
        teacher_head: torch.Tensor,
        weight: torch.Tensor,
        temperature: float,
        top_k: int | None,
        masked: bool,
        group: str,
        memory: int,
        plain: bool,
        hidden_gradient: bool,
        head_gradient: bool,
    ) -> torch.Tensor:
        rows, d_hidden, d_head = torch.ops.compt_kernels.distill(
            *(student_hidden, student_head, teacher_hidden, teacher_head, weight, temperature, top_k),
            *(masked, group, memory, plain, hidden_gradient, head_gradient),
        )
        ctx.save_for_backward(d_hidden, d_head)
        ctx.plain, ctx.wanted = plain, (hidden_gradient, head_gradient)
        ctx.dtypes = (student_hidden.dtype, student_head.dtype)
        return torch.where(weight != 0, weight * rows, 0.0).sum()

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        refuse_second_derivative("distill_kl")
        found: list[torch.Tensor | None] = []
        for gradient, dtype, want in zip(ctx.saved_tensors, ctx.dtypes, ctx.wanted):
            if not want:
                found.append(None)
            elif ctx.plain or gradient.dtype != dtype:
                found.append((gradient * upstream).to(dtype))
            else:
                found.append(scaled(gradient, upstream))
        return *found, *(None,) * 11


class _Rows(torch.autograd.Function):
    """weight_i KL_i [N]; the backward multiplies everything out again, with the upstream gradient as weights."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        student_hidden: torch.Tensor,
        student_head: torch.Tensor,
        teacher_hidden: torch.Tensor,
        teacher_head: torch.Tensor,
        weight: torch.Tensor,
        *options: Any,
    ) -> torch.Tensor:
        ctx.options, ctx.wanted = options[:-2], options[-2:]
        rows, _, _ = torch.ops.compt_kernels.distill(
            student_hidden, student_head, teacher_hidden, teacher_head, weight, *ctx.options, False, False
        )
        ctx.save_for_backward(student_hidden, student_head, teacher_hidden, teacher_head, weight)
        return torch.where(weight != 0, weight * rows, 0.0)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        refuse_second_derivative("distill_kl")
        *inputs, weight = ctx.saved_tensors
        weight = torch.where(weight != 0, weight * upstream, 0.0)
        _, *gradients = torch.ops.compt_kernels.distill(*inputs, weight, *ctx.options, *ctx.wanted)
        return *wanted_only(gradients, [x.dtype for x in inputs], ctx.wanted), *(None,) * 11


def distill_loss(
    student_hidden: torch.Tensor,
    student_head: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_head: torch.Tensor,
    weight: torch.Tensor,
    temperature: float,
    top_k: int | None,
    masked: bool,
    reduce: bool,
    group: str,
    memory: int,
    plain: bool,
) -> torch.Tensor:
    """The sum of weight [N] times KL, or with `reduce` false its terms [N]; by the kernels or their plain form."""
    wanted = [torch.is_grad_enabled() and x.requires_grad for x in (student_hidden, student_head)]
    function = _Mean if reduce or not any(wanted) else _Rows
    losses = function.apply(
        *(student_hidden, student_head, teacher_hidden, teacher_head, weight),
        *(temperature, top_k, masked, group, memory, plain, *wanted),
    )
    return losses


def _distill(
    student_hidden: torch.Tensor,
    student_head: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_head: torch.Tensor,
    weight: torch.Tensor,
    temperature: float,
    top_k: int | None,
    masked: bool,
    group: str,
    memory: int,
    plain: bool,
    hidden_gradient: bool,
    head_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """KL of each row [N] (0 where the weight is 0), and the gradient of sum_i weight_i KL_i for hidden and head.

    Gradients are in the dtype of the products, but of fp16 in fp32: a mean over many tokens would vanish in it.
    """
    sums = sum_dtype(common_dtype(student_hidden, student_head, teacher_hidden, teacher_head))
    dtype, teachers = common_dtype(student_hidden, student_head), common_dtype(teacher_hidden, teacher_head)
    if sums == torch.float64:
        dtype = teachers = sums
    hidden, head = student_hidden.to(dtype), student_head.to(dtype)
    teacher_hidden, teacher_head = teacher_hidden.to(teachers), teacher_head.to(teachers)
    (tokens, width), vocabulary = hidden.shape, head.shape[0]
    wide, half, wanted = dtype == sums, dtype == torch.float16, hidden_gradient or head_gradient
    chunk, kept = plan(tokens, vocabulary, width, dtype, head_gradient, memory)
    kernels = distill_rows(plain)

    peak = weight.abs().amax() if half and tokens else weight.new_ones(())
    factor = torch.where(peak > 0, peak, 1.0) / FP16_GAIN if half else None
    slope_weight = (weight if factor is None else weight / factor) / temperature
    if masked and head_gradient:  # 0 * NaN is NaN, in the head's gradient too
        hidden = torch.where(weight[:, None] != 0, hidden, 0.0)

    held = sums if half else dtype
    rows = weight.new_zeros(tokens)
    d_hidden = hidden.new_empty(hidden.shape if hidden_gradient else 0, dtype=held)
    one_product = 0 < tokens <= kept
    start_head = head.new_empty if one_product else head.new_zeros
    d_head = start_head(head.shape if head_gradient else 0, dtype=held if one_product else sums)
    slopes = aligned(kept if wanted else 0, vocabulary, head, dtype)
    student_logits = None if wide and wanted else aligned(chunk, vocabulary, head, sums)
    teacher_logits = aligned(chunk, vocabulary, head, sums)
    with torch.autocast(student_hidden.device.type, enabled=False):
        for start in range(0, tokens, kept):
            stop = min(start + kept, tokens)
            for low in range(start, stop, chunk):
                high = min(low + chunk, stop)
                out = slopes[low - start : high - start] if wanted else None
                student = (
                    student_logits[: high - low] if student_logits is not None else slopes[low - start : high - start]
                )
                teacher = teacher_logits[: high - low]
                product_(student, hidden[low:high], head.T)
                product_(teacher, teacher_hidden[low:high], teacher_head.T)
                bound = kth_largest(teacher, top_k, group)
                statistics = kernels.distill_statistics(student, teacher, bound, temperature)
                if group:
                    _merge_over_ranks(statistics, group)
                rows[low:high] = kernels.distill_gradient_(
                    *(student, teacher, statistics, slope_weight[low:high], bound, temperature),
                    *(None if wide else out, wanted),
                )
            slope = slopes[: stop - start]
            if hidden_gradient and held == dtype and not group:
                product_(d_hidden[start:stop], slope, head)
            elif hidden_gradient:
                part = product_(hidden.new_empty((stop - start, width), dtype=sums), slope, head)
                d_hidden[start:stop] = exchange.all_sum_(part, group)
            if head_gradient and one_product:
                product_(d_head, slope.T, hidden)
            elif head_gradient:
                add_product_(d_head, slope.T, hidden[start:stop])
        exchange.all_sum_(rows, group)
        if factor is not None:
            d_hidden.mul_(factor), d_head.mul_(factor)
    return rows, d_hidden, d_head.to(held)


def _merge_over_ranks(statistics: torch.Tensor, group: str) -> None:
    """Complete the softmaxes' maxima and sums [4, r], of which each rank has seen its own columns."""
    highest = exchange.all_max_(statistics[0::2].contiguous(), group)
    powers = statistics[1::2] * torch.exp(statistics[0::2] - highest)
    statistics[0::2], statistics[1::2] = highest, exchange.all_sum_(powers, group)


torch.library.impl("compt_kernels::distill", "default", _distill)


@torch.library.register_fake("compt_kernels::distill")
def _(  # type: ignore[no-untyped-def]
    student_hidden,
    student_head,
    teacher_hidden,
    teacher_head,
    weight,
    temperature,
    top_k,
    masked,
    group,
    memory,
    plain,
    hidden_gradient,
    head_gradient,
):
    sums = sum_dtype(common_dtype(student_hidden, student_head, teacher_hidden, teacher_head))
    dtype = common_dtype(student_hidden, student_head)
    held = sums if dtype == torch.float16 or sums == torch.float64 else dtype
    return (
        weight.new_empty(weight.shape),
        student_hidden.new_empty(student_hidden.shape if hidden_gradient else 0, dtype=held),
        student_head.new_empty(student_head.shape if head_gradient else 0, dtype=held),
    )
