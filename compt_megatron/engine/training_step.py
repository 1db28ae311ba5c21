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
from compt_megatron.align.distillation import Distillation
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
from compt_megatron.models.language import layer_key
from compt_megatron.objectives.base import Objective, RowObjective
from compt_megatron.recipe.schema import Settings
from compt_megatron.share import CountedRows
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
        distillation: Distillation | None = None,
        projections: Projections | None = None,
        factors: Mapping[str, tuple[float, float]] | None = None,
    ) -> None:
        """The student of one link, without weights (`load`), in the layout of `settings.parallel`. Collective.

        The teacher must have been made for the same layout's process groups. `factors`: on learning rate and weight
        decay, by canonical name, as a growth certificate's `rates` has them; 1 for tensors that it does not name.
        """
        self.spec, self.settings, self.objective, self.runtime = spec, settings, objective, runtime
        self.total_steps, self.teacher = total_steps, teacher
        self.alignment, self.distillation = alignment, distillation
        self.topology = Topology.start(settings.parallel)
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
        targets = self._teacher_features(batch) if self._taught else None
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
        loss_of = self._loss_of_rows(batch, micro, targets)
        shares = _summed(self._backward_rows(micro, loss_of, self._aligned_layers))
        totals = self._totals(shares)
        return self._updated(totals, batch, refuse=not all(math.isfinite(value) for value in totals.values()))

    def _loss_of_rows(self, batch: AnyBatch, micro: Sequence[AnyBatch], targets: Outputs | None) -> LossOf:
        """The share of each micro-batch in the loss of the global batch. Collective where the divisor is."""
        assert isinstance(self.objective, RowObjective)
        divisor = self.objective.divisor(batch, self.topology.data_group)

        def loss_of(index: int, outputs: Outputs) -> Shares:
            part = _part(targets, index, len(micro))
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
        return self._totals(shares, "evaluation")

    @property
    def _couples_rows(self) -> bool:
        """Whether the loss needs the features of all micro-batches at once."""
        return self.objective.couples_rows or (self.alignment is not None and self.alignment.clamp)

    @property
    def _aligning(self) -> bool:
        """Whether this step has an alignment loss."""
        return self.alignment is not None and self.alignment.weight_at(self.global_step, self.total_steps) > 0

    @property
    def _distilling(self) -> bool:
        """Whether this step has a distillation loss."""
        return self.distillation is not None and self.distillation.weight_at(self.global_step, self.total_steps) > 0

    @property
    def _taught(self) -> bool:
        """Whether the teacher must run in this step."""
        return self._aligning or self._distilling

    @property
    def _aligned_layers(self) -> Sequence[int]:
        """The layers of a language model whose outputs this step's loss wants."""
        return [*self.alignment.layers] if self.alignment is not None and self._aligning else []

    def _seed(self, micro_batch: int) -> None:
        seed_step(self.settings.seed, self.global_step, micro_batch, self.topology.data_rank)

    def _teacher_features(self, batch: AnyBatch) -> Outputs | None:
        if self.teacher is None:
            return None
        rows = max(1, len(batch) // self.settings.parallel.micro_batches)
        starts = range(0, len(batch), rows)
        if isinstance(batch, TokenBatch):
            layers = {} if self.alignment is None else self.alignment.layers
            found = [self.teacher.hidden(batch.tokens[i : i + rows], sorted({*layers.values()})) for i in starts]
            whole = _joined(found)
            return {"hidden": whole["hidden"]} | {layer_key(own): whole[layer_key(its)] for own, its in layers.items()}
        parts = []
        for start in starts:
            texts = None if batch.texts is None else batch.texts[start : start + rows].flatten(0, 1)
            parts.append(self.teacher.features(batch.images[start : start + rows], texts))
        return _joined(parts)

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
        if "hidden" not in outputs and isinstance(batch, TokenBatch):  # an inner stage: only its layers
            return self._aligned(outputs, batch, targets, rows, divisor, None)
        group = self.topology.data_group
        if divisor is None:
            task = self.objective(outputs, batch, group)
        else:
            assert isinstance(self.objective, RowObjective)
            task = self.objective(outputs, batch, group, divisor)
        if targets is None:
            return task
        terms: list[Shares] = [task]
        if self._aligning:
            terms.append(self._aligned(outputs, batch, targets, rows, divisor, task.loss))
        if self._distilling:
            terms.append(self._distilled(outputs, batch, targets, divisor))
        return _added(terms)

    def _aligned(
        self,
        outputs: Outputs,
        batch: AnyBatch,
        targets: Outputs | None,
        rows: int | None,
        divisor: torch.Tensor | float | None,
        task: torch.Tensor | None,
    ) -> Shares:
        """This rank's share of the alignment loss, and of its parts."""
        assert self.alignment is not None
        assert targets is not None
        return self.alignment(
            outputs,
            targets,
            step=self.global_step,
            total_steps=self.total_steps,
            global_rows=(len(batch) if rows is None else rows) * self.topology.data,
            task_loss=task,
            group=self.topology.data_group,
            counted=None if divisor is None or not isinstance(batch, TokenBatch) else CountedRows(batch.mask, divisor),
        )

    def _distilled(
        self, outputs: Outputs, batch: AnyBatch, targets: Outputs, divisor: torch.Tensor | float | None
    ) -> Shares:
        """This rank's share of the distillation loss, and of its parts."""
        assert self.distillation is not None
        assert isinstance(batch, TokenBatch)
        head = None if self.teacher is None else self.teacher.head
        assert head is not None, "the teacher was made without its head"
        assert divisor is not None
        counted = CountedRows(batch.mask, divisor)
        return self.distillation(outputs, targets["hidden"], head, counted, self.global_step, self.total_steps)

    def _totals(self, shares: Shares | None, kind: str = "step") -> dict[str, float]:
        """Loss and parts of the global batch, on every rank. `kind`: what the parts are of; told once for each."""
        key = (kind, self._aligning, self._distilling)  # steps with and without such terms have different parts
        inner = self.topology.pipeline > 1 and bool(self._aligned_layers) and kind != "evaluation"
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
        taught = self._taught
        self.global_step += 1
        loss = totals.pop("loss")
        return StepResult(loss, totals, grad_norm, rate, skipped, len(batch) * self.topology.data, taught)

    # -- features ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def alignment_at_start(self, batch: AnyBatch) -> dict[str, float]:
        """The unweighted alignment loss of each tower on one batch, before any step (zero for an exact growth, also of
        a language model, whose projections then begin as the first part of its states). Collective."""
        if self.teacher is None or self.alignment is None:
            return {}
        batch = batch.to(self.runtime.device)
        targets = self._teacher_features(batch)
        if isinstance(batch, TokenBatch):
            return self._states_at_start(batch, targets) if self._aligning else {}
        texts = None if batch.texts is None else batch.texts.flatten(0, 1)
        outputs = self.eval_features(batch.images, texts)
        assert targets is not None
        return self.alignment.unweighted(outputs, targets, self.topology.data_group)

    def _states_at_start(self, batch: AnyBatch, targets: Outputs | None) -> dict[str, float]:
        assert isinstance(self.objective, RowObjective)
        micro = batch.split(self.topology.pipeline if self.topology.virtual > 1 else 1)
        divisor = self.objective.divisor(batch, self.topology.data_group)

        def loss_of(index: int, outputs: Outputs) -> Shares:
            return self._aligned(outputs, micro[index], _part(targets, index, len(micro)), len(batch), divisor, None)

        totals = self._totals(_summed(self._forward_rows(micro, loss_of, self._aligned_layers)), "start")
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


def _part(targets: Outputs | None, index: int, count: int) -> Outputs | None:
    """The rows of micro-batch `index` of `count`."""
    return None if targets is None else {key: value.chunk(count)[index] for key, value in targets.items()}


def _joined(parts: list[Outputs]) -> Outputs:
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0] if parts[0][key].dim()}


def _added(terms: Sequence[Shares]) -> Shares:
    """The terms of one loss together."""
    return torch.stack([loss for loss, _ in terms]).sum(), {k: part for _, parts in terms for k, part in parts.items()}


def _summed(found: list[Shares]) -> Shares | None:
    """The shares of all micro-batches together; None where there are none."""
    if not found:
        return None
    parts: dict[str, torch.Tensor] = {}
    for _, own in found:
        for key, part in own.items():
            parts[key] = parts[key] + part if key in parts else part
    return torch.stack([loss for loss, _ in found]).sum(), parts


def _number(value: torch.Tensor) -> torch.Tensor:
    return value.detach().float().reshape(())
