"""The training step that both engines share: the order of things, and what a step reports.

An engine adds how features come out of its model and how gradients reach its optimizer (the abstract methods).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from compt_megatron.align.alignment import Alignment
from compt_megatron.align.distillation import Distillation
from compt_megatron.align.projection import Projections
from compt_megatron.align.teacher import Teacher
from compt_megatron.data.text.batch import TokenBatch
from compt_megatron.engine.cached_gradients import CachedGradients
from compt_megatron.engine.contract import AnyBatch, StepResult
from compt_megatron.engine.layers import choose_layers
from compt_megatron.engine.losses import Losses, LossOf, Shares, summed
from compt_megatron.engine.run_checkpoint import RunCheckpoint
from compt_megatron.engine.runtime import Runtime, seed_step
from compt_megatron.engine.schedule import learning_rate
from compt_megatron.engine.student import Outputs
from compt_megatron.engine.topology import Topology
from compt_megatron.errors import UserError
from compt_megatron.objectives.base import Objective
from compt_megatron.recipe.schema import Settings
from compt_megatron.spec.table import ModelSpec

_MAX_SKIPPED_IN_A_ROW = 20


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
        distillation: Distillation | None = None,
        projections: Projections | None = None,
        factors: Mapping[str, tuple[float, float]] | None = None,
    ) -> None:
        """The student of one link, without weights (`load`), in the layout of `settings.parallel`. Collective.

        The teacher must have been made for the same layout's process groups. `factors`: on learning rate and weight
        decay, by canonical name, as a growth certificate's `rates` has them; 1 for tensors that it does not name.
        """
        self.spec, self.settings, self.runtime, self.total_steps = spec, settings, runtime, total_steps
        self.topology = Topology.start(settings.parallel)
        self.losses = Losses(
            objective, self.topology, total_steps, settings.parallel.micro_batches, teacher, alignment, distillation
        )
        self.parallel = settings.parallel.as_run(self.topology.data, settings.precision)
        self.factors = dict(factors or {})
        self.global_step = 0
        self._skipped_in_a_row = 0
        self._part_names: dict[Any, list[str]] = {}
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
    def _backward_rows(self, micro: Sequence[AnyBatch], loss_of: LossOf, layers: Sequence[int]) -> list[Shares]:
        """Forward and backward of every micro-batch with its own loss; the shares, without graph, on the ranks where
        outputs come out: of the last stage, and of `layers` of a language model on the stages that have them."""

    @abstractmethod
    def _forward_rows(self, micro: Sequence[AnyBatch], loss_of: LossOf, layers: Sequence[int] = ()) -> list[Shares]:
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
        loss = self.losses.at(self.global_step)
        targets = loss.targets(batch)
        cached, shares = None, None
        whole = len(micro) == 1 and self.topology.pipeline == 1
        if self.spec.is_language_model or (not whole and not self.losses.couples_rows):
            return self._step_by_rows(batch, micro, targets)
        if whole:
            self._seed(0)
            shares = loss.of_batch(self._forward(micro[0]), batch, targets)
        else:
            cached = self._forward_without_graph(micro)
            if cached is not None:
                shares = loss.of_batch(self._outputs_of(cached), batch, targets)
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
        loss = self.losses.at(self.global_step)
        shares = summed(self._backward_rows(micro, loss.of_rows(batch, micro, targets), loss.layers))
        totals = self._totals(shares)
        return self._updated(totals, batch, refuse=not all(math.isfinite(value) for value in totals.values()))

    @torch.no_grad()
    def eval_loss(self, batch: AnyBatch) -> dict[str, float]:
        """The objective's loss and its parts on a batch of which this rank has its copy's rows, on every rank, without
        alignment. Collective. For objectives that do not couple rows; in a virtual pipeline the rows must be a multiple
        of the stages."""
        batch = batch.to(self.runtime.device)
        micro = batch.split(self.topology.pipeline if self.topology.virtual > 1 else 1)
        loss_of = self.losses.at(self.global_step).of_rows(batch, micro, None)
        return self._totals(summed(self._forward_rows(micro, loss_of)), "evaluation")

    def _seed(self, micro_batch: int) -> None:
        seed_step(self.settings.seed, self.global_step, micro_batch, self.topology.data_rank)

    def _totals(self, shares: Shares | None, kind: str = "step") -> dict[str, float]:
        """Loss and parts of the global batch, on every rank. `kind`: what the parts are of; told once for each."""
        loss = self.losses.at(self.global_step)
        key = (kind, loss.aligns, loss.distils)  # steps with and without such terms have different parts
        inner = self.topology.pipeline > 1 and bool(loss.layers) and kind != "evaluation"
        if key not in self._part_names:
            own = None if shares is None else [*shares[1]]
            told = self.topology.told_by_all(own) if inner else [self.topology.told_by_last(own)]
            self._part_names[key] = [*dict.fromkeys(name for names in reversed(told) for name in names or [])]
        names = ["loss", *self._part_names[key]]
        values = None
        if shares is not None:
            zero = torch.zeros((), device=self.runtime.device)
            values = torch.stack(
                [_number(shares[0]), *(_number(shares[1].get(name, zero)) for name in self._part_names[key])]
            )
        found = self.topology.total(values, len(names), self.runtime.device, inner)
        return dict(zip(names, found.tolist(), strict=True))

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
        taught = self.losses.at(self.global_step).taught
        self.global_step += 1
        loss = totals.pop("loss")
        return StepResult(loss, totals, grad_norm, rate, skipped, len(batch) * self.topology.data, taught)

    # -- features ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def alignment_at_start(self, batch: AnyBatch) -> dict[str, float]:
        """The unweighted alignment loss of each tower on one batch, before any step (zero for an exact growth, also of
        a language model, whose projections then begin as the first part of its states). Collective."""
        loss, alignment = self.losses.at(self.global_step), self.losses.alignment
        batch = batch.to(self.runtime.device)
        targets = loss.targets(batch)
        if alignment is None or targets is None or not loss.aligns:
            return {}
        if not isinstance(batch, TokenBatch):
            texts = None if batch.texts is None else batch.texts.flatten(0, 1)
            return alignment.unweighted(self.eval_features(batch.images, texts), targets, self.topology.data_group)
        micro = batch.split(self.topology.pipeline if self.topology.virtual > 1 else 1)
        found = self._forward_rows(micro, loss.states_of_rows(batch, micro, targets), loss.layers)
        totals = self._totals(summed(found), "start")
        return {name.removeprefix("align/"): value for name, value in totals.items() if name.startswith("align/")}

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


def _number(value: torch.Tensor) -> torch.Tensor:
    return value.detach().float().reshape(())
