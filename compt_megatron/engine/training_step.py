"""The training step that both engines share: losses over the global batch, the teacher, what a step reports.

An engine adds how features come out of its model and how gradients reach its optimizer (the abstract methods).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from compt_megatron.align.alignment import Alignment
from compt_megatron.align.projection import Projections
from compt_megatron.align.teacher import Teacher
from compt_megatron.data.text.batch import TokenBatch
from compt_megatron.engine.cached_gradients import CachedGradients
from compt_megatron.engine.contract import AnyBatch, StepResult
from compt_megatron.engine.layers import choose_layers
from compt_megatron.engine.run_checkpoint import RunCheckpoint
from compt_megatron.engine.runtime import Runtime, seed_step
from compt_megatron.engine.schedule import learning_rate
from compt_megatron.engine.student import Outputs
from compt_megatron.engine.topology import Topology
from compt_megatron.errors import UserError
from compt_megatron.objectives.base import Objective, RowObjective
from compt_megatron.recipe.schema import Settings
from compt_megatron.spec.table import ModelSpec

_MAX_SKIPPED_IN_A_ROW = 20

Shares = tuple[torch.Tensor, dict[str, torch.Tensor]]  # of the loss and of its parts
LossOf = Callable[[int, Outputs], Shares]  # index and outputs of a micro-batch


class TrainingEngine(ABC):
    """One link's student in training. See `engine.contract.Engine` for what the public methods promise."""

    def __init__(
        self,
        spec: ModelSpec,
        settings: Settings,
        objective: Objective,
        runtime: Runtime,
        *,
        total_steps: int,
        teacher: Teacher | None = None,
        alignment: Alignment | None = None,
        projections: Projections | None = None,
        factors: Mapping[str, tuple[float, float]] | None = None,
    ) -> None:
        """The student of one link, without weights (`load`), in the layout of `settings.parallel`. Collective.

        The teacher must have been made for the same layout's process groups. `factors`: on learning rate and weight
        decay, by canonical name, as a growth certificate's `rates` has them; 1 for tensors that it does not name.
        """
        self.spec, self.settings, self.objective, self.runtime = spec, settings, objective, runtime
        self.total_steps, self.teacher, self.alignment = total_steps, teacher, alignment
        self.topology = Topology.start(settings.parallel)
        self.parallel = settings.parallel.as_run(self.topology.data, settings.precision)
        self.factors = dict(factors or {})
        self.global_step = 0
        self._skipped_in_a_row = 0
        self._part_names: dict[bool, list[str]] = {}
        self._dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
        self.optimizer_name = ""  # which code makes the optimizer's steps, for people
        self._layers = choose_layers(spec, self.parallel, self._dtype, runtime.device)
        self._checkpoint: RunCheckpoint
        self._build(projections)

    @property
    def implementation(self) -> str:
        """Which code the blocks and the optimizer's steps are made of, for people."""
        return f"{self._layers.name}; {self.optimizer_name}"

    # -- what an engine has of its own -------------------------------------------------------------------------------

    @abstractmethod
    def _build(self, projections: Projections | None) -> None:
        """Make the model, the optimizer and the run checkpoint."""

    @abstractmethod
    def _forward(self, batch: AnyBatch) -> Outputs:
        """The outputs of one micro-batch, with graph. Only where the model is not a pipeline."""

    @abstractmethod
    def _forward_without_graph(self, micro: Sequence[AnyBatch]) -> CachedGradients | None:
        """The outputs of all micro-batches as leaves; None on the ranks where none come out."""

    @abstractmethod
    def _backward(self, loss: torch.Tensor) -> None:
        """Send the gradient of a loss share back into the only micro-batch."""

    def _outputs_of(self, cached: CachedGradients) -> Outputs:
        """What the loss is of: the cached outputs, and what an engine adds to them."""
        return cached.outputs

    def _backward_outputs(self, loss: torch.Tensor) -> None:
        """Send the gradient of a loss share back to the cached outputs."""
        loss.backward()

    @abstractmethod
    def _backward_cached(self, micro: Sequence[AnyBatch], cached: CachedGradients | None) -> None:
        """Forward every micro-batch again and send the cached gradients back."""

    @abstractmethod
    def _backward_rows(self, micro: Sequence[AnyBatch], loss_of: LossOf) -> list[Shares]:
        """Forward and backward of every micro-batch with its own loss; the shares, without graph, on the ranks where
        outputs come out."""

    @abstractmethod
    def _forward_rows(self, micro: Sequence[AnyBatch], loss_of: LossOf) -> list[Shares]:
        """The same in evaluation mode, without backward."""

    @abstractmethod
    def _update(self, rate: float, refuse: bool = False) -> tuple[float, bool]:
        """One optimizer step at a learning rate, or with `refuse` none, the gradients dropped: the global gradient
        norm, and whether it was refused."""

    @abstractmethod
    def eval_features(
        self, images: torch.Tensor | None = None, texts: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Un-normalised fp32 features of this rank's rows, on every rank. Collective where the model is split."""

    @abstractmethod
    def close(self) -> None:
        """Free what the engine holds on this rank, so that the next link starts with the memory free."""

    # -- one step ----------------------------------------------------------------------------------------------------

    def step(self, batch: AnyBatch) -> StepResult:
        """One optimizer step; `batch` holds the rows of the global batch that this rank's copy of the model has."""
        batch = batch.to(self.runtime.device)
        micro = batch.split(self.settings.parallel.micro_batches)
        targets = self._teacher_features(batch) if self._aligning else None
        cached, shares = None, None
        whole = len(micro) == 1 and self.topology.pipeline == 1
        if self.spec.is_language_model or (not whole and not self._couples_rows):
            return self._step_by_rows(batch, micro, targets)
        if whole:
            self._seed(0)
            shares = self._loss(self._forward(micro[0]), batch, targets)
        else:
            cached = self._forward_without_graph(micro)
            if cached is not None:
                shares = self._loss(self._outputs_of(cached), batch, targets)
        totals = self._totals(shares)
        if not all(math.isfinite(value) for value in totals.values()):
            return self._finish(totals, batch, grad_norm=math.inf, skipped=True)
        if whole:
            assert shares is not None
            self._backward(shares[0])
        else:
            if shares is not None:
                self._backward_outputs(shares[0])
            self._backward_cached(micro, cached)
        return self._updated(totals, batch)

    def _step_by_rows(self, batch: AnyBatch, micro: Sequence[AnyBatch], targets: Outputs | None) -> StepResult:
        """A step whose loss is a sum over rows: each micro-batch goes forward and backward once."""
        shares = _summed(self._backward_rows(micro, self._loss_of_rows(batch, micro, targets)))
        totals = self._totals(shares)
        return self._updated(totals, batch, refuse=not all(math.isfinite(value) for value in totals.values()))

    def _loss_of_rows(self, batch: AnyBatch, micro: Sequence[AnyBatch], targets: Outputs | None) -> LossOf:
        """The share of each micro-batch in the loss of the global batch. Collective where the divisor is."""
        assert isinstance(self.objective, RowObjective)
        divisor = self.objective.divisor(batch, self.topology.data_group)

        def loss_of(index: int, outputs: Outputs) -> Shares:
            part = None
            if targets is not None:
                part = {key: value.chunk(len(micro))[index] for key, value in targets.items()}
            return self._loss(outputs, micro[index], part, len(batch), divisor)

        return loss_of

    @torch.no_grad()
    def eval_loss(self, batch: AnyBatch) -> dict[str, float]:
        """The objective's loss and its parts on a batch of which this rank has its copy's rows, on every rank, without
        alignment. Collective. For objectives that do not couple rows; in a virtual pipeline the rows must be a multiple
        of the stages."""
        batch = batch.to(self.runtime.device)
        micro = batch.split(self.topology.pipeline if self.topology.virtual > 1 else 1)
        shares = _summed(self._forward_rows(micro, self._loss_of_rows(batch, micro, None)))
        names = ["loss", *self.topology.told_by_last(None if shares is None else [*shares[1]])]
        values = None if shares is None else _stacked(shares)
        return dict(zip(names, self.topology.total(values, len(names), self.runtime.device).tolist(), strict=True))

    @property
    def _couples_rows(self) -> bool:
        """Whether the loss needs the features of all micro-batches at once."""
        return self.objective.couples_rows or (self.alignment is not None and self.alignment.clamp)

    @property
    def _aligning(self) -> bool:
        """Whether this step has an alignment loss; the teacher need not run otherwise."""
        return self.alignment is not None and self.alignment.weight_at(self.global_step, self.total_steps) > 0

    def _seed(self, micro_batch: int) -> None:
        seed_step(self.settings.seed, self.global_step, micro_batch, self.topology.data_rank)

    def _teacher_features(self, batch: AnyBatch) -> Outputs | None:
        if self.teacher is None:
            return None
        if isinstance(batch, TokenBatch):
            return self.teacher.hidden(batch.tokens)
        rows = max(1, batch.images.shape[0] // self.settings.parallel.micro_batches)
        parts = []
        for start in range(0, batch.images.shape[0], rows):
            texts = None if batch.texts is None else batch.texts[start : start + rows].flatten(0, 1)
            parts.append(self.teacher.features(batch.images[start : start + rows], texts))
        return {key: torch.cat([part[key] for part in parts]) for key in parts[0] if parts[0][key].dim()}

    def _loss(
        self,
        outputs: Outputs,
        batch: AnyBatch,
        targets: Outputs | None,
        rows: int | None = None,
        divisor: torch.Tensor | float | None = None,
    ) -> Shares:
        """This rank's share of the global loss, and of its parts. `rows`, `divisor`: this rank's rows and the
        objective's divisor, where `batch` is one of several micro-batches."""
        group = self.topology.data_group
        if divisor is None:
            task = self.objective(outputs, batch, group)
        else:
            assert isinstance(self.objective, RowObjective)
            task = self.objective(outputs, batch, group, divisor)
        if self.alignment is None or targets is None:
            return task.loss, task.parts
        aligned = self.alignment(
            outputs,
            targets,
            step=self.global_step,
            total_steps=self.total_steps,
            global_rows=(len(batch) if rows is None else rows) * self.topology.data,
            task_loss=task.loss,
            group=group,
        )
        return task.loss + aligned.loss, task.parts | aligned.parts

    def _totals(self, shares: Shares | None) -> dict[str, float]:
        """Loss and parts of the global batch, on every rank."""
        if self._aligning not in self._part_names:  # a step with and one without alignment have different parts
            self._part_names[self._aligning] = self.topology.told_by_last(None if shares is None else [*shares[1]])
        names, values = ["loss", *self._part_names[self._aligning]], None
        if shares is not None:
            values = _stacked(shares)
        return dict(zip(names, self.topology.total(values, len(names), self.runtime.device).tolist(), strict=True))

    def _updated(self, totals: dict[str, float], batch: AnyBatch, refuse: bool = False) -> StepResult:
        """The optimizer's step with the gradients that are there, and what the whole step did."""
        rate = learning_rate(self.settings.optimizer, self.global_step, self.total_steps)
        norm, refused = self._update(rate, refuse)
        return self._finish(totals, batch, norm if math.isfinite(norm) and norm >= 0 else math.inf, refused)

    def _finish(self, totals: dict[str, float], batch: AnyBatch, grad_norm: float, skipped: bool) -> StepResult:
        rate = learning_rate(self.settings.optimizer, self.global_step, self.total_steps)
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped else 0
        if self._skipped_in_a_row > _MAX_SKIPPED_IN_A_ROW:
            raise UserError(
                f"step {self.global_step}: loss or gradient was not finite {self._skipped_in_a_row} steps in a row "
                "(weights untouched); lower optimizer.lr, set optimizer.clip_grad, or check the data"
            )
        aligned = self._aligning
        self.global_step += 1
        loss = totals.pop("loss")
        return StepResult(loss, totals, grad_norm, rate, skipped, len(batch) * self.topology.data, aligned)

    # -- features ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def alignment_at_start(self, batch: AnyBatch) -> dict[str, float]:
        """The unweighted alignment loss of each tower on one batch, before any step (zero for an exact growth)."""
        if self.teacher is None or self.alignment is None or isinstance(batch, TokenBatch):
            return {}  # a language model's features are those of another width: no growth makes the term zero
        batch = batch.to(self.runtime.device)
        targets = self._teacher_features(batch)
        texts = None if batch.texts is None else batch.texts.flatten(0, 1)
        outputs = self.eval_features(batch.images, texts)
        assert targets is not None
        return self.alignment.unweighted(outputs, targets, self.topology.data_group)

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def save(self, path: Path, train: dict[str, Any], lineage: list[dict[str, Any]], **metadata: Any) -> Path:
        """Write the run checkpoint: weights, fp32 masters (where weights are bf16), moments, steps. Collective."""
        return self._checkpoint.save(path, {"train": train, "lineage": lineage, **metadata})

    def load(self, path: Path, *, optimizer: bool = True) -> dict[str, Any]:
        """Read weights and, if it holds them, the optimizer state, from a checkpoint of any layout. Collective.

        Without optimizer state in it (a grown or exported checkpoint), or with `optimizer=False`, moments and step
        start at zero.
        """
        metadata, resumed = self._checkpoint.load(path, optimizer)
        self.global_step = int((metadata.get("train") or {}).get("step", 0)) if resumed else 0
        return metadata


def _summed(found: list[Shares]) -> Shares | None:
    """The shares of all micro-batches together; None where there are none."""
    if not found:
        return None
    losses, parts = zip(*found)
    return torch.stack(losses).sum(), {key: torch.stack([part[key] for part in parts]).sum() for key in parts[0]}


def _stacked(shares: Shares) -> torch.Tensor:
    return torch.stack([value.detach().float().reshape(()) for value in (shares[0], *shares[1].values())])
