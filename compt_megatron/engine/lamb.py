"""LAMB for very large batches (You et al. 2020, arXiv 1904.00962, algorithm 2), with the norms of whole parameters.

    m = β₁ m + (1 - β₁) g            v = β₂ v + (1 - β₂) g²
    u = m / (1 - β₁ᵗ) / (√(v / (1 - β₂ᵗ)) + ε) + λ w
    w = w - η · ratio · u            ratio = |w| / |u|, and 1 where either norm is 0

As in the code of LAMB's authors the ratio is not clamped unless `trust_clamp` asks for it, and parameters without
weight decay (biases, norms, the logit scale) have none: they take Adam's step. What is without decay is said by name
and not by the rate, so matrices keep their ratio at weight decay 0. apex's FusedLAMB computes the same.

A parameter is a parameter of the module: q, k and v, being one matrix there, have one ratio. Its norms are over the
whole of it also where tensor parallelism cuts it; rows that pad a vocabulary count unless they are 0.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist

from compt_megatron.engine.guarded_optimizer import GuardedOptimizer, Part


class Lamb(GuardedOptimizer):
    """LAMB in torch's foreach operations; needs memory for one more copy of the weights while it steps.

    Each group says whether its parameters have a trust ratio (`trust`), and whether each of its parameters is cut over
    the ranks of `tensor_group` (`split`). With a group a step is collective over it: one all-reduce of all squared
    norms. All its ranks must then have gradients of the same split parameters.
    """

    implementation = "LAMB in torch"

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        betas: tuple[float, float],
        eps: float,
        trust_clamp: float | None = None,
        tensor_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(params, betas, eps)
        self._clamp, self._tensor_group = trust_clamp, tensor_group

    def _update(self, parts: list[Part]) -> None:
        parts = sorted(parts, key=lambda part: not part.group["split"])  # what is summed over ranks comes first
        updates = [_updates(part) for part in parts]
        ratios = self._trust_ratios(parts, updates)
        for part, changes in zip(parts, updates):
            rate = part.group["lr"]
            if part.group["trust"]:
                torch._foreach_addcmul_(part.params, changes, [next(ratios) for _ in changes], value=-rate)
            else:
                torch._foreach_add_(part.params, changes, alpha=-rate)

    def _trust_ratios(self, parts: list[Part], updates: list[list[torch.Tensor]]) -> Any:
        """The ratio of each parameter that has one, in order, as 0-D tensors: nothing waits for the device."""
        trusted = [(part, changes) for part, changes in zip(parts, updates) if part.group["trust"]]
        if not trusted:
            return iter(())
        weights = [param for part, _ in trusted for param in part.params]
        norms = torch.stack(
            [*torch._foreach_norm(weights), *torch._foreach_norm([u for _, changes in trusted for u in changes])]
        ).view(2, len(weights))
        split = sum(len(part.params) for part, _ in trusted if part.group["split"])
        if self._tensor_group is not None and split:
            squares = norms[:, :split].double().square()
            dist.all_reduce(squares, group=self._tensor_group)
            norms[:, :split] = squares.sqrt().to(norms.dtype)
        weight, update = norms
        ratios = torch.where((weight > 0) & (update > 0), weight / update, 1.0)
        return iter((ratios if self._clamp is None else ratios.clamp(max=self._clamp)).unbind())


def _updates(part: Part) -> list[torch.Tensor]:
    """The moments advanced in place, and u of each parameter: what is subtracted before rate and ratio."""
    beta1, beta2 = part.group["betas"]
    torch._foreach_lerp_(part.exp_avg, part.gradients, 1 - beta1)
    torch._foreach_mul_(part.exp_avg_sq, beta2)
    torch._foreach_addcmul_(part.exp_avg_sq, part.gradients, part.gradients, value=1 - beta2)
    updates = list(torch._foreach_sqrt(part.exp_avg_sq))
    torch._foreach_div_(updates, (1 - beta2**part.count) ** 0.5)
    torch._foreach_add_(updates, part.group["eps"])
    torch._foreach_mul_(updates, 1 - beta1**part.count)
    torch._foreach_reciprocal_(updates)  # in place, and no second copy
    torch._foreach_mul_(updates, part.exp_avg)
    if part.group["weight_decay"]:
        torch._foreach_add_(updates, part.params, alpha=part.group["weight_decay"])
    return updates
