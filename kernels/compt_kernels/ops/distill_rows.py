"""What is fused on a chunk of vocabulary logits: the schemas, and the same in plain PyTorch.

student, teacher: [r, V] logits in fp32 (fp64 in the plain form), V of this rank. `temperature` divides both. With
`bound` [r] the teacher's logits below it do not count: the top-k teacher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from compt_kernels.ops.tiles import NOTHING

torch.library.define(
    "compt_kernels::distill_statistics", "(Tensor student, Tensor teacher, Tensor? bound, float temperature) -> Tensor"
)
torch.library.define(
    "compt_kernels::distill_gradient_",
    "(Tensor(a!) student, Tensor teacher, Tensor statistics, Tensor weight, Tensor? bound, float temperature, "
    "Tensor(b!)? out, bool gradient) -> Tensor",
)


@torch.library.register_fake("compt_kernels::distill_statistics")
def _(student, teacher, bound, temperature):  # type: ignore[no-untyped-def]
    return student.new_empty((4, student.shape[0]))


@torch.library.register_fake("compt_kernels::distill_gradient_")
def _(student, teacher, statistics, weight, bound, temperature, out, gradient):  # type: ignore[no-untyped-def]
    return student.new_empty(student.shape[0])


class DistillRows(NamedTuple):
    """The two operations, fused or plain."""

    distill_statistics: Callable[..., torch.Tensor]
    distill_gradient_: Callable[..., torch.Tensor]


def distill_rows(plain: bool) -> DistillRows:
    if plain:
        return DistillRows(distill_statistics, distill_gradient_)
    ops: Any = torch.ops.compt_kernels
    return DistillRows(ops.distill_statistics, ops.distill_gradient_)


def distill_statistics(
    student: torch.Tensor, teacher: torch.Tensor, bound: torch.Tensor | None, temperature: float
) -> torch.Tensor:
    """[4, r]: the maximum m of the student's z = logit / temperature, the sum of exp(z - m), then the teacher's two."""
    found = []
    for logits in (student / temperature, _kept(teacher, bound) / temperature):
        highest = logits.amax(1)
        found += [highest, torch.exp(logits - highest[:, None]).sum(1)]
    return torch.stack(found)


def distill_gradient_(
    student: torch.Tensor,
    teacher: torch.Tensor,
    statistics: torch.Tensor,
    weight: torch.Tensor,
    bound: torch.Tensor | None,
    temperature: float,
    out: torch.Tensor | None,
    gradient: bool,
) -> torch.Tensor:
    """KL(teacher || student) of each row, over these columns: [r]; with `gradient` also weight [r] * (p_s - p_t).

    That is the gradient of weight * KL for the student's logits but for 1 / temperature; it is written to `out` [r, V],
    or without `out` into `student`. A row of weight 0 has KL 0 and gradient 0, whatever it holds.
    statistics [4, r]: the two maxima and sums of whole rows.

    With u = log p_t - log p_s the KL is summed as p_t (u + exp(-u) - 1), equal as both distributions sum to 1. No term
    is negative, and for a student close to its teacher none is the difference of numbers far greater than itself.
    """
    m_s, s_s, m_t, s_t = (number[:, None] for number in statistics)
    z_s, z_t = student / temperature, _kept(teacher, bound) / temperature
    p_s, p_t = torch.exp(z_s - m_s) / s_s, torch.exp(z_t - m_t) / s_t
    v = z_s - z_t - (m_s - m_t) - (s_s / s_t).log()  # -u
    near = v.abs() < 0.5
    terms = torch.where(near, p_t * _exp_less_two_terms(v), p_s - p_t - p_t * v)
    live = weight != 0
    if gradient:
        slope = torch.where(near, p_t * torch.expm1(v), p_s - p_t)
        (student if out is None else out).copy_(torch.where(live[:, None], weight[:, None] * slope, 0.0))
    return torch.where(live, torch.where(p_t == 0, p_s, terms).sum(1), 0.0)


def _kept(teacher: torch.Tensor, bound: torch.Tensor | None) -> torch.Tensor:
    return teacher if bound is None else teacher.masked_fill(teacher < bound[:, None], NOTHING)


def _exp_less_two_terms(v: torch.Tensor) -> torch.Tensor:
    """exp(v) - 1 - v for |v| < 1/2, by its series."""
    tail = torch.ones_like(v)
    for n in range(18, 2, -1):
        tail = 1 + v / n * tail
    return v * v / 2 * tail
