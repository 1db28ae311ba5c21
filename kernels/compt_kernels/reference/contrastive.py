"""The losses of CLIP and SigLIP over the global batch in plain PyTorch, by autograd."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from compt_kernels.exchange import assert_equal_rows, gather_rows, ranks
from compt_kernels.products import common_dtype, sum_dtype


def contrastive_loss(
    image: torch.Tensor, text: torch.Tensor, logit_scale: torch.Tensor, labels: torch.Tensor | None, group: str
) -> torch.Tensor:
    """This rank's share of CLIP's InfoNCE (Radford et al. 2021, figure 3); see `compt_kernels.contrastive_loss`."""
    dtype = sum_dtype(common_dtype(image, text))
    with torch.autocast(image.device.type, enabled=False):
        image, text, scale = image.to(dtype), text.to(dtype), logit_scale.to(dtype)
        images, texts, targets = _everyone(image, group), _everyone(text, group), _targets(image, labels, group)
        loss = _cross_entropy(scale * (image @ texts.T), targets) + _cross_entropy(scale * (text @ images.T), targets)
        return loss / (2 * max(images.shape[0], 1))


def siglip_loss(
    image: torch.Tensor,
    text: torch.Tensor,
    logit_scale: torch.Tensor,
    logit_bias: torch.Tensor,
    labels: torch.Tensor | None,
    group: str,
) -> torch.Tensor:
    """This rank's share of the sigmoid loss (Zhai et al. 2023, equation 1); see `compt_kernels.siglip_loss`."""
    dtype = sum_dtype(common_dtype(image, text))
    with torch.autocast(image.device.type, enabled=False):
        image, texts = image.to(dtype), _everyone(text.to(dtype), group)
        logits = logit_scale.to(dtype) * (image @ texts.T) + logit_bias.to(dtype)
        targets = _targets(image, labels, group)
        same = targets if targets.dtype == torch.bool else F.one_hot(targets, max(texts.shape[0], 1)).bool()
        same = same[:, : texts.shape[0]]
        return -F.logsigmoid(torch.where(same, logits, -logits)).sum() / max(texts.shape[0], 1)


def _everyone(x: torch.Tensor, group: str) -> torch.Tensor:
    if group:
        assert_equal_rows(x, group)
    return gather_rows(x, group)


def _targets(image: torch.Tensor, labels: torch.Tensor | None, group: str) -> torch.Tensor:
    """Each row's own column [n] int64; with labels the columns of equal label [n, world * n] bool."""
    rows = image.shape[0]
    if labels is None:
        return torch.arange(rows, device=image.device) + ranks(group)[0] * rows
    return labels[:, None] == gather_rows(labels, group)[None, :]


def _cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Summed over rows; a bool target spreads its mass evenly."""
    if targets.dtype != torch.bool:
        return F.cross_entropy(logits, targets, reduction="sum")
    mass = targets.to(logits.dtype)
    return F.cross_entropy(logits, mass / mass.sum(1, keepdim=True), reduction="sum")
