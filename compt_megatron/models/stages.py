"""What a language model in a pipeline needs besides megatron's schedules: losses on stages that are not the last, and
the gradients of a token embedding that two stages have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn


def with_loss(activations: Tensor, loss: Tensor) -> Tensor:
    """`activations` as they are; with their gradient, which the next stage sends, `loss` (0-D) is differentiated too.

    So a loss of layers that an inner stage has (alignment) joins the one that the last stage begins with. Megatron's
    schedules do not divide it by the number of micro-batches.
    """
    found: Tensor = _WithLoss.apply(activations, loss)
    return found


class _WithLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, activations: Tensor, loss: Tensor) -> Tensor:
        ctx.like = torch.ones_like(loss)
        return activations

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return gradient, ctx.like


def sum_tied_gradients(chunks: Sequence[nn.Module]) -> None:
    """Sum the gradients of a tied embedding's two copies: the token embedding on the first stage, the head on the last.

    `chunks`: this rank's modules, in order, of a model of which they are parts (wrapped or not). To be called on all
    ranks after the backward passes of all micro-batches; with megatron's gradient buffers after their reduction over
    data-parallel ranks, which are cut alike on both stages. Then both copies take the same steps. Does nothing where
    the model is on one stage or not tied.
    """
    copies = [
        parameter
        for chunk in chunks
        for parameter in chunk.parameters()
        if getattr(parameter, "shared_embedding", False)
    ]
    if not copies:
        return
    assert len(copies) == 1, "the first and the last stage are different ranks"
    gradient = getattr(copies[0], "main_grad", None)
    if gradient is None:
        gradient = copies[0].grad
    assert gradient is not None, "no backward pass has reached the tied embedding"
    dist.all_reduce(gradient, group=parallel_state.get_embedding_group())
