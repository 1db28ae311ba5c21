"""Collectives of the losses, by the name of the process group, so that they can stand inside a torch operator."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

# torch 2.13 renamed both and warns at the old names; 2.11 has only those.
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or getattr(dist, "reduce_scatter_tensor", None)


def group_name(group: Any) -> str:
    """The name of a process group ('' for None: this process alone); a name is returned as it is."""
    if group is None:
        return ""
    return group if isinstance(group, str) else group.group_name


def ranks(name: str) -> tuple[int, int]:
    """(rank, world size) in the group of that name; (0, 1) for ''."""
    if not name:
        return 0, 1
    group = _group(name)
    return dist.get_rank(group), dist.get_world_size(group)


def all_gather(x: torch.Tensor, name: str) -> torch.Tensor:
    """The rows of all ranks in rank order: [n, ...] -> [world * n, ...], new. Every rank must have the same n."""
    world = ranks(name)[1]
    gathered = x.new_empty((world * x.shape[0], *x.shape[1:]))
    _all_gather(gathered, x.contiguous(), group=_group(name))
    return gathered


def reduce_scatter(x: torch.Tensor, name: str) -> torch.Tensor:
    """This rank's rows of the sum over ranks: [world * n, ...] -> [n, ...]."""
    rank, world = ranks(name)
    rows = x.shape[0] // world
    mine = x.new_empty((rows, *x.shape[1:]))
    try:
        _reduce_scatter(mine, x.contiguous(), group=_group(name))
    except (RuntimeError, NotImplementedError) as error:
        # A backend without reduce-scatter (gloo in some builds) refuses on all ranks before anything is sent.
        if "support" not in str(error) and "implement" not in str(error):
            raise
        summed = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(summed, group=_group(name))
        mine = summed[rank * rows : (rank + 1) * rows].contiguous()
    return mine


def all_sum_(x: torch.Tensor, name: str) -> torch.Tensor:
    """Sum a contiguous tensor over the ranks, in place."""
    if name:
        dist.all_reduce(x, group=_group(name))
    return x


def all_max_(x: torch.Tensor, name: str) -> torch.Tensor:
    """The greatest of each element over the ranks, in place; x is contiguous."""
    if name:
        dist.all_reduce(x, op=dist.ReduceOp.MAX, group=_group(name))
    return x


def assert_equal_rows(x: torch.Tensor, name: str) -> None:
    """Unequal rows would hang or mix up a gather. On a GPU the check is enqueued, so that the host does not wait."""
    span = torch.full((2,), x.shape[0], device=x.device)
    span[1:].neg_()
    all_max_(span, name)
    if x.device.type == "cpu":
        most, least = int(span[0]), -int(span[1])
        assert most == least, f"ranks hold between {least} and {most} rows; a gather needs equal numbers"
    else:
        torch._assert_async(span.sum() == 0)


def gather_rows(x: torch.Tensor, name: str) -> torch.Tensor:
    """`all_gather` that gradients flow back through: they are summed over the ranks."""
    return _GatherRows.apply(x, name) if name else x


def sum_over_ranks(x: torch.Tensor, name: str) -> torch.Tensor:
    """The sum over the ranks, for a loss that all ranks hold alike: its gradient passes unchanged."""
    return _SumOverRanks.apply(x, name) if name else x


def shared_by_ranks(x: torch.Tensor, name: str) -> torch.Tensor:
    """x itself, which all ranks hold alike; its gradient is summed over the ranks, each of which knows a part of it."""
    return _SharedByRanks.apply(x, name) if name else x


def _group(name: str) -> Any:
    resolve: Any = distributed_c10d._resolve_process_group
    return resolve(name)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, name: str) -> torch.Tensor:
        ctx.name = name
        return all_gather(x, name)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return reduce_scatter(grad, ctx.name), None


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, name: str) -> torch.Tensor:
        return all_sum_(x.clone(memory_format=torch.contiguous_format), name)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return grad, None


class _SharedByRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, name: str) -> torch.Tensor:
        ctx.name = name
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return all_sum_(grad.clone(memory_format=torch.contiguous_format), ctx.name), None
