"""Numbers that whole vectors of the source give: gammas of the norm before the first block, and of a layer scale."""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt

import torch

from compt_megatron.checkpoint.contract import Region
from compt_megatron.growth.means import tree_sum
from compt_megatron.growth.plan import Contrast


class Vectors:
    """Reads each vector once. `read`: (source boundary name, region) -> tensor. All in fp64."""

    def __init__(self, read: Callable[[str, Region], torch.Tensor]) -> None:
        self._read = read
        self._contrasts: dict[tuple[str, Contrast], tuple[torch.Tensor, float]] = {}
        self._levels: dict[tuple[str, str], tuple[torch.Tensor, float]] = {}

    def contrast(self, prefix: str, contrast: Contrast) -> tuple[torch.Tensor, float]:
        """gamma - mean(gamma), and kappa (see Contrast)."""
        key = (prefix, contrast)
        if key not in self._contrasts:
            gamma = self._vector(prefix, contrast.gamma, contrast.size)
            deviations = gamma - tree_sum(gamma, 0) / contrast.size
            std = _root_mean_square(deviations)
            kappa = min(contrast.ceiling, contrast.ratio / std) if std > 0 else contrast.ceiling
            self._contrasts[key] = deviations, kappa
        return self._contrasts[key]

    def level(self, prefix: str, name: str, size: int) -> tuple[torch.Tensor, float]:
        """A vector's entries over their root mean square (ones, if that is 0), and that."""
        key = (prefix, name)
        if key not in self._levels:
            entries = self._vector(prefix, name, size)
            level = _root_mean_square(entries)
            self._levels[key] = entries / level if level > 0 else torch.ones_like(entries), level
        return self._levels[key]

    def _vector(self, prefix: str, name: str, size: int) -> torch.Tensor:
        return self._read(f"{prefix}/{name}", (slice(0, size),)).double()


def _root_mean_square(values: torch.Tensor) -> float:
    return sqrt(tree_sum(values.square(), 0).item() / len(values))
