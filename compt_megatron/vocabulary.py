"""A rank's rows of a language model's head: what a loss needs to make logits from hidden states piece by piece."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Head:
    """This tensor-parallel rank's vocabulary entries `first` to `first + rows`.

    weight: [rows or more, width]; rows behind the first `rows` are padding and no entries. `group`: the ranks that have
    the others (None: this one has all `vocab`). With a hidden state of the same width, logits are hidden @ weightᵀ.
    """

    weight: torch.Tensor
    rows: int
    first: int
    vocab: int
    group: dist.ProcessGroup | None = None
