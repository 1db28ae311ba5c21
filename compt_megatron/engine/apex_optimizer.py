"""NVIDIA apex's FusedAdam and FusedLAMB behind our optimizer's state: used where apex is installed, never required.

PyPI's package `apex` is another project, so what is looked for is NVIDIA's extension, `amp_C`. apex counts steps by
group and keeps no count with a parameter; here each parameter has its own, and apex is given one group at a time, of
parameters with the same count. It clips nothing (the engine does), and its FusedLAMB leaves the update in the place of
the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from compt_megatron.engine.guarded_optimizer import GuardedOptimizer, Part


def have_apex() -> bool:
    """Whether NVIDIA apex's optimizers can be imported, its compiled extension too."""
    try:
        import amp_C  # noqa: F401
        from apex.optimizers import FusedAdam, FusedLAMB  # noqa: F401
    except ImportError:
        return False
    return True


class ApexOptimizer(GuardedOptimizer):
    """AdamW (`name` "adamw") or LAMB ("lamb") by apex's kernels, on CUDA; fp32 parameters.

    LAMB's norms are of what this rank holds, so its parameters must be whole, and its trust ratio has no clamp.
    """

    def __init__(self, params: Iterable[dict[str, Any]], name: str, betas: tuple[float, float], eps: float) -> None:
        from apex.optimizers import FusedAdam, FusedLAMB

        super().__init__(params, betas, eps)
        some = self.param_groups[0]["params"][:1]  # apex wants a parameter to know the device by
        if name == "lamb":
            self._fused: Any = FusedLAMB(some, max_grad_norm=math.inf)
        else:
            self._fused = FusedAdam(some, adam_w_mode=True)
        self.implementation = f"apex's {type(self._fused).__name__}"

    def _update(self, parts: list[Part]) -> None:
        self._fused.state = self.state
        for part in parts:
            once = {"params": part.params, "step": part.count - 1, "bias_correction": True, "grad_averaging": True}
            self._fused.param_groups = [{**part.group, **once}]
            self._fused.use_nvlamb = part.group["trust"]  # else apex would go by the decay: none, no ratio
            self._fused.step()
        self._fused.param_groups = []
