"""megatron-core's gradient buffers and optimizers around the link's own optimizer."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer

from compt_megatron.engine.optimizer import build_optimizer
from compt_megatron.engine.run_checkpoint import Held
from compt_megatron.engine.student import AnyStudent, decays, step_factors_of
from compt_megatron.engine.topology import Topology
from compt_megatron.models.language import LanguageModel
from compt_megatron.models.megatron_cpu import cuda_types_on_cpu
from compt_megatron.models.stages import sum_tied_gradients
from compt_megatron.recipe.schema import Settings
from compt_megatron.spec.table import ModelSpec

# megatron-core >= 0.18 says that it lays out the distributed optimizer's buffers itself, as it always did
logging.getLogger("megatron.core.distributed.distributed_data_parallel").addFilter(
    lambda record: "full_param_layout not provided" not in record.getMessage()
)


BUCKET = 40_000_000  # gradients that are reduced together


class MegatronStep:
    """One optimizer step over all chunks of a rank's part of the model.

    Gradients are summed in fp32 over micro-batches, and averaged over the data-parallel ranks: a bucket of them while
    the backward pass goes on, as soon as all are there. `sharded`: by the
    distributed optimizer, where each of those ranks has a piece of masters and moments. `base`: the torch optimizer
    that does the arithmetic; `wrapped`: megatron-core's around it.
    """

    def __init__(
        self, chunks: list[AnyStudent], held: dict[str, Held], spec: ModelSpec, settings: Settings, topology: Topology,
        factors: Mapping[str, tuple[float, float]], sharded: bool,
    ) -> None:  # fmt: skip
        bf16 = settings.precision == "bf16"
        first = chunks[0].model
        config = first.config if isinstance(first, LanguageModel) else first.vision.config
        overlaps = topology.data > 1
        buffers = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=sharded,
            overlap_grad_reduce=overlaps,
            bucket_size=BUCKET if overlaps else None,
        )
        self._buffers = [
            DistributedDataParallel(config, buffers, chunk, disable_bucketing=not overlaps) for chunk in chunks
        ]
        self._clip = settings.optimizer.clip_grad
        self.base = build_optimizer(
            [(name, entry.param) for name, entry in held.items()],
            settings.optimizer,
            lambda name: decays(held[name], spec),
            lambda name: step_factors_of(held[name], factors, spec),
            tensor_group=topology.tensor_group if topology.tensor > 1 else None,
        )
        options = OptimizerConfig(
            optimizer="adam",
            bf16=bf16,
            params_dtype=torch.bfloat16 if bf16 else torch.float32,
            use_distributed_optimizer=sharded,
        )
        with cuda_types_on_cpu():
            self.wrapped: Any = self._wrap(options, topology)

    def _wrap(self, options: OptimizerConfig, topology: Topology) -> Any:
        wrapped: Any
        if options.use_distributed_optimizer:
            wrapped = DistributedOptimizer(
                self.base,
                options,
                None,
                None,
                model_chunks=self._buffers,
                per_model_buffers={index: chunk.buffers for index, chunk in enumerate(self._buffers)},
                data_parallel_group=topology.data_group,
                data_parallel_group_gloo=None,
                data_parallel_group_idx=0,
                distributed_optimizer_instance_id=0,
            )
            wrapped.grad_stats_parallel_group = None  # norms are of the whole job: every rank has a piece
        else:
            wrapped = (
                Float16OptimizerWithFloat16Params(self.base, options, None, None)
                if options.bf16
                else FP32Optimizer(self.base, options, None)
            )
            wrapped.grad_stats_parallel_group = topology.model_group
        wrapped.tp_group = topology.tensor_group
        return wrapped

    def step(self, rate: float, refuse: bool = False) -> tuple[float, bool]:
        """Take the gradients that the backward passes left: their global L2 norm before clipping, and whether weights
        and moments were left alone, because of `refuse` or a norm that is not finite. Collective."""
        for buffers in self._buffers:
            _start_the_rest(buffers)
            buffers.finish_grad_sync()
        sum_tied_gradients(self._buffers)
        for group in self.wrapped.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        with cuda_types_on_cpu():
            self.wrapped.prepare_grads()
            norm = float(self.wrapped.get_grad_norm())
            refused = refuse or not math.isfinite(norm)
            if not refused:
                if self._clip is not None:
                    clip_grad_by_total_norm_fp32(self.wrapped.get_parameters(), self._clip, norm)
                self.wrapped.step_with_ready_grads()
        for buffers in self._buffers:
            buffers.zero_grad_buffer()
        self.wrapped.zero_grad()
        return norm, refused

    def close(self) -> None:
        """Let go of the buffers."""
        self._buffers.clear()
        self.wrapped = None


def _start_the_rest(buffers: DistributedDataParallel) -> None:
    """Reduce the buckets that wait for gradients which this step does not have: those of the projections, when the
    alignment has ended. megatron-core takes such a bucket for an error."""
    for group in buffers.bucket_groups:
        if group.ddp_config.overlap_grad_reduce and not group.is_first_batch and group.grad_reduce_handle is None:
            group.start_grad_sync()
