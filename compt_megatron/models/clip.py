"""The whole model: two towers and the logit scale of CLIP, or the vision tower alone (a plain ViT)."""

from __future__ import annotations

from math import log

import torch
from torch import Tensor, nn

from compt_megatron.models.towers import TextTower, VisionTower

MAX_LOG_SCALE = log(100)


class ClipModel(nn.Module):
    """CLIP (arXiv 2103.00020), or with `text` None a plain ViT whose image features are class logits.

    `logit_scale` and `logit_bias` are parameters of shape [1] or None: they are 0-D in the table and in files, but
    DeepSpeed cannot broadcast 0-D parameters. The scale is kept as its logarithm.
    """

    def __init__(
        self,
        vision: VisionTower,
        text: TextTower | None,
        logit_scale: nn.Parameter | None = None,
        logit_bias: nn.Parameter | None = None,
    ) -> None:
        super().__init__()
        self.vision = vision
        self.text = text
        self.logit_scale = logit_scale
        self.logit_bias = logit_bias

    def encode_image(self, images: Tensor) -> Tensor:
        """images [b, 3, H, W] of any float dtype -> features [b, joint], not normalised, in the model's dtype."""
        return self.vision(images)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """token ids [b, n] int64 -> features [b, joint], not normalised, in the model's dtype."""
        assert self.text is not None, "a plain ViT has no text tower"
        return self.text(tokens)

    def forward(self, images: Tensor | None = None, texts: Tensor | None = None) -> dict[str, Tensor]:
        """Features of what is given, `image` [b, joint] and `text` [n, joint], and what the model has of `logit_scale`
        (the scale itself, not its logarithm) and `logit_bias`, 0-D, in fp32 or better."""
        outputs: dict[str, Tensor] = {}
        if images is not None:
            outputs["image"] = self.encode_image(images)
        if texts is not None:
            outputs["text"] = self.encode_text(texts)
        if self.logit_scale is not None:
            outputs["logit_scale"] = _at_least_fp32(self.logit_scale).exp()
        if self.logit_bias is not None:
            outputs["logit_bias"] = _at_least_fp32(self.logit_bias)
        return outputs

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Keep the scale within 1 to 100, as open_clip's trainer does after every step.

        Where an optimizer holds fp32 master weights, clamp the master to [0, MAX_LOG_SCALE] instead: it overwrites
        this parameter at the next step.
        """
        if self.logit_scale is not None:
            self.logit_scale.clamp_(0.0, MAX_LOG_SCALE)


def _at_least_fp32(scalar: Tensor) -> Tensor:
    return scalar.to(torch.promote_types(scalar.dtype, torch.float32)).squeeze()
