"""The DeepSpeed engine: tensor parallelism and ZeRO 0 to 3 over data-parallel ranks, CPU/gloo and GPU/nccl by the same
code."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from compt_megatron.align.projection import Projections
from compt_megatron.data.batch import Batch
from compt_megatron.data.text.batch import TokenBatch
from compt_megatron.engine.cached_gradients import CachedGradients, forward_without_graph
from compt_megatron.engine.contract import AnyBatch
from compt_megatron.engine.losses import LossOf, Shares
from compt_megatron.engine.optimizer import build_optimizer
from compt_megatron.engine.run_checkpoint import RunCheckpoint
from compt_megatron.engine.student import (
    AnyStudent,
    Outputs,
    build_student,
    decays,
    held_by,
    logit_scale_of,
    step_factors_of,
    sum_sequence_gradients,
)
from compt_megatron.engine.training_step import TrainingEngine
from compt_megatron.engine.zero_config import deepspeed_config
from compt_megatron.engine.zero_disk import DiskFolder
from compt_megatron.engine.zero_state import ZeroState
from compt_megatron.models.clip import MAX_LOG_SCALE
from compt_megatron.models.megatron_cpu import use_cpu_in_training
from compt_megatron.models.part import ModelPart


class _ModelParallelUnit:
    """What DeepSpeed asks its `mpu` for: megatron's groups, where "model parallel" means tensor parallel.

    Without it DeepSpeed takes tensor-parallel ranks for data-parallel ones, and silently trains something else.
    """

    def __getattr__(self, name: str) -> Any:
        from megatron.core import parallel_state

        return getattr(parallel_state, name.replace("_model_parallel_", "_tensor_model_parallel_", 1)
                       if name.startswith("get_model_parallel_") else name)  # fmt: skip


class DeepSpeedEngine(TrainingEngine):
    """One link's student under DeepSpeed. See `engine.contract.Engine` for what the methods promise."""

    def _build(self, projections: Projections | None) -> None:
        import deepspeed

        spec, settings, runtime = self.spec, self.settings, self.runtime
        use_cpu_in_training()
        parallel = self.parallel
        self._disk = None if parallel.offload_path is None else DiskFolder(parallel.offload_path)
        part = ModelPart.current(spec)
        student = build_student(spec, self._dtype, parallel, part, projections, layers=self._layers.kind)
        student.to(runtime.device).train()
        sum_sequence_gradients(student, self.topology)
        held = held_by(student, part)
        self._optimizer = build_optimizer(
            student.named_parameters(),
            settings.optimizer,
            lambda name: decays(held[name], spec),
            lambda name: step_factors_of(held[name], self.factors, spec),
            tensor_group=self.topology.tensor_group if self.topology.tensor > 1 else None,
        )
        self.optimizer_name = self._optimizer.implementation
        micro_rows = settings.data.batch_size // (self.topology.data * parallel.micro_batches)
        config = deepspeed_config(
            parallel if self._disk is None else parallel.model_copy(update={"offload_path": str(self._disk.path)}),
            settings.optimizer, settings.precision, micro_rows, self.topology.data,
            largest=max(param.numel() for param in student.parameters()),
        )  # fmt: skip
        self._engine, *_ = deepspeed.initialize(
            model=student,
            optimizer=self._optimizer,
            config=config,
            mpu=_ModelParallelUnit() if self.topology.tensor > 1 else None,
            dist_init_required=False,
        )
        if self.topology.data == 1 and parallel.zero == 0 and settings.precision == "fp32":
            # nothing to sum, yet it would copy all gradients into one buffer and back
            self._engine.enable_backward_allreduce = False
        self._state = ZeroState(self._engine, self._optimizer)
        # one sub-group after the other, each of which may have to come from a disk
        parameters = sorted(held.values(), key=lambda one: self._state.group_of(one.param))
        self._checkpoint = RunCheckpoint(parameters, part, self._state, self._dtype, runtime, self.topology)

    @property
    def _student(self) -> AnyStudent:
        return self._engine.module

    # -- one step ----------------------------------------------------------------------------------------------------

    def _forward(self, batch: AnyBatch) -> Outputs:
        assert isinstance(batch, Batch)
        texts = None if batch.texts is None else batch.texts.flatten(0, 1)
        return self._engine(images=batch.images.to(self._dtype), texts=texts)

    def _seeded_forward(self, index: int, micro: Sequence[AnyBatch]) -> Outputs:
        self._seed(index)
        return self._forward(micro[index])

    def _forward_without_graph(self, micro: Sequence[AnyBatch]) -> CachedGradients:
        return forward_without_graph(lambda index: self._seeded_forward(index, micro), len(micro))

    def _backward(self, loss: torch.Tensor) -> None:
        # DeepSpeed averages gradients over the data-parallel ranks; ours are shares of one sum.
        self._engine.backward(loss * self.topology.data, scale_wrt_gas=False)

    def _backward_cached(self, micro: Sequence[AnyBatch], cached: CachedGradients | None) -> None:
        assert cached is not None
        for index in range(len(micro)):
            if index:
                self._engine.step()  # not yet an optimizer's: it only counts micro-batches
            self._backward(cached.surrogate(index, self._seeded_forward(index, micro)))

    def _backward_rows(self, micro: Sequence[AnyBatch], loss_of: LossOf, layers: Sequence[int]) -> list[Shares]:
        found = []
        for index in range(len(micro)):
            if index:
                self._engine.step()  # as above
            loss, parts = self._row_loss(self._engine, index, micro, loss_of, layers)
            self._backward(loss)
            found.append((loss.detach(), parts))
        return found

    def _forward_rows(self, micro: Sequence[AnyBatch], loss_of: LossOf, layers: Sequence[int] = ()) -> list[Shares]:
        self._student.eval()
        found = [self._row_loss(self._student, index, micro, loss_of, layers) for index in range(len(micro))]
        self._student.train()
        return found

    def _row_loss(
        self, module: Any, index: int, micro: Sequence[AnyBatch], loss_of: LossOf, layers: Sequence[int]
    ) -> Shares:
        batch = micro[index]
        if not isinstance(batch, TokenBatch):
            return loss_of(index, self._seeded_forward(index, micro))
        self._seed(index)
        parts: dict[str, torch.Tensor] = {}

        def use(outputs: Outputs) -> torch.Tensor:
            loss, own = loss_of(index, outputs)
            parts.update(own)
            return loss

        return module(tokens=batch.tokens, use=use, layers=layers), parts

    def _update(self, rate: float, refuse: bool = False) -> tuple[float, bool]:
        for group in self._optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        own = self._own_gradient_norm()
        self._optimizer.refuse = refuse or (own is not None and not math.isfinite(own))
        self._mark_gradients()
        self._engine.step()
        norm = float(self._engine.get_global_grad_norm() or 0.0) if own is None else own
        refused = self._optimizer.refuse or bool(getattr(self._engine.optimizer, "overflow", False))
        scale = logit_scale_of(self._student)
        if scale is not None:
            self._state.clamp(scale, 0.0, MAX_LOG_SCALE)
            self._state.rest()
        return norm, refused

    def _own_gradient_norm(self) -> float | None:
        """The global gradient norm where DeepSpeed has no check of its own (stage 0 in fp32), else None."""
        if self.parallel.zero or self.settings.precision != "fp32":
            return None
        kinds: dict[bool, list[torch.Tensor]] = {True: [], False: []}  # split over tensor-parallel ranks, or alike
        for param in self._student.parameters():
            if param.grad is not None:
                kinds[getattr(param, "tensor_model_parallel", False)].append(param.grad)
        norms = [torch.nn.utils.get_total_norm(kinds[split]) for split in (True, False)]
        squares = torch.stack(norms).square()
        if self.topology.tensor > 1:
            dist.all_reduce(squares[:1], group=self.topology.tensor_group)
        return float(squares.sum().sqrt())

    def _mark_gradients(self) -> None:
        """Say of each gradient, too, whether tensor-parallel ranks have different parts: in bf16 at stage 0 DeepSpeed's
        norm asks the gradients for megatron's mark, and would leave out the parts of all ranks but the first."""
        if self.parallel.zero == 0 and self.topology.tensor > 1:
            for param in self._student.parameters():
                if param.grad is not None:
                    split = getattr(param, "tensor_model_parallel", False)
                    param.grad.tensor_model_parallel = split  # type: ignore[attr-defined]

    # -- features ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def eval_features(
        self, images: torch.Tensor | None = None, texts: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Un-normalised fp32 features of this rank's rows. Collective under ZeRO 3 and tensor parallelism."""
        device = self.runtime.device
        self._student.eval()
        outputs = self._student(
            images=None if images is None else images.to(device, self._dtype),
            texts=None if texts is None else texts.to(device),
        )
        self._student.train()
        return {key: value.float() for key, value in outputs.items()}

    def close(self) -> None:
        """Drop DeepSpeed's hooks, buffers and files, so that the next link starts with memory and disk free."""
        self._engine.destroy()
        if self._disk is not None:
            self._disk.remove()
