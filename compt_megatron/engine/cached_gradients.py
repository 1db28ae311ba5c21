"""Cached feature gradients: a loss over the whole batch while activations of one micro-batch live at a time.

The loss of contrastive learning couples every row of the global batch, so summing the losses of micro-batches is a
different loss. Instead (GradCache, Gao et al. 2021, arXiv 2101.06983): forward all micro-batches without a graph; take
the loss of all features and its gradient with respect to each feature, once; then forward every micro-batch again
with a graph and send its features' cached gradients back. By the chain rule the parameters' gradients are those of
the un-split batch. Both forwards of a micro-batch must see the same random state.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from compt_megatron.engine.student import Outputs, is_per_row, join_rows


class CachedGradients:
    """The outputs of a whole batch as leaves, and their gradients once `loss.backward()` has run on them."""

    def __init__(self, parts: list[Outputs]) -> None:
        self._rows = [
            {key: value.shape[0] if is_per_row(value) else 0 for key, value in part.items()} for part in parts
        ]
        self.outputs = {
            key: value.detach().requires_grad_(value.is_floating_point()) for key, value in join_rows(parts).items()
        }

    def surrogate(self, micro_batch: int, outputs: Outputs) -> torch.Tensor:
        """A scalar whose gradient is the cached one: sum of output x gradient over one micro-batch's outputs.

        A 0-D output is the same in every micro-batch; its gradient is shared out evenly.
        """
        total = torch.zeros((), device=next(iter(outputs.values())).device)
        for key, value in outputs.items():
            gradient = self.outputs[key].grad
            if gradient is None:
                continue
            if is_per_row(value):
                start = sum(rows[key] for rows in self._rows[:micro_batch])
                gradient = gradient[start : start + value.shape[0]]
            else:
                gradient = gradient / len(self._rows)
            total = total + (value.float() * gradient.float()).sum()
        return total


@torch.no_grad()
def forward_without_graph(forward: Callable[[int], Outputs], micro_batches: int) -> CachedGradients:
    """Run `forward(i)` for every micro-batch without a graph and cache its outputs."""
    return CachedGradients([forward(index) for index in range(micro_batches)])
