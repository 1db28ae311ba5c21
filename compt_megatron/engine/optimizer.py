"""The optimizer of a link: AdamW or LAMB, whose kernels do the work, and the parameter groups with their factors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from compt_megatron.engine.apex_optimizer import ApexOptimizer, have_apex
from compt_megatron.engine.lamb import Lamb
from compt_megatron.errors import UserError
from compt_megatron.recipe.sections import OptimizerSettings

NamedParameters = Iterable[tuple[str, torch.nn.Parameter]]
Factors = Callable[[str], tuple[float, float]]  # parameter -> factors on its learning rate and its weight decay


class GuardedAdamW(torch.optim.AdamW):
    """torch's AdamW with a switch: while `refuse` is set, `step` leaves weights, moments and step count alone."""

    refuse: bool = False
    implementation = "AdamW in torch, fused"

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        return None if self.refuse else super().step(closure)


LinkOptimizer = GuardedAdamW | Lamb | ApexOptimizer


def build_optimizer(
    named_parameters: NamedParameters,
    settings: OptimizerSettings,
    decays: Callable[[str], bool],
    factors: Factors | None = None,
    tensor_group: dist.ProcessGroup | None = None,
) -> LinkOptimizer:
    """The optimizer over the parameters. Its `implementation` says what was chosen, for the log.

    `decays(name)` says which parameters get weight decay (matrices; never biases or norms). `factors(name)`: factors on
    a parameter's learning rate and weight decay, as growth returns them (`growth.moments.step_factors`). Weight decay
    has its factor already; the rate of each group must be set to rate x `group["lr_scale"]`. `tensor_group`: the
    tensor-parallel ranks, if several; parameters that are cut over them are those that megatron-core marks
    `tensor_model_parallel`.

    Raises UserError where `optimizer.implementation` names apex and it is not there, or cannot do what is asked.
    """
    named = list(named_parameters)
    groups = parameter_groups(named, settings, decays, factors, split=tensor_group is not None)
    betas = (settings.betas[0], settings.betas[1])
    if uses_apex(settings, {param.device.type for _, param in named}, tensor_group is not None):
        return ApexOptimizer(groups, settings.name, betas, settings.eps)
    if settings.name == "lamb":
        return Lamb(groups, betas, settings.eps, settings.trust_clamp, tensor_group)
    return GuardedAdamW(groups, lr=0.0, betas=betas, eps=settings.eps, fused=True)


def uses_apex(settings: OptimizerSettings, devices: set[str], tensor_parallel: bool) -> bool:
    """Whether apex does the arithmetic, for parameters on `devices`. Raises UserError where it was named and cannot."""
    possible = settings.name != "lamb" or (not tensor_parallel and settings.trust_clamp is None)
    if settings.implementation != "apex":
        wanted = settings.implementation == "auto" and settings.name == "lamb"
        return wanted and possible and devices == {"cuda"} and have_apex()
    if not have_apex():
        raise UserError(
            "optimizer.implementation: 'apex' needs NVIDIA apex with its CUDA extensions (amp_C), which is not "
            "installed here; build it from https://github.com/NVIDIA/apex, or use auto or torch"
        )
    if devices != {"cuda"}:
        raise UserError("optimizer.implementation: 'apex' needs a CUDA device; use auto or torch")
    if not possible:
        raise UserError(
            "optimizer.implementation: apex's LAMB has no tensor parallelism and no trust_clamp; use auto or torch"
        )
    return True


class _Kind(NamedTuple):
    decays: bool
    split: bool
    lr_scale: float
    decay_scale: float


def parameter_groups(
    named_parameters: NamedParameters,
    settings: OptimizerSettings,
    decays: Callable[[str], bool],
    factors: Factors | None = None,
    split: bool = False,
) -> list[dict[str, Any]]:
    """Groups of parameters that are stepped alike, those with weight decay first.

    LAMB's trust ratio already makes the step of a parameter as small as its values, so there the factor on the rate
    applies only to parameters without one. `split`: whether those marked `tensor_model_parallel` are cut over ranks.
    """
    lamb = settings.name == "lamb"
    groups: dict[_Kind, list[torch.nn.Parameter]] = {}
    for name, param in named_parameters:
        lr_scale, decay_scale = (1.0, 1.0) if factors is None else factors(name)
        decay = decays(name)
        cut = lamb and split and bool(getattr(param, "tensor_model_parallel", False))
        kind = _Kind(decay, cut, 1.0 if lamb and decay else lr_scale, decay_scale if decay else 1.0)
        groups.setdefault(kind, []).append(param)
    return [
        {
            "params": members,
            "weight_decay": settings.weight_decay * kind.decay_scale if kind.decays else 0.0,
            "lr_scale": kind.lr_scale,
            "trust": lamb and kind.decays,
            "split": kind.split,
        }
        for kind, members in sorted(groups.items(), key=lambda item: not item[0].decays)
    ]
