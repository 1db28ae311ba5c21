"""The pairwise sigmoid loss of SigLIP over the global batch."""

from __future__ import annotations

import torch
import torch.distributed as dist

from compt_kernels.contrastive import siglip_loss
from compt_megatron.errors import UserError
from compt_megatron.numerics import math_dtype, unit_rows
from compt_megatron.objectives.base import LabelledBatch, ObjectiveResult, slots
from compt_megatron.objectives.captions import SameCaption, caption_labels, check_same_caption
from compt_megatron.share import several


class SigLipObjective:
    """-1/B sum_ij log sigmoid(z_ij (scale x_i . y_j + bias)), z = 1 for pairs, -1 else (Zhai et al. 2023, equation 1).

    With several captions an image, the mean over caption slots. `same_caption: shared` makes all pairs positive whose
    caption has the same tokens. Raises UserError where the model has no logit bias.
    """

    name = "siglip"
    couples_rows = True

    def __init__(self, same_caption: SameCaption = "separate") -> None:
        check_same_caption(self.name, same_caption)
        self.same_caption = same_caption

    def __call__(
        self, outputs: dict[str, torch.Tensor], batch: LabelledBatch | None, group: dist.ProcessGroup | None = None
    ) -> ObjectiveResult:
        """This rank's share: its images against the texts of all ranks."""
        image, text, scale = outputs["image"], outputs["text"], outputs["logit_scale"]
        bias = outputs.get("logit_bias")
        if bias is None:
            raise UserError("objective 'siglip' needs a logit bias: add \"init_logit_bias\": -10 to the model config")
        captions, dtype = slots(image, text), math_dtype(image, text)
        labels = caption_labels(batch, image.shape[0], captions, self.same_caption, image.device)
        image, text = unit_rows(image.to(dtype))[0], unit_rows(text.to(dtype))[0]
        loss = image.new_zeros(())
        for slot, of_slot in enumerate(labels):
            loss = loss + siglip_loss(image, text[slot::captions], scale, bias, of_slot, several(group))
        loss = loss / captions
        return ObjectiveResult(loss, {"siglip": loss.detach()})
