"""The contrastive loss of CLIP over the global batch, with several captions an image."""

from __future__ import annotations

import torch
import torch.distributed as dist

from compt_kernels.contrastive import contrastive_loss
from compt_megatron.numerics import math_dtype, unit_rows
from compt_megatron.objectives.base import LabelledBatch, ObjectiveResult, slots
from compt_megatron.objectives.captions import SameCaption, caption_labels, check_same_caption
from compt_megatron.share import several


class ClipObjective:
    """InfoNCE between images and texts (Radford et al. 2021, figure 3), as open_clip computes it.

    With K captions an image, slot k of all images forms its own B x B problem, and the loss is the mean over slots:
    CoM-PT's published recipe. `same_caption`: `separate` makes a row's own column its only target (open_clip);
    `shared` spreads the target evenly over all columns whose caption has the same tokens, in both directions.
    """

    name = "clip"
    couples_rows = True

    def __init__(self, same_caption: SameCaption = "separate") -> None:
        check_same_caption(self.name, same_caption)
        self.same_caption = same_caption

    def __call__(
        self, outputs: dict[str, torch.Tensor], batch: LabelledBatch | None, group: dist.ProcessGroup | None = None
    ) -> ObjectiveResult:
        """This rank's share. It holds local rows against all columns, never the B x B matrix of all ranks."""
        image, text, scale = outputs["image"], outputs["text"], outputs["logit_scale"]
        captions, dtype = slots(image, text), math_dtype(image, text)
        labels = caption_labels(batch, image.shape[0], captions, self.same_caption, image.device)
        image, text = unit_rows(image.to(dtype))[0], unit_rows(text.to(dtype))[0]
        loss = image.new_zeros(())
        for slot, of_slot in enumerate(labels):
            loss = loss + contrastive_loss(image, text[slot::captions], scale, of_slot, several(group))
        loss = loss / captions
        return ObjectiveResult(loss, {"clip": loss.detach()})
