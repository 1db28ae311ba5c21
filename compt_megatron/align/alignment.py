"""The alignment term of a training step: weight, schedule, clamp, and the sum over towers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

import torch
import torch.distributed as dist

from compt_kernels.align import Distance, Norm, align_loss
from compt_megatron.align.schedule import Schedule, WeightSchedule
from compt_megatron.errors import UserError
from compt_megatron.share import CountedRows, ObjectiveResult, total


class Alignment:
    """weight(step) * sum over towers of d_t * L_tower, with L_tower = mean over the global batch's rows of a distance.

    d_t L with the squared error is the squared distance of unit vectors, so that `weight` means the same at every
    width. The published weight of 500 on the error averaged over 512 dimensions is 500/512 here. `cosine` is not
    averaged over dimensions, so it has no factor d_t.

    Of a language model the towers are `hidden`, its final states, and `layer_<i>`, those behind a layer, by tokens.

    schedule, end_step: see `align.schedule.WeightSchedule`. clamp: where the term reaches the task loss it is scaled
    down to it; the factor is a constant for the gradient. towers: keys of the outputs (None: all the teacher has).
    layers: of a language model, {student's: teacher's}, counted from 0; their towers are named by the student's.
    Raises UserError for a setting that is none.
    """

    def __init__(
        self,
        weight: float = 1.0,
        *,
        schedule: Schedule = "constant",
        end_step: int | None = None,
        clamp: bool = False,
        distance: Distance = "mse",
        norm: Norm = "l2",
        beta: float = 1.0,
        towers: tuple[str, ...] | None = None,
        layers: Mapping[int, int] | None = None,
    ) -> None:
        _check("distance", distance, get_args(Distance))
        _check("norm", norm, get_args(Norm))
        if not beta > 0.0:
            raise UserError(f"align.beta is {beta}; use a positive number")
        self._weight, self.clamp = WeightSchedule(weight, schedule, end_step), clamp
        self.distance: Distance = distance
        self.norm: Norm = norm
        self.beta, self.layers = beta, dict(layers or {})
        self.towers = None if towers is None else (*towers, *map("layer_{}".format, self.layers))

    def weight_at(self, step: int, total_steps: int) -> float:
        """The weight in step `step` (from 0). 0 from the end step on: the teacher need not run then."""
        return self._weight.at(step, total_steps)

    def __call__(
        self,
        outputs: dict[str, torch.Tensor],
        teacher_outputs: dict[str, torch.Tensor],
        step: int,
        total_steps: int,
        global_rows: int,
        task_loss: torch.Tensor | None = None,
        group: dist.ProcessGroup | None = None,
        counted: CountedRows | None = None,
    ) -> ObjectiveResult:
        """This rank's share of the term.

        outputs: the student's features on this rank, image [b, d], text [b * captions, d], dense ones [b, tokens, d];
        a projected tower's under align/<tower>. teacher_outputs: the teacher's of the same rows. global_rows: samples
        in the global batch (a tower with several rows a sample counts as many more). task_loss: this rank's share of
        it, read by the clamp alone, which sums both over `group`. counted: which rows of every tower count (None: all,
        by global_rows). parts: `align`, and per tower align/<tower>, without weight and clamp.

        Towers that the outputs lack, because another pipeline stage has them, are left to it.
        """
        shares = self._towers(outputs, teacher_outputs, global_rows, counted)
        device = next(iter(teacher_outputs.values())).device
        unweighted = torch.stack(list(shares.values())).sum() if shares else torch.zeros((), device=device)
        loss = self.weight_at(step, total_steps) * unweighted
        if self.clamp:
            assert task_loss is not None, "the clamp compares with the task loss"
            align, task = total(torch.stack([loss.detach(), task_loss.detach().to(loss)]), group)
            loss = loss * torch.where(align > task, task / align, torch.ones_like(align))
        parts = {f"align/{tower}": share.detach() for tower, share in shares.items()}
        return ObjectiveResult(loss, {"align": loss.detach(), **parts})

    @torch.no_grad()
    def unweighted(
        self,
        outputs: dict[str, torch.Tensor],
        teacher_outputs: dict[str, torch.Tensor],
        group: dist.ProcessGroup | None = None,
    ) -> dict[str, float]:
        """Tower -> d_t * L_tower over the rows of all ranks; about 0 at step 0 of an exactly grown student."""
        samples = torch.tensor(float(_samples(outputs)), device=next(iter(outputs.values())).device)
        shares = self._towers(outputs, teacher_outputs, int(total(samples, group)))
        return {tower: float(total(share, group)) for tower, share in shares.items()}

    def _towers(
        self,
        outputs: dict[str, torch.Tensor],
        teacher_outputs: dict[str, torch.Tensor],
        global_rows: int,
        counted: CountedRows | None = None,
    ) -> dict[str, torch.Tensor]:
        """Tower -> this rank's share of d_t * L_tower."""
        shares = {}
        for tower in self.towers or teacher_outputs:
            if tower not in outputs:
                assert counted is not None, f"the student has no {tower}"
                continue
            teacher = teacher_outputs[tower]
            student = outputs[f"align/{tower}" if f"align/{tower}" in outputs else tower]
            summed = align_loss(
                student,
                teacher,
                distance=self.distance,
                norm=self.norm,
                row_weight=None if counted is None else counted.weights,
                reduction="sum",
                beta=self.beta,
            )
            width = 1 if self.distance == "cosine" else teacher.shape[-1]
            if counted is None:
                rows = student.shape[:-1].numel() / _samples(outputs)  # rows of this tower a sample
                shares[tower] = summed * (width / (global_rows * rows))
            else:
                shares[tower] = summed * width / counted.total
        return shares


def _samples(outputs: dict[str, torch.Tensor]) -> int:
    """Samples on this rank: an image is one sample; without images the first feature's rows are samples."""
    return outputs["image"].shape[0] if "image" in outputs else next(iter(outputs.values())).shape[0]


def _check(field: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UserError(f"align.{field} is '{value}'; use one of: {', '.join(known)}")
