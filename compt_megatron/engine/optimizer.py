"""AdamW as the engines use it: weight decay on matrices only, torch's fused kernel, and a step that can be refused."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from compt_megatron.recipe.sections import OptimizerSettings


class GuardedAdamW(torch.optim.AdamW):
    """torch's AdamW with a switch: while `refuse` is set, `step` leaves weights, moments and step count alone."""

    refuse: bool = False

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        return None if self.refuse else super().step(closure)


def build_optimizer(
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
    settings: OptimizerSettings,
    decays: Callable[[str], bool],
) -> GuardedAdamW:
    """AdamW over the parameters; `decays(name)` says which get weight decay (matrices; never biases or norms)."""
    groups: dict[bool, list[torch.nn.Parameter]] = {True: [], False: []}
    for name, param in named_parameters:
        groups[decays(name)].append(param)
    params: list[dict[str, Any]] = [
        {"params": members, "weight_decay": settings.weight_decay if decay else 0.0}
        for decay, members in groups.items()
        if members
    ]
    return GuardedAdamW(params, lr=0.0, betas=tuple(settings.betas), eps=settings.eps, fused=True)  # type: ignore[arg-type]
