"""The loss of a training step: the task's, and what a teacher adds to it by alignment and distillation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from compt_megatron.align.alignment import Alignment
from compt_megatron.align.distillation import Distillation
from compt_megatron.align.teacher import Teacher
from compt_megatron.data.text.batch import TokenBatch
from compt_megatron.engine.contract import AnyBatch
from compt_megatron.engine.student import Outputs
from compt_megatron.engine.topology import Topology
from compt_megatron.models.language import layer_key
from compt_megatron.objectives.base import Objective, RowObjective
from compt_megatron.share import CountedRows

Shares = tuple[torch.Tensor, dict[str, torch.Tensor]]  # of the loss and of its parts
LossOf = Callable[[int, Outputs], Shares]  # index and outputs of a micro-batch
Divisor = torch.Tensor | float


@dataclass
class Losses:
    """What a link is trained with. The teacher must have been made for the layout of `topology`."""

    objective: Objective
    topology: Topology
    total_steps: int
    micro_batches: int
    teacher: Teacher | None = None
    alignment: Alignment | None = None
    distillation: Distillation | None = None

    def at(self, step: int) -> StepLoss:
        """The loss of global step `step`."""
        return StepLoss(self, step)

    @property
    def couples_rows(self) -> bool:
        """Whether the loss needs the features of all micro-batches at once."""
        return self.objective.couples_rows or (self.alignment is not None and self.alignment.clamp)


@dataclass(frozen=True)
class StepLoss:
    """The loss of one step, of which every rank has a share."""

    losses: Losses
    step: int

    @property
    def aligns(self) -> bool:
        """Whether it has an alignment term."""
        alignment = self.losses.alignment
        return alignment is not None and alignment.weight_at(self.step, self.losses.total_steps) > 0

    @property
    def distils(self) -> bool:
        """Whether it has a distillation term."""
        distillation = self.losses.distillation
        return distillation is not None and distillation.weight_at(self.step, self.losses.total_steps) > 0

    @property
    def taught(self) -> bool:
        """Whether the teacher must run."""
        return self.aligns or self.distils

    @property
    def layers(self) -> Sequence[int]:
        """The layers of a language model whose outputs it wants."""
        alignment = self.losses.alignment
        return [*alignment.layers] if alignment is not None and self.aligns else []

    # -- the teacher -------------------------------------------------------------------------------------------------

    def targets(self, batch: AnyBatch) -> Outputs | None:
        """What the teacher makes of a rank's rows, as many at a time as a micro-batch has, under the student's names.
        None where it need not run. Collective over the ranks of one copy of the model."""
        teacher, alignment = self.losses.teacher, self.losses.alignment
        if teacher is None or not self.taught:
            return None
        rows = max(1, len(batch) // self.losses.micro_batches)
        starts = range(0, len(batch), rows)
        if isinstance(batch, TokenBatch):
            layers = {} if alignment is None else alignment.layers
            found = [teacher.hidden(batch.tokens[i : i + rows], sorted({*layers.values()})) for i in starts]
            whole = _joined(found)
            return {"hidden": whole["hidden"]} | {layer_key(own): whole[layer_key(its)] for own, its in layers.items()}
        parts = []
        for start in starts:
            texts = None if batch.texts is None else batch.texts[start : start + rows].flatten(0, 1)
            parts.append(teacher.features(batch.images[start : start + rows], texts))
        return _joined(parts)

    # -- shares ------------------------------------------------------------------------------------------------------

    def of_batch(self, outputs: Outputs, batch: AnyBatch, targets: Outputs | None) -> Shares:
        """This rank's share, from the outputs of all of its rows."""
        return self._share(outputs, batch, targets, len(batch), None)

    def of_rows(self, batch: AnyBatch, micro: Sequence[AnyBatch], targets: Outputs | None) -> LossOf:
        """The share of each micro-batch of `batch`, a loss that does not couple rows; on an inner stage of a pipeline
        that of its layers. Collective where the divisor is."""
        divisor = self._divisor(batch)
        return lambda index, outputs: self._share(
            outputs, micro[index], _part(targets, index, len(micro)), len(batch), divisor
        )

    def states_of_rows(self, batch: AnyBatch, micro: Sequence[AnyBatch], targets: Outputs | None) -> LossOf:
        """The same with the alignment term alone, of a language model."""
        divisor = self._divisor(batch)
        return lambda index, outputs: self._aligned(
            outputs, micro[index], _part(targets, index, len(micro)), len(batch), divisor, None
        )

    def _divisor(self, batch: AnyBatch) -> Divisor:
        assert isinstance(self.losses.objective, RowObjective)
        return self.losses.objective.divisor(batch, self.losses.topology.data_group)

    def _share(
        self, outputs: Outputs, batch: AnyBatch, targets: Outputs | None, rows: int, divisor: Divisor | None
    ) -> Shares:
        """`rows`: of this rank, of which `batch` may be a micro-batch."""
        if isinstance(batch, TokenBatch) and "hidden" not in outputs:  # an inner stage
            return self._aligned(outputs, batch, targets, rows, divisor, None)
        objective, group = self.losses.objective, self.losses.topology.data_group
        if divisor is None:
            task = objective(outputs, batch, group)
        else:
            assert isinstance(objective, RowObjective)
            task = objective(outputs, batch, group, divisor)
        if targets is None:
            return task
        terms: list[Shares] = [task]
        if self.aligns:
            terms.append(self._aligned(outputs, batch, targets, rows, divisor, task.loss))
        if self.distils:
            terms.append(self._distilled(outputs, batch, targets, divisor))
        return _added(terms)

    def _aligned(
        self,
        outputs: Outputs,
        batch: AnyBatch,
        targets: Outputs | None,
        rows: int,
        divisor: Divisor | None,
        task: torch.Tensor | None,
    ) -> Shares:
        assert self.losses.alignment is not None
        assert targets is not None
        return self.losses.alignment(
            outputs,
            targets,
            step=self.step,
            total_steps=self.losses.total_steps,
            global_rows=rows * self.losses.topology.data,
            task_loss=task,
            group=self.losses.topology.data_group,
            counted=_counted(batch, divisor),
        )

    def _distilled(self, outputs: Outputs, batch: AnyBatch, targets: Outputs, divisor: Divisor | None) -> Shares:
        distillation, teacher, counted = self.losses.distillation, self.losses.teacher, _counted(batch, divisor)
        assert distillation is not None
        assert teacher is not None
        assert teacher.head is not None, "the teacher was made without its head"
        assert counted is not None, "predictions are distilled token by token"
        position = self.step, self.losses.total_steps
        return distillation(outputs, targets["hidden"], teacher.head, counted, *position)


def summed(found: Sequence[Shares]) -> Shares | None:
    """The shares of all micro-batches, and of all layers on an inner stage, together; None where there are none."""
    if not found:
        return None
    parts: dict[str, torch.Tensor] = {}
    for _, own in found:
        for key, part in own.items():
            parts[key] = parts[key] + part if key in parts else part
    return torch.stack([loss for loss, _ in found]).sum(), parts


def _added(terms: Sequence[Shares]) -> Shares:
    """The terms of one loss together."""
    return torch.stack([loss for loss, _ in terms]).sum(), {k: part for _, parts in terms for k, part in parts.items()}


def _counted(batch: AnyBatch, divisor: Divisor | None) -> CountedRows | None:
    return CountedRows(batch.mask, divisor) if isinstance(batch, TokenBatch) and divisor is not None else None


def _part(targets: Outputs | None, index: int, count: int) -> Outputs | None:
    """The rows of micro-batch `index` of `count`."""
    return None if targets is None else {key: value.chunk(count)[index] for key, value in targets.items()}


def _joined(parts: list[Outputs]) -> Outputs:
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0] if parts[0][key].dim()}
