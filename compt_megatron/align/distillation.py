"""The distillation term of a language model's step: its predictions drawn to the frozen predecessor's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from compt_kernels.dispatch import use_kernels
from compt_kernels.distill import distill_kl
from compt_megatron.align.schedule import Schedule, WeightSchedule
from compt_megatron.errors import UserError
from compt_megatron.numerics import math_dtype
from compt_megatron.share import CountedRows, ObjectiveResult
from compt_megatron.vocabulary import Head


class Distillation:
    """weight(step) * temperature² * KL(teacher || student), the mean over the tokens that count, in nats.

    The factor temperature² keeps the gradient's size when the temperature changes (Hinton et al., arXiv 1503.02531,
    section 2.1). top_k: the teacher's distribution is cut to its largest logits and scaled to sum to 1. chunk: tokens
    whose logits exist at once where the kernels, which have a bound of their own, do not run. schedule, end_step: see
    `align.schedule.WeightSchedule`. Raises UserError for a setting that is none.
    """

    def __init__(
        self,
        weight: float = 1.0,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        schedule: Schedule = "constant",
        end_step: int | None = None,
        chunk: int = 1024,
    ) -> None:
        self._weight = WeightSchedule(weight, schedule, end_step, section="distill")
        if not temperature > 0.0:
            raise UserError(f"distill.temperature is {temperature}; use a positive number")
        if top_k is not None and top_k < 1:
            raise UserError(f"distill.top_k is {top_k}; use a positive number, or leave it out")
        self.temperature, self.top_k, self.chunk = temperature, top_k, chunk

    def weight_at(self, step: int, total_steps: int) -> float:
        """The weight in step `step` (from 0). 0 from the end step on: the teacher need not run then."""
        return self._weight.at(step, total_steps)

    def __call__(
        self,
        outputs: dict[str, Any],
        teacher_hidden: Tensor,
        teacher_head: Tensor,
        counted: CountedRows,
        step: int,
        total_steps: int,
    ) -> ObjectiveResult:
        """This rank's share of the term.

        outputs: the student's `hidden` [b, n, width] and `head`. teacher_hidden [b, n, its width] of the same tokens;
        teacher_head [rows, its width]: the teacher's for the same vocabulary entries as the student's head has here.
        counted: weights [b, n]. parts: `distill`, and distill/kl without weight and temperature².
        """
        kl = self._summed(
            outputs["hidden"].flatten(0, -2),
            outputs["head"],
            teacher_hidden.flatten(0, -2),
            teacher_head,
            counted.weights.flatten(),
        )
        kl = kl / counted.total
        loss = self.weight_at(step, total_steps) * self.temperature**2 * kl
        return ObjectiveResult(loss, {"distill": loss.detach(), "distill/kl": kl.detach()})

    def _summed(
        self, hidden: Tensor, head: Head, teacher_hidden: Tensor, teacher_head: Tensor, weights: Tensor
    ) -> Tensor:
        """The sum over tokens of weight times KL."""
        weight = head.weight[: head.rows]
        assert len(teacher_head) == head.rows, "the teacher's head is of other vocabulary entries"
        chunk = self.chunk
        if use_kernels("distill_kl", "auto", hidden, weight, teacher_hidden, teacher_head):
            chunk = len(hidden)
        wanted = torch.is_grad_enabled()
        found: Tensor = _ChunkedKl.apply(
            hidden, weight, teacher_hidden, teacher_head, weights, self.temperature, self.top_k, head.group, chunk,
            wanted,
        )  # fmt: skip
        return found


class _ChunkedKl(torch.autograd.Function):
    """The sum over chunks of tokens; each chunk's gradients are made while its logits are there."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_head: Tensor, weights: Tensor,
        temperature: float, top_k: int | None, group: Any, chunk: int, wanted: bool,
    ) -> Tensor:  # fmt: skip
        total = torch.zeros((), dtype=math_dtype(hidden, weight), device=hidden.device)
        to_hidden = torch.empty_like(hidden) if wanted else None
        to_weight = torch.zeros_like(weight, dtype=total.dtype) if wanted else None  # summed over chunks: not in bf16
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            with torch.set_grad_enabled(wanted):
                student, head = hidden[rows].detach().requires_grad_(wanted), weight.detach().requires_grad_(wanted)
                kl = distill_kl(
                    student, head, teacher_hidden[rows], teacher_head, temperature, mask=weights[rows], top_k=top_k,
                    reduction="sum", group=group,
                )  # fmt: skip
            total += kl.detach()
            if to_hidden is not None and to_weight is not None:
                to_hidden[rows], of_head = torch.autograd.grad(kl, (student, head))
                to_weight += of_head
        ctx.save_for_backward(to_hidden, to_weight)
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        to_hidden, to_weight = ctx.saved_tensors
        return (to_hidden * slope).to(to_hidden.dtype), (to_weight * slope).to(ctx.dtype), *(None,) * 8
