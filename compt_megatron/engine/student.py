"""The module in training: the model and, where its features differ in width from the teacher's, the projections."""

from __future__ import annotations

import torch
from torch import nn

from compt_megatron.align.projection import Projections
from compt_megatron.models.clip import ClipModel

Outputs = dict[str, torch.Tensor]


class Student(nn.Module):
    """One module, one forward: everything the loss needs comes out of it, so that any wrapper (ZeRO) sees all uses.

    Outputs are rows ([b, ...], one or `captions` per sample) except 0-D ones such as `logit_scale`.
    """

    def __init__(self, model: ClipModel, projections: Projections | None = None) -> None:
        super().__init__()
        self.model = model
        self.projections = projections

    def forward(self, images: torch.Tensor | None = None, texts: torch.Tensor | None = None) -> Outputs:
        """images [b, 3, H, W], texts [n, context] -> un-normalised features, logit scale and aligned features."""
        outputs = self.model(images=images, texts=texts)
        return outputs if self.projections is None else self.projections(outputs)


def is_per_row(value: torch.Tensor) -> bool:
    """Whether an output has a row for each sample; 0-D outputs belong to the model as a whole."""
    return value.dim() > 0


def join_rows(parts: list[Outputs]) -> Outputs:
    """The outputs of a whole batch from those of its micro-batches, in order."""
    return {
        key: torch.cat([part[key] for part in parts]) if is_per_row(value) else value for key, value in parts[0].items()
    }
