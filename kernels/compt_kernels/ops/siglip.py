"""SigLIP's loss over the global batch without the matrix of all pairs.

A tile's loss and the gradient of its logits need no other tile, so the gradient is made in the forward: three products
a tile instead of four. Each rank of a group multiplies its own images with the texts of all ranks and keeps its part
of the texts' gradient, [B, d] in fp32, until the backward sums it over the ranks by a reduce-scatter.
"""

from __future__ import annotations

from typing import Any

import torch

from compt_kernels import exchange
from compt_kernels.ops.pairs import Gradients, gather_pairs, walk
from compt_kernels.ops.scale import refuse_second_derivative, wanted_only
from compt_kernels.ops.tiles import tiles
from compt_kernels.products import common_dtype, sum_dtype

torch.library.define(
    "compt_kernels::siglip_forward",
    "(Tensor image, Tensor text, Tensor scale, Tensor bias, Tensor? labels, str group, int tile, bool plain, "
    "bool gradient, bool image_gradient, bool text_gradient) "
    "-> (Tensor loss, Tensor d_image, Tensor d_texts, Tensor d_scale, Tensor d_bias)",
)
torch.library.define("compt_kernels::reduce_scatter", "(Tensor x, str group) -> Tensor")


def sigmoid_loss(
    image: torch.Tensor,
    text: torch.Tensor,
    logit_scale: torch.Tensor,
    logit_bias: torch.Tensor,
    labels: torch.Tensor | None,
    group: str,
    tile: int,
    plain: bool,
) -> torch.Tensor:
    """`siglip_loss` by tiles of at most `tile` elements, with the kernels or with their `plain` form."""
    wanted = [torch.is_grad_enabled() and x.requires_grad for x in (image, text, logit_scale, logit_bias)]
    labels = None if labels is None else labels.contiguous()
    return _Siglip.apply(image, text, logit_scale, logit_bias, labels, group, tile, plain, *wanted)


class _Siglip(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        image: torch.Tensor,
        text: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor,
        labels: torch.Tensor | None,
        group: str,
        tile: int,
        plain: bool,
        image_gradient: bool,
        text_gradient: bool,
        scale_gradient: bool,
        bias_gradient: bool,
    ) -> torch.Tensor:
        wanted = (image_gradient, text_gradient, scale_gradient, bias_gradient)
        loss, *gradients = torch.ops.compt_kernels.siglip_forward(
            image, text, scale, bias, labels, group, tile, plain, any(wanted), image_gradient, text_gradient
        )
        ctx.group, ctx.wanted, ctx.dtypes = group, wanted, (image.dtype, text.dtype, scale.dtype, bias.dtype)
        if any(wanted):
            ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        refuse_second_derivative("siglip_loss")
        gradients = [upstream * saved for saved in ctx.saved_tensors]
        if ctx.group and ctx.wanted[1]:
            gradients[1] = torch.ops.compt_kernels.reduce_scatter(gradients[1], ctx.group)
        return *wanted_only(gradients, ctx.dtypes, ctx.wanted), *(None,) * 8


def _forward(
    image: torch.Tensor,
    text: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    labels: torch.Tensor | None,
    group: str,
    tile: int,
    plain: bool,
    gradient: bool,
    image_gradient: bool,
    text_gradient: bool,
) -> tuple[torch.Tensor, ...]:
    """The loss; the gradients of image [n, d], of all texts [B, d] (this rank's part), of scale and bias, in fp32."""
    pairs = gather_pairs(image, text, labels, group, tile)
    dtype = sum_dtype(pairs.image.dtype)
    factor, shift = scale.to(dtype).reshape(()), bias.to(dtype).reshape(())
    gradients = Gradients(pairs, gradient and image_gradient, gradient and text_gradient)
    sums = factor.new_zeros(3, dtype=torch.float64)
    with torch.autocast(image.device.type, enabled=False):
        for part in walk(pairs):
            out = gradients.buffer(part) if gradient else None
            found = tiles(plain).sigmoid_tile_(part.dots, factor, shift, *part.pairs, out, gradients.gain, gradient)
            sums += found.double().sum(1)
            if gradient:
                gradients.add(part)
        sums = (sums / max(pairs.texts.shape[0], 1)).to(dtype)
        d_image, d_texts = gradients.scaled(factor / max(pairs.texts.shape[0], 1))
    d_scale, d_bias = sums[1].reshape(scale.shape).clone(), sums[2].reshape(bias.shape).clone()
    return sums[0].clone(), d_image, d_texts, d_scale, d_bias


torch.library.impl("compt_kernels::siglip_forward", "default", _forward)
torch.library.impl("compt_kernels::reduce_scatter", "default", exchange.reduce_scatter)


@torch.library.register_fake("compt_kernels::siglip_forward")
def _(image, text, scale, bias, labels, group, tile, plain, gradient, image_gradient, text_gradient):  # type: ignore[no-untyped-def]
    batch = image.shape[0] * exchange.ranks(group)[1]
    like = image.new_empty(0, dtype=sum_dtype(common_dtype(image, text)))
    return (
        like.new_empty(()),
        like.new_empty(image.shape if gradient and image_gradient else 0),
        like.new_empty((batch, text.shape[1]) if gradient and text_gradient else 0),
        like.new_empty(scale.shape),
        like.new_empty(bias.shape),
    )


@torch.library.register_fake("compt_kernels::reduce_scatter")
def _(x, group):  # type: ignore[no-untyped-def]
    return x.new_empty((x.shape[0] // exchange.ranks(group)[1], *x.shape[1:]))
