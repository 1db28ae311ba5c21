"""The contrastive loss of CLIP over the global batch, with several captions an image."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.nn import functional as F

from compt_megatron.numerics import full_precision, math_dtype, unit_rows
from compt_megatron.objectives.base import LabelledBatch, ObjectiveResult, slots
from compt_megatron.objectives.captions import SameCaption, check_same_caption, own_columns, positives
from compt_megatron.objectives.gather import gather_rows


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
        """This rank's share. It holds local rows against gathered columns, never the B x B matrix of all ranks."""
        image, text, scale = outputs["image"], outputs["text"], outputs["logit_scale"]
        rows, captions = image.shape[0], slots(image, text)
        dtype = math_dtype(image, text)
        with full_precision(image.device):
            image = unit_rows(image.to(dtype))[0]
            text = unit_rows(text.to(dtype))[0]
            images = gather_rows(image, group)
            texts = gather_rows(text, group)
            same = positives(batch, rows, captions, self.same_caption, group, image.device)
            own = own_columns(rows, group, image.device)
            loss = image.new_zeros(())
            for slot in range(captions):
                targets = own if same is None else same[slot]
                image_rows = scale.to(dtype) * (image @ texts[slot::captions].T)
                text_rows = scale.to(dtype) * (text[slot::captions] @ images.T)
                loss = loss + _cross_entropy(image_rows, targets) + _cross_entropy(text_rows, targets)
            loss = loss / (2 * captions * images.shape[0])
        return ObjectiveResult(loss, {"clip": loss.detach()})


def _cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Summed over rows. logits [rows, columns]; targets [rows] int64, or [rows, columns] bool that share the mass."""
    if targets.dtype != torch.bool:
        return F.cross_entropy(logits, targets, reduction="sum")
    mass = targets.to(logits.dtype)
    return F.cross_entropy(logits, mass / mass.sum(1, keepdim=True), reduction="sum")
