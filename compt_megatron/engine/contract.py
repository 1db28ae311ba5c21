"""The contract that every engine keeps: build it for one link, feed it batches, save and load the run's checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from compt_megatron.data.batch import Batch
from compt_megatron.data.text.batch import TokenBatch
from compt_megatron.spec.table import ModelSpec

AnyBatch = Batch | TokenBatch


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did, equal on all ranks.

    `loss` and `parts` are of the global batch; `grad_norm` is the global L2 norm before clipping (inf where the step
    was skipped because of it); `samples` counts the global batch; `aligned`: the teacher ran.
    """

    loss: float
    parts: dict[str, float] = field(default_factory=dict)
    grad_norm: float = 0.0
    lr: float = 0.0
    skipped: bool = False
    samples: int = 0
    aligned: bool = False


class Engine(Protocol):
    """One model in training on this rank."""

    spec: ModelSpec

    def step(self, batch: AnyBatch) -> StepResult:
        """One optimizer step; `batch` holds this rank's rows of the global batch."""
        ...

    def save(self, path: Path, train: dict[str, Any], lineage: list[dict[str, Any]]) -> Path:
        """Write the run checkpoint to `path` (collective). `train` is the position: step, samples, streams ..."""
        ...

    def load(self, path: Path, *, optimizer: bool = True) -> dict[str, Any]:
        """Read a run checkpoint of the same model from any layout (collective). Returns its metadata."""
        ...

    def eval_features(
        self, images: torch.Tensor | None = None, texts: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Un-normalised features of this rank's rows: images [b, 3, H, W], texts [b, context]; no graph."""
        ...

    def close(self) -> None:
        """Free what the engine holds on this rank."""
        ...
