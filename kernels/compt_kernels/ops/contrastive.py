"""CLIP's loss over the global batch without the matrix of all pairs.

The products image x text are walked in tiles. Forward: one product a tile, of which only the log-sum-exp of its rows
and columns stays. Backward: the same product again, a kernel that turns its logits into their gradient, and two
products with that. Where all pairs are one tile of one process, the forward makes the gradient from the products at
hand: three products instead of four.

Each rank of a group multiplies its own images with the texts of all ranks, so that every pair is multiplied once.
The columns' log-sum-exp takes two all-reduces of [B], the gradient of the texts a reduce-scatter of [B, d] in fp32.
A rank keeps the gathered texts [B, d] until the backward.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from compt_kernels import exchange
from compt_kernels.ops.pairs import Gradients, Pairs, Tile, gather_pairs, walk
from compt_kernels.ops.scale import refuse_second_derivative, wanted_only
from compt_kernels.ops.tiles import NOTHING, tiles
from compt_kernels.products import common_dtype, sum_dtype

torch.library.define(
    "compt_kernels::contrastive_forward",
    "(Tensor image, Tensor text, Tensor scale, Tensor? labels, str group, int tile, bool plain, bool gradient, "
    "bool image_gradient, bool text_gradient) "
    "-> (Tensor loss, Tensor rows, Tensor columns, Tensor texts, Tensor all_labels, "
    "Tensor d_image, Tensor d_text, Tensor d_scale)",
)
torch.library.define(
    "compt_kernels::contrastive_backward",
    "(Tensor upstream, Tensor image, Tensor texts, Tensor scale, Tensor rows, Tensor columns, Tensor? labels, "
    "Tensor? all_labels, str group, int tile, bool plain, bool image_gradient, bool text_gradient) "
    "-> (Tensor d_image, Tensor d_text, Tensor d_scale)",
)


def clip_loss(
    image: torch.Tensor,
    text: torch.Tensor,
    logit_scale: torch.Tensor,
    labels: torch.Tensor | None,
    group: str,
    tile: int,
    plain: bool,
) -> torch.Tensor:
    """`contrastive_loss` by tiles of at most `tile` elements, with the kernels or with their `plain` form."""
    wanted = [torch.is_grad_enabled() and x.requires_grad for x in (image, text, logit_scale)]
    labels = None if labels is None else labels.contiguous()
    return _Contrastive.apply(image, text, logit_scale, labels, group, tile, plain, *wanted)


class _Contrastive(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        image: torch.Tensor,
        text: torch.Tensor,
        scale: torch.Tensor,
        labels: torch.Tensor | None,
        group: str,
        tile: int,
        plain: bool,
        image_gradient: bool,
        text_gradient: bool,
        scale_gradient: bool,
    ) -> torch.Tensor:
        wanted = (image_gradient, text_gradient, scale_gradient)
        at_once = any(wanted) and not group and image.shape[0] ** 2 <= tile
        loss, rows, columns, texts, all_labels, *gradients = torch.ops.compt_kernels.contrastive_forward(
            image, text, scale, labels, group, tile, plain, at_once, image_gradient, text_gradient
        )
        ctx.at_once, ctx.wanted, ctx.options = at_once, wanted, (group, tile, plain, image_gradient, text_gradient)
        ctx.dtypes = (image.dtype, text.dtype, scale.dtype)
        if at_once:
            ctx.save_for_backward(*gradients)
        elif any(wanted):
            if not group:
                texts, all_labels = text, labels
            ctx.save_for_backward(image, texts, scale, rows, columns, labels, None if labels is None else all_labels)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        refuse_second_derivative("contrastive_loss")
        if ctx.at_once:
            gradients = [upstream * saved for saved in ctx.saved_tensors]
        else:
            gradients = torch.ops.compt_kernels.contrastive_backward(upstream, *ctx.saved_tensors, *ctx.options)
        return *wanted_only(gradients, ctx.dtypes, ctx.wanted), *(None,) * 7


def _forward(
    image: torch.Tensor,
    text: torch.Tensor,
    scale: torch.Tensor,
    labels: torch.Tensor | None,
    group: str,
    tile: int,
    plain: bool,
    gradient: bool,
    image_gradient: bool,
    text_gradient: bool,
) -> tuple[torch.Tensor, ...]:
    """The loss, the vectors of its gradient (`_finish`) and what was gathered; with `gradient` that itself, in fp32."""
    pairs = gather_pairs(image, text, labels, group, tile)
    n, batch = pairs.image.shape[0], pairs.texts.shape[0]
    factor = scale.to(sum_dtype(pairs.image.dtype)).reshape(())
    rows, columns = factor.new_zeros((5, n)), factor.new_zeros((4, batch))
    rows[0], columns[0] = NOTHING, NOTHING
    last: tuple[Tile, ...] = ()
    with torch.autocast(image.device.type, enabled=False):
        for part in walk(pairs):
            states = rows[:, part.rows], columns[:, part.columns]
            tiles(plain).nce_statistics_(part.dots, factor, *states, *part.pairs)
            last = (part,)
        own = rows[4]
        if group:
            own = exchange.all_gather(own, group)
            _merge_over_ranks(columns, group)
        row_losses, rows = _finish(rows[:4], rows[4], factor)
        column_losses, columns = _finish(columns, own, factor)
        mine = slice(pairs.offset, pairs.offset + n)
        loss = ((row_losses.sum() + column_losses[mine].sum()) / (2 * max(batch, 1))).to(rows.dtype)
        rows[3] = -rows[3] - columns[3, mine]
        gradients = tuple(factor.new_empty(0) for _ in range(3))
        if gradient:
            gradients = _gradient(pairs, last, scale, rows, columns, plain, image_gradient, text_gradient)
    texts = pairs.texts if group else text.new_empty(0)
    all_labels = pairs.all_labels if group else None
    if all_labels is None:
        all_labels = text.new_empty(0, dtype=torch.int64)
    return loss, rows, columns, texts, all_labels, *gradients


def _backward(
    upstream: torch.Tensor,
    image: torch.Tensor,
    texts: torch.Tensor,
    scale: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    labels: torch.Tensor | None,
    all_labels: torch.Tensor | None,
    group: str,
    tile: int,
    plain: bool,
    image_gradient: bool,
    text_gradient: bool,
) -> tuple[torch.Tensor, ...]:
    """The gradient of image [n, d], of text [n, d] and this rank's part of that of the scale, in fp32.

    A pair's gradient holds the upstream factor of its row's rank and of its column's; the greatest is taken out.
    """
    n, dtype = image.shape[0], common_dtype(image, texts)
    rank = exchange.ranks(group)[0]
    pairs = Pairs(image.to(dtype), texts.to(dtype), labels, all_labels, rank * n, tile)
    factor = upstream.to(rows.dtype)
    with torch.autocast(image.device.type, enabled=False):
        if group:
            each = exchange.all_gather(factor.reshape(1), group)
            factor = each.abs().amax()
            relative = torch.where(factor == 0, 0.0, each / factor)
            rows = torch.cat((rows[:1], rows[1:] * relative[rank]))
            columns = torch.cat((columns[:1], columns[1:] * relative.repeat_interleave(n)))
        found = _gradient(pairs, walk(pairs), scale, rows, columns, plain, image_gradient, text_gradient)
        d_image, d_text, d_scale = (gradient.mul_(factor) for gradient in found)
        if group and text_gradient:
            d_text = exchange.reduce_scatter(d_text, group)
    return d_image, d_text, d_scale


def _gradient(
    pairs: Pairs,
    parts: Iterable[Tile],
    scale: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    plain: bool,
    image_gradient: bool,
    text_gradient: bool,
) -> tuple[torch.Tensor, ...]:
    """The gradients of image [n, d], of all texts [B, d] and of the scale by the vectors of rows and columns."""
    gradients, total = Gradients(pairs, image_gradient, text_gradient), rows.new_zeros((), dtype=torch.float64)
    factor = scale.to(rows.dtype).reshape(())
    for part in parts:
        vectors = rows[:, part.rows], columns[:3, part.columns]
        out = gradients.buffer(part)
        summed = tiles(plain).nce_gradient_(part.dots, factor, *vectors, *part.pairs, out, gradients.gain)
        total += summed.double().sum()
        gradients.add(part)
    mean = 1 / (2 * max(pairs.texts.shape[0], 1))
    return *gradients.scaled(mean * factor), (mean * total).to(rows.dtype).reshape(scale.shape)


def _merge_over_ranks(columns: torch.Tensor, group: str) -> None:
    """Complete the columns [4, B], of which each rank has seen its own rows."""
    highest = exchange.all_max_(columns[0].clone(), group)
    columns[1] *= torch.exp(columns[0] - highest)
    columns[0] = highest
    exchange.all_sum_(columns[1:], group)


def _finish(state: torch.Tensor, own: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """From the sums over other pairs, and the own dots: the losses, and the vectors [4, ...] of the gradient.

    The loss of a row is log(1 + exp(others - own)), which keeps its digits where the own pair has nearly all the mass,
    as does 1 - p = sigmoid(others - own). Vectors: a reference m and a factor w, so that p = w exp(z - m); the target
    of each positive pair; by how much the own pair's probability misses its target. In fp64: logits of fp32 near 100
    would cost the loss of an easy batch two digits.
    """
    (highest, summed, positive, count), own, scale = state.double(), own.double(), scale.double()
    reference = torch.maximum(highest, (own * scale).to(state.dtype).double())
    whole = summed * torch.exp(highest - reference) + torch.exp(own * scale - reference)
    gap = highest + summed.log() - own * scale
    share = 1 / (count + 1)
    losses = torch.logaddexp(gap, torch.zeros_like(gap)) - (positive - count * own) * scale * share
    vectors = torch.stack((reference, 1 / whole, share, torch.sigmoid(gap) - count * share))
    return losses, vectors.to(state.dtype)


torch.library.impl("compt_kernels::contrastive_forward", "default", _forward)
torch.library.impl("compt_kernels::contrastive_backward", "default", _backward)


@torch.library.register_fake("compt_kernels::contrastive_forward")
def _(image, text, scale, labels, group, tile, plain, gradient, image_gradient, text_gradient):  # type: ignore[no-untyped-def]
    n, batch = image.shape[0], image.shape[0] * exchange.ranks(group)[1]
    like = image.new_empty(0, dtype=sum_dtype(common_dtype(image, text)))
    return (
        like.new_empty(()),
        like.new_empty((4, n)),
        like.new_empty((4, batch)),
        text.new_empty(
            (batch, text.shape[1]) if group else 0, dtype=common_dtype(image, text) if group else text.dtype
        ),
        text.new_empty(batch if group and labels is not None else 0, dtype=torch.int64),
        like.new_empty(image.shape if gradient and image_gradient else 0),
        like.new_empty(text.shape if gradient and text_gradient else 0),
        like.new_empty(scale.shape if gradient else 0),
    )


@torch.library.register_fake("compt_kernels::contrastive_backward")
def _(  # type: ignore[no-untyped-def]
    upstream, image, texts, scale, rows, columns, labels, all_labels, group, tile, plain, image_gradient, text_gradient
):
    return (
        rows.new_empty(image.shape if image_gradient else 0),
        rows.new_empty(image.shape if text_gradient else 0),
        rows.new_empty(scale.shape),
    )
