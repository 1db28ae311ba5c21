"""The pairwise sigmoid loss of SigLIP over the global batch."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.nn import functional as F

from compt_megatron.errors import UserError
from compt_megatron.numerics import full_precision, math_dtype, unit_rows
from compt_megatron.objectives.base import LabelledBatch, ObjectiveResult, slots
from compt_megatron.objectives.captions import SameCaption, check_same_caption, own_columns, positives
from compt_megatron.objectives.gather import gather_rows


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
        rows, captions = image.shape[0], slots(image, text)
        dtype = math_dtype(image, text)
        with full_precision(image.device):
            image = unit_rows(image.to(dtype))[0]
            texts = gather_rows(unit_rows(text.to(dtype))[0], group)
            same = positives(batch, rows, captions, self.same_caption, group, image.device)
            columns = texts.shape[0] // captions
            if same is None:
                own = own_columns(rows, group, image.device)
                same = F.one_hot(own, columns).bool().expand(captions, rows, columns)
            loss = image.new_zeros(())
            for slot in range(captions):
                logits = scale.to(dtype) * (image @ texts[slot::captions].T) + bias.to(dtype)
                loss = loss - F.logsigmoid(torch.where(same[slot], logits, -logits)).sum()
            loss = loss / (captions * columns)
        return ObjectiveResult(loss, {"siglip": loss.detach()})
