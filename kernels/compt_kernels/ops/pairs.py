"""The walk over all image-text pairs by tiles, which CLIP's and SigLIP's losses share."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from compt_kernels import exchange
from compt_kernels.products import add_product_, aligned, common_dtype, product_, sum_dtype

TILE = 1 << 28  # elements of a tile: 1 GiB of fp32 logits, and half of that for a 16-bit gradient


class Pairs(NamedTuple):
    """This rank's images against the texts of all ranks, in the dtype of their products."""

    image: torch.Tensor  # [n, d]
    texts: torch.Tensor  # [B, d]
    labels: torch.Tensor | None  # [n]
    all_labels: torch.Tensor | None  # [B]
    offset: int  # the column of row 0's own text
    tile: int  # elements of a tile, at most


class Tile(NamedTuple):
    """Some rows against some columns."""

    rows: slice
    columns: slice
    dots: torch.Tensor  # [r, c] products, in fp32 (fp64 of fp64)
    pairs: tuple[Any, ...]  # the diagonal, the labels of rows and of columns


def gather_pairs(image: torch.Tensor, text: torch.Tensor, labels: torch.Tensor | None, group: str, tile: int) -> Pairs:
    """Fetch the texts of all ranks. Every rank must have the same number of rows."""
    dtype = common_dtype(image, text)
    rank, all_labels = exchange.ranks(group)[0], labels
    if group:
        exchange.assert_equal_rows(text, group)
        text = exchange.all_gather(text, group)
        all_labels = None if labels is None else exchange.all_gather(labels, group)
    return Pairs(image.to(dtype), text.to(dtype), labels, all_labels, rank * image.shape[0], tile)


def walk(pairs: Pairs) -> Iterator[Tile]:
    """Every tile in turn. All dots lie in one buffer: a tile's are gone when the next is asked for."""
    rows, columns = pairs.image.shape[0], pairs.texts.shape[0]
    high, wide = blocks(rows, columns, pairs.tile)
    buffer = aligned(high, wide, pairs.image, sum_dtype(pairs.image.dtype))
    for top in range(0, rows, max(high, 1)):
        for left in range(0, columns, wide):
            r, c = slice(top, min(top + high, rows)), slice(left, min(left + wide, columns))
            dots = product_(buffer[: r.stop - top, : c.stop - left], pairs.image[r], pairs.texts[c].T)
            labels: tuple[torch.Tensor | None, ...] = (None, None)
            if pairs.labels is not None and pairs.all_labels is not None:
                labels = pairs.labels[r], pairs.all_labels[c]
            yield Tile(r, c, dots, (top + pairs.offset - left, *labels))


def blocks(rows: int, columns: int, tile: int) -> tuple[int, int]:
    """Height and width of the tiles of a matrix: at most `tile` elements, as square and as equal as can be."""
    side = math.isqrt(tile)
    if rows <= side:
        return rows, _part(columns, tile // max(rows, 1))
    if columns <= side:
        return _part(rows, tile // max(columns, 1)), columns
    return _part(rows, side), _part(columns, side)


def _part(length: int, most: int) -> int:
    """Cut a length in the fewest parts of at most `most`, alike up to a multiple of 64."""
    count = -(-length // most)
    return min(most, -(-length // (count * 64)) * 64) if count > 1 else length


class Gradients:
    """The sums over tiles of gradient x texts and of its transpose x image, in fp32: `image` [n, d], `texts` [B, d].

    A tile's gradient comes from a kernel that writes it times `gain` to `buffer(tile)`, or where that is None in the
    place of the dots; fp16 alone needs a gain, or it would lose gradients below 6e-5.
    """

    def __init__(self, pairs: Pairs, of_image: bool, of_texts: bool) -> None:
        dtype, sums = pairs.image.dtype, sum_dtype(pairs.image.dtype)
        self.pairs, self.of_image, self.of_texts = pairs, of_image, of_texts
        self.image = pairs.image.new_zeros(pairs.image.shape if of_image else 0, dtype=sums)
        self.texts = pairs.image.new_zeros(pairs.texts.shape if of_texts else 0, dtype=sums)
        self.gain = 2.0**14 if dtype == torch.float16 else 1.0
        shape = blocks(pairs.image.shape[0], pairs.texts.shape[0], pairs.tile)
        self._buffer = None if dtype == sums else aligned(*shape, pairs.image, dtype)

    def buffer(self, tile: Tile) -> torch.Tensor | None:
        rows, columns = tile.dots.shape
        return None if self._buffer is None else self._buffer[:rows, :columns]

    def add(self, tile: Tile) -> None:
        """Multiply the gradient that now lies in `buffer(tile)` or in `tile.dots`."""
        buffer = self.buffer(tile)
        gradient = tile.dots if buffer is None else buffer
        if self.of_image:
            add_product_(self.image[tile.rows], gradient, self.pairs.texts[tile.columns])
        if self.of_texts:
            add_product_(self.texts[tile.columns], gradient.T, self.pairs.image[tile.rows])

    def scaled(self, factor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The two sums times a 0-D factor, in place."""
        factor = factor / self.gain
        return self.image.mul_(factor), self.texts.mul_(factor)
