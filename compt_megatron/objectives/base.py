"""What an objective is: features of a batch -> this rank's share of the global batch's loss."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist

from compt_megatron.share import ObjectiveResult

__all__ = ["LabelledBatch", "Objective", "ObjectiveResult", "RowObjective", "slots"]


class LabelledBatch(Protocol):
    """The part of data.Batch that objectives read: texts [b, captions, ctx] int64 or None, labels [b] int64 or None."""

    @property
    def texts(self) -> torch.Tensor | None: ...

    @property
    def labels(self) -> torch.Tensor | None: ...


class Objective(Protocol):
    """A loss over features.

    `couples_rows`: whether a row's loss depends on other rows, so that it can only be taken of all features at once.
    A loss that does not is a sum over rows: its shares of micro-batches, each given the `divisor` of the global batch,
    sum to its share of the whole.

    `outputs` holds plain tensors of any float dtype, from a model or from a cache of features: image [b, d] and text
    [b * captions, d] (sample-major: the captions of a sample are neighbours), both un-normalised; logit_scale 0-D,
    already exponentiated; optionally logit_bias 0-D. All ranks of `group` (None: the default group) hold the same b.
    """

    name: str
    couples_rows: bool

    def __call__(self, outputs: dict[str, Any], batch: Any, group: dist.ProcessGroup | None = None) -> ObjectiveResult:
        """This rank's share. `batch`: the rows that `outputs` are of, of which each objective says what it reads
        (a LabelledBatch, or a language model's TokenBatch); None where it reads nothing."""
        ...


@runtime_checkable
class RowObjective(Protocol):
    """An objective that does not couple rows."""

    name: str
    couples_rows: bool

    def divisor(self, batch: Any, group: dist.ProcessGroup | None = None) -> torch.Tensor | float:
        """What the sum over the rows of the global batch is divided by; `batch`: this rank's. May be collective."""
        ...

    def __call__(
        self,
        outputs: dict[str, Any],
        batch: Any,
        group: dist.ProcessGroup | None = None,
        divisor: torch.Tensor | float | None = None,
    ) -> ObjectiveResult:
        """`divisor`: that of the global batch, where `batch` is a part of this rank's."""
        ...


def slots(image: torch.Tensor, text: torch.Tensor) -> int:
    """How many captions an image has, from image [b, d] and text [b * captions, d]."""
    assert text.shape[0] % image.shape[0] == 0, f"{text.shape[0]} texts are not a multiple of {image.shape[0]} images"
    return text.shape[0] // image.shape[0]
