"""All-gather of rows that gradients flow back through."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from compt_megatron.share import ranks

# torch 2.13 renamed both and warns at the old names; 2.11 has only those.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def gather_rows(x: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """The rows of all ranks, in rank order: x [n, ...] -> [world * n, ...]. Every rank must have the same n.

    The gradient of `x` is the sum over ranks of the gradients of its rows (a reduce-scatter). `group` None is the
    default process group; with one process, or without torch.distributed, the result is `x` itself.
    """
    if ranks(group)[1] == 1:
        return x
    _assert_equal_rows(x, group)
    return _GatherRows.apply(x, group)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
        ctx.group = group
        gathered = x.new_empty((ranks(group)[1] * x.shape[0], *x.shape[1:]))
        _all_gather(gathered, x.contiguous(), group=group)
        return gathered

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return reduce_scatter_rows(grad, ctx.group), None


def reduce_scatter_rows(x: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """This rank's rows of the sum over ranks: x [world * n, ...] -> [n, ...]; not differentiable."""
    rank, world = ranks(group)
    rows = x.shape[0] // world
    mine = x.new_empty((rows, *x.shape[1:]))
    try:
        _reduce_scatter(mine, x.contiguous(), group=group)
    except (RuntimeError, NotImplementedError) as error:
        # A backend without reduce-scatter (gloo in some builds) refuses on all ranks before anything is sent.
        if "support" not in str(error) and "implement" not in str(error):
            raise
        summed = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(summed, group=group)
        mine = summed[rank * rows : (rank + 1) * rows].contiguous()
    return mine


def _assert_equal_rows(x: torch.Tensor, group: dist.ProcessGroup | None) -> None:
    """Unequal rows would hang or mix up the gather. On a GPU the check is enqueued, so that the host does not wait."""
    span = torch.tensor([x.shape[0], -x.shape[0]], device=x.device)
    dist.all_reduce(span, op=dist.ReduceOp.MAX, group=group)
    if x.device.type == "cpu":
        most, least = int(span[0]), -int(span[1])
        assert most == least, f"ranks hold between {least} and {most} rows; a gather needs equal numbers"
    else:
        torch._assert_async(span.sum() == 0)
