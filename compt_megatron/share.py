"""A rank's share of a loss: what objectives and the alignment return, and the sums over ranks they need.

A share is a tensor whose sum over the ranks of a process group is the loss of the global batch. Gradients of shares,
summed over the ranks, are therefore the gradient of the global loss.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist


class ObjectiveResult(NamedTuple):
    """This rank's share of a loss and of its parts.

    loss: 0-D, with graph; the sum over ranks is the loss of the global batch. parts: name -> 0-D detached share,
    which sums over ranks likewise.
    """

    loss: torch.Tensor
    parts: dict[str, torch.Tensor]


class CountedRows(NamedTuple):
    """Which rows count in a loss of rows: `weights` [...] of this rank's rows (any dtype, or a mask), and `total`, 0-D,
    their sum over the global batch."""

    weights: torch.Tensor
    total: torch.Tensor | float


def ranks(group: dist.ProcessGroup | None = None) -> tuple[int, int]:
    """(rank, world size) in `group` (None: the default group); (0, 1) where torch.distributed is not initialised."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


def total(value: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """The sum of a share over the ranks of `group`: a new tensor without graph, the same on all ranks."""
    value = value.detach().clone()
    if ranks(group)[1] > 1:
        dist.all_reduce(value, group=group)
    return value


def several(group: dist.ProcessGroup | None = None) -> dist.ProcessGroup | None:
    """`group` (None: the default group) where it has several ranks, None where this process is alone."""
    if ranks(group)[1] == 1:
        return None
    return dist.group.WORLD if group is None else group
