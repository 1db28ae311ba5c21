"""Cross entropy on class labels, for a plain ViT whose image features are its logits."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.nn import functional as F

from compt_megatron.errors import UserError
from compt_megatron.numerics import full_precision, math_dtype
from compt_megatron.objectives.base import LabelledBatch, ObjectiveResult
from compt_megatron.share import ranks


class ClassifyObjective:
    """Mean cross entropy of logits outputs["image"] [b, classes] on batch.labels [b] int64.

    `label_smoothing` in [0, 1) is the target mass spread evenly over all classes (Szegedy et al. 2016). Raises
    UserError where the data have no labels.
    """

    name = "classify"
    couples_rows = False

    def __init__(self, label_smoothing: float = 0.0) -> None:
        if not 0.0 <= label_smoothing < 1.0:
            raise UserError(f"objective.label_smoothing is {label_smoothing}; use a number from 0 to below 1")
        self.label_smoothing = label_smoothing

    def divisor(self, batch: LabelledBatch, group: dist.ProcessGroup | None = None) -> float:
        """The rows of all ranks."""
        return float(_labels(batch).shape[0] * ranks(group)[1])

    def __call__(
        self,
        outputs: dict[str, torch.Tensor],
        batch: LabelledBatch | None,
        group: dist.ProcessGroup | None = None,
        divisor: torch.Tensor | float | None = None,
    ) -> ObjectiveResult:
        """This rank's share: the sum over its rows, divided by the rows of all ranks."""
        labels = _labels(batch)
        logits = outputs["image"]
        rows = logits.shape[0] * ranks(group)[1] if divisor is None else divisor
        with full_precision(logits.device):
            loss = F.cross_entropy(
                logits.to(math_dtype(logits)),
                labels.to(logits.device),
                label_smoothing=self.label_smoothing,
                reduction="sum",
            )
            loss = loss / rows
        return ObjectiveResult(loss, {"classify": loss.detach()})


def _labels(batch: LabelledBatch | None) -> torch.Tensor:
    if batch is None or batch.labels is None:
        raise UserError("objective 'classify' needs labels, and data.train has none; use labelled shards (.cls)")
    return batch.labels
