"""The distance of vocabulary distributions in plain PyTorch, by autograd."""

from __future__ import annotations

import torch

from compt_kernels.exchange import all_gather, all_max_, ranks, shared_by_ranks, sum_over_ranks
from compt_kernels.products import common_dtype, sum_dtype


def distill_kl(
    student_hidden: torch.Tensor,
    student_head: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_head: torch.Tensor,
    temperature: float,
    weight: torch.Tensor,
    top_k: int | None,
    group: str,
) -> torch.Tensor:
    """weight [N] times KL(teacher || student) of each row, 0 where the weight is 0; see `compt_kernels.distill_kl`."""
    dtype = sum_dtype(common_dtype(student_hidden, student_head, teacher_hidden, teacher_head))
    with torch.autocast(student_hidden.device.type, enabled=False):
        live = weight != 0
        hidden = shared_by_ranks(student_hidden.to(dtype), group).masked_fill(~live[:, None], 0.0)
        student = _log_softmax(hidden @ student_head.to(dtype).T / temperature, group)
        with torch.no_grad():
            hidden = teacher_hidden.to(dtype).masked_fill(~live[:, None], 0.0)
            logits = hidden @ teacher_head.to(dtype).T
            bound = kth_largest(logits, top_k, group)
            dropped = torch.zeros_like(logits, dtype=torch.bool) if bound is None else logits < bound[:, None]
            teacher = _log_softmax((logits / temperature).masked_fill(dropped, -torch.inf), group)
        terms = torch.where(dropped, 0.0, teacher.exp() * (teacher - student).masked_fill(dropped, 0.0))
        rows = sum_over_ranks(terms.sum(1), group)
        return torch.where(live, weight.to(dtype) * rows, 0.0)


def kth_largest(logits: torch.Tensor, top_k: int | None, group: str) -> torch.Tensor | None:
    """The top_k-th largest logit of each row over all ranks' columns, [N]; None or -inf where all columns count."""
    rows, columns = logits.shape
    if top_k is None or (not group and top_k >= columns):
        return None
    best = logits.topk(min(top_k, columns), dim=1).values
    if group:
        padded = torch.nn.functional.pad(best, (0, top_k - best.shape[1]), value=-torch.inf)
        everyone = all_gather(padded, group).view(ranks(group)[1], rows, top_k)
        best = everyone.transpose(0, 1).reshape(rows, -1).topk(top_k, dim=1).values
    return best[:, -1].contiguous()


def _log_softmax(logits: torch.Tensor, group: str) -> torch.Tensor:
    """Over all ranks' columns: logits [N, V of this rank]."""
    if not group:
        return torch.log_softmax(logits, dim=1)
    highest = all_max_(logits.detach().amax(1, keepdim=True), group)
    shifted = logits - highest
    summed = sum_over_ranks(shifted.exp().sum(1, keepdim=True), group)
    return shifted - shared_by_ranks(summed, group).log()
