"""What the optimizers that torch does not have share: Adam's state, one count per parameter, and steps refused."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Part:
    """Parameters of one group that have gradients and have taken the same number of steps, this one counted."""

    group: dict[str, Any]
    count: int
    params: list[torch.Tensor]
    gradients: list[torch.Tensor]
    exp_avg: list[torch.Tensor]
    exp_avg_sq: list[torch.Tensor]


class GuardedOptimizer(torch.optim.Optimizer):
    """An optimizer whose state is Adam's, by the same names: `exp_avg`, `exp_avg_sq`, and a `step` tensor of its own
    for each parameter. While `refuse` is set, `step` leaves weights, moments and step counts alone.

    `implementation` says in a few words what does the arithmetic.
    """

    refuse: bool = False
    implementation: str

    def __init__(self, params: Iterable[dict[str, Any]], betas: tuple[float, float], eps: float) -> None:
        super().__init__(params, {"lr": 0.0, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of all parameters that have gradients."""
        if self.refuse:
            return None
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if parts := self._parts():
            self._update(parts)
        return loss

    @abstractmethod
    def _update(self, parts: list[Part]) -> None:
        """Change weights and moments in place; counts and states are there already."""

    def _parts(self) -> list[Part]:
        """What steps now, its counts advanced. Reads all counts from the device at once."""
        groups = [(group, [p for p in group["params"] if p.grad is not None]) for group in self.param_groups]
        params = [param for _, members in groups for param in members]
        if not params:
            return []
        counts = [self._state_of(param)["step"] for param in params]
        torch._foreach_add_(counts, 1.0)
        count_of = dict(zip(params, torch.stack(counts).tolist()))
        found = []
        for group, members in groups:
            for count in sorted({count_of[param] for param in members}):
                found.append(self._part(group, int(count), [p for p in members if count_of[p] == count]))
        return found

    def _part(self, group: dict[str, Any], count: int, params: list[torch.Tensor]) -> Part:
        states = [self.state[param] for param in params]
        return Part(
            group,
            count,
            params,
            [param.grad for param in params if param.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
        )

    def _state_of(self, param: torch.Tensor) -> dict[str, Any]:
        state = self.state[param]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = torch.zeros_like(param, memory_format=torch.preserve_format)
        return state
