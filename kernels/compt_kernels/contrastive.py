"""The losses between images and texts: CLIP's and SigLIP's, over the batch of all ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist

from compt_kernels import exchange
from compt_kernels.dispatch import Impl, use_kernels
from compt_kernels.ops.contrastive import clip_loss
from compt_kernels.ops.pairs import TILE
from compt_kernels.ops.siglip import sigmoid_loss
from compt_kernels.reference import contrastive as reference


def contrastive_loss(
    image: torch.Tensor,
    text: torch.Tensor,
    logit_scale: torch.Tensor,
    labels: torch.Tensor | None = None,
    group: dist.ProcessGroup | str | None = None,
    impl: Impl = "auto",
) -> torch.Tensor:
    """CLIP's InfoNCE between images and texts (Radford et al. 2021, figure 3), the mean over both directions; 0-D fp32.

    image, text: [n, d], row i of both a pair, of length 1 where cosines are meant (nothing is normalised here);
    products are taken in the wider of their dtypes and summed in fp32. logit_scale: one number that multiplies the
    products (the exponential of what is learned). All three get gradients where they require them. `labels` [n]
    int64: texts of equal label are the same text, and a row's target is spread evenly over all of its label.

    `group`: the pairs of all its ranks form one batch (None: this process alone). The result is this rank's share,
    the terms of its own images and texts: shares sum to the loss of the whole batch, and so do their gradients for the
    logit scale; the gradients of image and text are complete. Every rank must hold the same number of rows.

    No rows: 0. Extra memory of the kernels: 1.5 GiB of tiles (1 GiB in fp32), and 4 bytes per element of image and
    text for their sums; with a group, the texts of all ranks, and 4 bytes per element of those.
    """
    _check(image, text, labels, logit_scale)
    name = exchange.group_name(group)
    if use_kernels("contrastive_loss", impl, image, text):
        return clip_loss(image, text, logit_scale, labels, name, TILE, plain=False)
    return reference.contrastive_loss(image, text, logit_scale, labels, name)


def siglip_loss(
    image: torch.Tensor,
    text: torch.Tensor,
    logit_scale: torch.Tensor,
    logit_bias: torch.Tensor,
    labels: torch.Tensor | None = None,
    group: dist.ProcessGroup | str | None = None,
    impl: Impl = "auto",
) -> torch.Tensor:
    """-1/B sum_ij log sigmoid(z_ij (scale x_i . y_j + bias)), z = 1 for pairs, -1 else (Zhai et al. 2023, equation 1).

    As `contrastive_loss`; `logit_bias` is one number, and with `labels` all pairs of equal label are positive. The
    share of a rank: its images against the texts of all ranks.
    """
    _check(image, text, labels, logit_scale, logit_bias)
    name = exchange.group_name(group)
    if use_kernels("siglip_loss", impl, image, text):
        return sigmoid_loss(image, text, logit_scale, logit_bias, labels, name, TILE, plain=False)
    return reference.siglip_loss(image, text, logit_scale, logit_bias, labels, name)


def _check(image: torch.Tensor, text: torch.Tensor, labels: torch.Tensor | None, *scalars: torch.Tensor) -> None:
    if image.ndim != 2 or image.shape != text.shape:
        raise ValueError(f"image and text must be [n, d] alike, not {tuple(image.shape)} and {tuple(text.shape)}")
    if labels is not None and (labels.shape != image.shape[:1] or labels.dtype != torch.int64):
        raise ValueError(f"labels must be int64 [{image.shape[0]}], not {labels.dtype} {tuple(labels.shape)}")
    for scalar in scalars:
        if scalar.numel() != 1:
            raise ValueError(f"the logit scale and bias are one number each, not {tuple(scalar.shape)}")
    for other in (text, *scalars, *(() if labels is None else (labels,))):
        if other.device != image.device:
            raise ValueError(f"image is on {image.device}, but another tensor on {other.device}")
