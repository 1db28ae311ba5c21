"""What is fused on one tile of the matrix of all image-text products: the schemas, and the same in plain PyTorch.

A tile holds `dots` [r, c], the products x_i . y_j of r rows and c columns, as fp32 (fp64 in the plain form). Its own
pairs lie where column = row + `diagonal`, a number that may be negative or beyond the tile. With labels, int64 per row
and per column, the pairs of equal label are positive too. Logits are z = scale * dots, with `scale` 0-D.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

NOTHING = -1e30  # the maximum of no numbers: finite, so that two of them can be subtracted

torch.library.define(
    "compt_kernels::nce_statistics_",
    "(Tensor dots, Tensor scale, Tensor(a!) rows, Tensor(b!) columns, int diagonal, "
    "Tensor? row_labels, Tensor? column_labels) -> ()",
)
torch.library.define(
    "compt_kernels::nce_gradient_",
    "(Tensor(a!) dots, Tensor scale, Tensor rows, Tensor columns, int diagonal, "
    "Tensor? row_labels, Tensor? column_labels, Tensor(b!)? out, float gain) -> Tensor",
)
torch.library.define(
    "compt_kernels::sigmoid_tile_",
    "(Tensor(a!) dots, Tensor scale, Tensor bias, int diagonal, "
    "Tensor? row_labels, Tensor? column_labels, Tensor(b!)? out, float gain, bool gradient) -> Tensor",
)


@torch.library.register_fake("compt_kernels::nce_statistics_")
def _(dots, scale, rows, columns, diagonal, row_labels, column_labels):  # type: ignore[no-untyped-def]
    return None


@torch.library.register_fake("compt_kernels::nce_gradient_")
def _(dots, scale, rows, columns, diagonal, row_labels, column_labels, out, gain):  # type: ignore[no-untyped-def]
    return dots.new_empty(dots.shape[0])


@torch.library.register_fake("compt_kernels::sigmoid_tile_")
def _(dots, scale, bias, diagonal, row_labels, column_labels, out, gain, gradient):  # type: ignore[no-untyped-def]
    return dots.new_empty((3, dots.shape[0]))


class Tiles(NamedTuple):
    """The three operations, fused or plain."""

    nce_statistics_: Callable[..., None]
    nce_gradient_: Callable[..., torch.Tensor]
    sigmoid_tile_: Callable[..., torch.Tensor]


def tiles(plain: bool) -> Tiles:
    if plain:
        return Tiles(nce_statistics_, nce_gradient_, sigmoid_tile_)
    ops: Any = torch.ops.compt_kernels
    return Tiles(ops.nce_statistics_, ops.nce_gradient_, ops.sigmoid_tile_)


def nce_statistics_(
    dots: torch.Tensor,
    scale: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    diagonal: int,
    row_labels: torch.Tensor | None,
    column_labels: torch.Tensor | None,
) -> None:
    """Merge a tile into what is known of its rows [5, r] and its columns [4, c], over the logits of other pairs.

    0: their maximum, or a number near it; 1: the sum of exp(logit - maximum); with labels, 2: the sum of the positive
    pairs' dots, 3: how many those are; rows only, 4: the dots of the own pair.
    """
    logits = dots * scale
    own = _own(dots, diagonal)
    row, column = own.nonzero(as_tuple=True)
    rows[4, row] = dots[row, column]
    _merge(rows, logits.masked_fill(own, NOTHING), 1)
    _merge(columns, logits.masked_fill(own, NOTHING), 0)
    if row_labels is not None and column_labels is not None:
        positive = (row_labels[:, None] == column_labels[None, :]) & ~own
        kept = torch.where(positive, dots, 0.0)
        for state, dim in ((rows, 1), (columns, 0)):
            state[2] += kept.sum(dim)
            state[3] += positive.sum(dim)


def nce_gradient_(
    dots: torch.Tensor,
    scale: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    diagonal: int,
    row_labels: torch.Tensor | None,
    column_labels: torch.Tensor | None,
    out: torch.Tensor | None,
    gain: float,
) -> torch.Tensor:
    """Turn a tile into the gradient of its logits; returns the sum over columns of gradient times dots, [r].

    rows [4, r] and columns [3, c]: 0, a reference m; 1, the factor w of exp(z - m); 2, the target of each other
    positive pair; 3, rows only, the gradient of the own pair's logit. The gradient is w exp(z - m) of the row plus
    that of the column, less both targets where the pair is positive. It is written times `gain` to `out` [r, c], or
    without `out` into `dots`.
    """
    logits = dots * scale
    gradient = rows[1, :, None] * torch.exp(logits - rows[0, :, None]) + columns[1] * torch.exp(logits - columns[0])
    if row_labels is not None and column_labels is not None:
        positive = row_labels[:, None] == column_labels[None, :]
        gradient = gradient - torch.where(positive, rows[2, :, None] + columns[2], 0.0)
    gradient = torch.where(_own(dots, diagonal), rows[3, :, None], gradient)
    summed = (gradient * dots).sum(1)
    (dots if out is None else out).copy_(gradient * gain)
    return summed


def sigmoid_tile_(
    dots: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    diagonal: int,
    row_labels: torch.Tensor | None,
    column_labels: torch.Tensor | None,
    out: torch.Tensor | None,
    gain: float,
    gradient: bool,
) -> torch.Tensor:
    """The sigmoid loss of a tile, [3, r] sums over columns: of the loss, of gradient times dots, of the gradient.

    Logits are z = scale * dots + bias. Their gradient is written as in `nce_gradient_`; with `gradient` false nothing
    is written, and sums 1 and 2 are 0.
    """
    logits = dots * scale + bias
    positive = _own(dots, diagonal)
    if row_labels is not None and column_labels is not None:
        positive = positive | (row_labels[:, None] == column_labels[None, :])
    sums = dots.new_zeros((3, dots.shape[0]))
    sums[0] = torch.nn.functional.softplus(torch.where(positive, -logits, logits), threshold=40).sum(1)
    if gradient:
        slope = torch.where(positive, -torch.sigmoid(-logits), torch.sigmoid(logits))
        sums[1], sums[2] = (slope * dots).sum(1), slope.sum(1)
        (dots if out is None else out).copy_(slope * gain)
    return sums


def _own(dots: torch.Tensor, diagonal: int) -> torch.Tensor:
    row = torch.arange(dots.shape[0], device=dots.device)
    column = torch.arange(dots.shape[1], device=dots.device)
    return row[:, None] + diagonal == column[None, :]


def _merge(state: torch.Tensor, logits: torch.Tensor, dim: int) -> None:
    highest = torch.maximum(state[0], logits.amax(dim))
    powers = torch.exp(logits - highest.unsqueeze(dim)).masked_fill(logits == NOTHING, 0.0)
    state[1] = state[1] * torch.exp(state[0] - highest) + powers.sum(dim)
    state[0] = highest
