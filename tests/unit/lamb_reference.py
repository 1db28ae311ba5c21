"""LAMB written out from the paper, one parameter at a time, in fp64: what the optimizers are compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

BETAS, EPS, DECAY, RATE = (0.9, 0.98), 1e-6, 0.1, 0.02
SHAPES: dict[str, tuple[int, ...]] = {
    "a.weight": (8, 6),
    "b.weight": (4, 6),
    "a.bias": (8,),
    "scale": (1,),
    "c.weight": (5, 3),
}


def decays(name: str) -> bool:
    return name.endswith("weight")


def settings(**changed: Any) -> Any:
    from compt_megatron.recipe.sections import OptimizerSettings

    values = {"name": "lamb", "lr": RATE, "betas": list(BETAS), "eps": EPS, "weight_decay": DECAY, **changed}
    return OptimizerSettings(**values)


def start(dtype: torch.dtype = torch.float32) -> dict[str, torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
        for name, shape in SHAPES.items()
    }


def gradient(name: str, step: int) -> torch.Tensor:
    """fp64, exact in fp32 too; of sizes that differ between parameters and steps."""
    generator = torch.Generator().manual_seed(100 * step + list(SHAPES).index(name))
    return (torch.randn(SHAPES[name], generator=generator) * 10.0 ** (step - 3)).double()


@dataclass
class Reference:
    """One parameter under LAMB; `trust`: whether it has a trust ratio."""

    weight: torch.Tensor
    trust: bool
    decay: float = DECAY
    clamp: float | None = None
    count: int = 0

    def __post_init__(self) -> None:
        self.weight = self.weight.detach().double().clone()
        self.first, self.second = torch.zeros_like(self.weight), torch.zeros_like(self.weight)
        self.ratios: list[float] = []

    def step(self, gradient: torch.Tensor, rate: float = RATE) -> None:
        self.count += 1
        self.first = BETAS[0] * self.first + (1 - BETAS[0]) * gradient
        self.second = BETAS[1] * self.second + (1 - BETAS[1]) * gradient * gradient
        first, second = self.first / (1 - BETAS[0] ** self.count), self.second / (1 - BETAS[1] ** self.count)
        update = first / (second.sqrt() + EPS) + self.decay * self.weight
        ratio = 1.0
        if self.trust:
            sizes = float((self.weight**2).sum()) ** 0.5, float((update**2).sum()) ** 0.5
            ratio = sizes[0] / sizes[1] if min(sizes) > 0 else 1.0
            ratio = ratio if self.clamp is None else min(ratio, self.clamp)
        self.ratios.append(ratio)
        self.weight = self.weight - rate * ratio * update


def references(params: dict[str, torch.nn.Parameter], **changed: Any) -> dict[str, Reference]:
    return {
        name: Reference(param, decays(name), **(changed | ({} if decays(name) else {"decay": 0.0})))
        for name, param in params.items()
    }


def take_step(optimizer: Any, params: dict[str, torch.nn.Parameter], step: int, rate: float = RATE) -> None:
    """One step on the gradients of `step`, the rate set as the engine sets it."""
    for name, param in params.items():
        param.grad = gradient(name, step).to(param)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]
    optimizer.step()


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.detach().double() - wanted).norm() / wanted.norm().clamp(min=1e-30))
