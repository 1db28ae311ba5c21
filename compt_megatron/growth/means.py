"""Means over whole axes of source tensors: a fixed order of additions, in fp64, and bounded memory.

The order is that of `tree_sum`, element-wise additions only: what `torch.sum` gives depends on shape and strides.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch

from compt_megatron.checkpoint.contract import Region, region_shape

_WHOLE = 2**20  # elements of fp64 that are summed at once
_BLOCK = 2**17  # elements read at a time where rows are added as they come

Read = Callable[[Region], torch.Tensor]


def tree_sum(values: torch.Tensor, dim: int) -> torch.Tensor:
    """Sum along `dim` (kept, of size 1): halves are added to each other until one row is left."""
    while (size := values.shape[dim]) > 1:
        half = size // 2
        total = values.narrow(dim, 0, half) + values.narrow(dim, half, half)
        values = torch.cat([total, values.narrow(dim, 2 * half, 1)], dim) if size % 2 else total
    return values


def sums(read: Read, region: Region, dim: int, weights: torch.Tensor) -> torch.Tensor:
    """[2, ...] in fp64: the sums of a box along `dim` (of size 1 then), plain and weighted; weights: [size of dim].

    `read` gives the values of a box; every element is read once.
    """
    if dim == 0:
        return _sums_of_rows(read, region, weights)
    shape = [1] * len(region)
    shape[dim] = -1
    sizes = region_shape(region)
    step = max(1, _WHOLE // max(1, prod(sizes[1:])))
    found = []
    for start in range(region[0].start, region[0].stop, step):
        values = read((slice(start, min(start + step, region[0].stop)), *region[1:])).double()
        found.append(torch.stack([tree_sum(values, dim), tree_sum(values * weights.reshape(shape), dim)]))
    return torch.cat(found, 1)


def _sums_of_rows(read: Read, region: Region, weights: torch.Tensor) -> torch.Tensor:
    first, rows = region[0].start, region[0].stop - region[0].start
    row = prod(region_shape(region[1:]))
    shape = (-1, *(1 for _ in region[1:]))

    def both(start: int, stop: int) -> torch.Tensor:
        values = read((slice(first + start, first + stop), *region[1:])).double()
        return torch.stack([values, values * weights[start:stop].reshape(shape)], 1)

    sizes = [rows]  # of the levels of the tree, leaves first
    while sizes[-1] > 1 and sizes[-1] * row > _WHOLE:
        sizes.append(sizes[-1] - sizes[-1] // 2)

    def level(depth: int, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of a level: each is the sum of two of the level below, a last odd one is passed on."""
        if depth == 0:
            return both(start, stop)
        half = sizes[depth - 1] // 2
        parts = []
        if start < half:
            last = min(stop, half)
            parts.append(level(depth - 1, start, last) + level(depth - 1, start + half, last + half))
        if stop > half:
            parts.append(level(depth - 1, 2 * half, 2 * half + 1))
        return torch.cat(parts)

    top, step = sizes[-1], max(1, _BLOCK // max(1, row))
    blocks = [level(len(sizes) - 1, start, min(start + step, top)) for start in range(0, top, step)]
    return tree_sum(torch.cat(blocks), 0).movedim(1, 0)
