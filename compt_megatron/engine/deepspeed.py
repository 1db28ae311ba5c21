"""The DeepSpeed engine: ZeRO 0 to 3 over data-parallel ranks, CPU/gloo and GPU/nccl by the same code."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from compt_megatron.align.alignment import Alignment
from compt_megatron.align.projection import Projections
from compt_megatron.align.teacher import Teacher
from compt_megatron.data.batch import Batch
from compt_megatron.engine.cached_gradients import forward_without_graph
from compt_megatron.engine.contract import StepResult
from compt_megatron.engine.optimizer import build_optimizer
from compt_megatron.engine.run_checkpoint import RunCheckpoint
from compt_megatron.engine.runtime import Runtime, seed_step
from compt_megatron.engine.schedule import learning_rate
from compt_megatron.engine.student import Outputs, Student
from compt_megatron.engine.zero_config import deepspeed_config
from compt_megatron.engine.zero_state import ZeroState
from compt_megatron.errors import UserError
from compt_megatron.models.build import build_model
from compt_megatron.models.clip import MAX_LOG_SCALE
from compt_megatron.models.state import module_to_canonical
from compt_megatron.objectives.base import Objective
from compt_megatron.recipe.schema import Settings
from compt_megatron.spec.table import ModelSpec

_MAX_SKIPPED_IN_A_ROW = 20


class DeepSpeedEngine:
    """One link's student under DeepSpeed. See `engine.contract.Engine` for what the methods promise."""

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
    ) -> None:
        import deepspeed

        self.spec, self.settings, self.objective, self.runtime = spec, settings, objective, runtime
        self.total_steps, self.teacher, self.alignment = total_steps, teacher, alignment
        self.global_step = 0
        self._skipped_in_a_row = 0
        self._dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
        model = build_model(spec, dtype=self._dtype, device="cpu", recompute=settings.parallel.recompute)
        student = Student(model, projections.to(self._dtype) if projections is not None else None)
        student.to(runtime.device).train()
        self._canonical = {f"model.{name}": members for name, members in module_to_canonical(spec).items()}
        self._optimizer = build_optimizer(student.named_parameters(), settings.optimizer, self._decays)
        micro_rows = settings.data.batch_size // (runtime.world * settings.parallel.micro_batches)
        config = deepspeed_config(settings.parallel, settings.optimizer, settings.precision, micro_rows, runtime.world)
        self._engine, *_ = deepspeed.initialize(
            model=student, optimizer=self._optimizer, config=config, dist_init_required=False
        )
        self._state = ZeroState(self._engine, self._optimizer)
        self._checkpoint = RunCheckpoint(student, spec, self._canonical, self._state, self._dtype, runtime)

    @property
    def _student(self) -> Student:
        return self._engine.module

    def _decays(self, name: str) -> bool:
        """Whether weight decay applies to a parameter of the student module."""
        if name in self._canonical:
            return self.spec.params[self._canonical[name][0]].decays
        return name.endswith("weight")  # the projections: matrices yes, biases no

    # -- one step ----------------------------------------------------------------------------------------------------

    def step(self, batch: Batch) -> StepResult:
        """One optimizer step on this rank's rows of the global batch."""
        batch = batch.to(self.runtime.device)
        micro = batch.split(self.settings.parallel.micro_batches)
        targets = self._teacher_features(batch) if self._aligning else None
        if len(micro) == 1:
            seed_step(self.settings.seed, self.global_step, 0, self.runtime.rank)
            loss, parts = self._loss(self._forward(micro[0]), batch, targets)
        else:
            cached = forward_without_graph(lambda index: self._seeded_forward(index, micro), len(micro))
            loss, parts = self._loss(cached.outputs, batch, targets)
        totals = self._totals(loss, parts)
        if not all(math.isfinite(value) for value in totals.values()):
            return self._finish(totals, batch, grad_norm=math.inf, skipped=True)
        if len(micro) == 1:
            self._backward(loss, last=True)
        else:
            loss.backward()
            for index in range(len(micro)):
                outputs = self._seeded_forward(index, micro)
                self._backward(cached.surrogate(index, outputs), last=index == len(micro) - 1)
        return self._finish(totals, batch, self._last_norm, self._last_skipped)

    @property
    def _aligning(self) -> bool:
        """Whether this step has an alignment loss; the teacher need not run otherwise."""
        return self.alignment is not None and self.alignment.weight_at(self.global_step, self.total_steps) > 0

    def _forward(self, batch: Batch) -> Outputs:
        texts = None if batch.texts is None else batch.texts.flatten(0, 1)
        return self._engine(images=batch.images.to(self._dtype), texts=texts)

    def _seeded_forward(self, index: int, micro: list[Batch]) -> Outputs:
        seed_step(self.settings.seed, self.global_step, index, self.runtime.rank)
        return self._forward(micro[index])

    def _teacher_features(self, batch: Batch) -> Outputs | None:
        if self.teacher is None:
            return None
        rows = max(1, batch.images.shape[0] // self.settings.parallel.micro_batches)
        parts = []
        for start in range(0, batch.images.shape[0], rows):
            texts = None if batch.texts is None else batch.texts[start : start + rows].flatten(0, 1)
            parts.append(self.teacher.features(batch.images[start : start + rows], texts))
        return {key: torch.cat([part[key] for part in parts]) for key in parts[0] if parts[0][key].dim()}

    def _loss(
        self, outputs: Outputs, batch: Batch, targets: Outputs | None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """This rank's share of the global loss, and of its parts."""
        task = self.objective(outputs, batch)
        if self.alignment is None or targets is None:
            return task.loss, task.parts
        aligned = self.alignment(
            outputs,
            targets,
            step=self.global_step,
            total_steps=self.total_steps,
            global_rows=batch.images.shape[0] * self.runtime.world,
            task_loss=task.loss,
        )
        return task.loss + aligned.loss, task.parts | aligned.parts

    def _totals(self, loss: torch.Tensor, parts: dict[str, torch.Tensor]) -> dict[str, float]:
        """Loss and parts of the global batch, by one all-reduce."""
        shares = torch.stack([loss.detach().float(), *(part.detach().float().reshape(()) for part in parts.values())])
        return dict(zip(["loss", *parts], self.runtime.sum(shares).tolist()))

    def _backward(self, loss: torch.Tensor, last: bool) -> None:
        """Backward of one micro-batch, and the optimizer step after the last one."""
        rate = learning_rate(self.settings.optimizer, self.global_step, self.total_steps)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        # DeepSpeed averages gradients over the ranks; ours are shares of one sum.
        self._engine.backward(loss * self.runtime.world, scale_wrt_gas=False)
        if last:
            norm = self._own_gradient_norm()
            self._optimizer.refuse = norm is not None and not math.isfinite(norm)
            self._engine.step()
            self._last_norm = float(self._engine.get_global_grad_norm() or 0.0) if norm is None else norm
            self._last_skipped = self._optimizer.refuse or bool(getattr(self._engine.optimizer, "overflow", False))
            if not math.isfinite(self._last_norm) or self._last_norm < 0:
                self._last_norm = math.inf
            self._clamp_logit_scale()
        else:
            self._engine.step()

    def _own_gradient_norm(self) -> float | None:
        """The global gradient norm where DeepSpeed has no check of its own (stage 0 in fp32), else None."""
        if self.settings.parallel.zero or self.settings.precision != "fp32":
            return None
        gradients = [param.grad for param in self._student.parameters() if param.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients))

    def _clamp_logit_scale(self) -> None:
        scale = self._student.model.logit_scale
        if scale is not None:
            self._state.clamp(scale, 0.0, MAX_LOG_SCALE)

    def _finish(self, totals: dict[str, float], batch: Batch, grad_norm: float, skipped: bool) -> StepResult:
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
        return StepResult(loss, totals, grad_norm, rate, skipped, len(batch) * self.runtime.world, aligned)

    # -- features ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def eval_features(
        self, images: torch.Tensor | None = None, texts: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Un-normalised fp32 features of this rank's rows. Collective under ZeRO 3."""
        device = self.runtime.device
        self._student.eval()
        outputs = self._student(
            images=None if images is None else images.to(device, self._dtype),
            texts=None if texts is None else texts.to(device),
        )
        self._student.train()
        return {key: value.float() for key, value in outputs.items()}

    @torch.no_grad()
    def alignment_at_start(self, batch: Batch) -> dict[str, float]:
        """The unweighted alignment loss of each tower on one batch, before any step (zero for an exact growth)."""
        if self.teacher is None or self.alignment is None:
            return {}
        batch = batch.to(self.runtime.device)
        targets = self._teacher_features(batch)
        texts = None if batch.texts is None else batch.texts.flatten(0, 1)
        outputs = self.eval_features(batch.images, texts)
        assert targets is not None
        return self.alignment.unweighted(outputs, targets)

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

    def close(self) -> None:
        """Drop DeepSpeed's hooks and buffers, so that the next link starts with the memory free."""
        self._engine.destroy()
