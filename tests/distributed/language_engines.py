"""A language model under ZeRO 3, and under megatron's gradient buffers and optimizers: what an engine does with one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from compt_megatron.spec.families import spec_from_config
from tests.distributed.language_cases import (
    CONFIGS,
    LAYERS,
    ROWS,
    Batch,
    Case,
    Found,
    Pieces,
    State,
    inner_loss,
    objective,
    parts_of,
    schedule,
    weights,
    whole_batch,
)

RATE, STEPS = 1e-2, 3


@dataclass
class Stepped:
    """The gradient norm of each step, and this rank's pieces of the weights behind the last."""

    norms: list[float]
    weights: Pieces


class Student(nn.Module):
    """A module whose forward makes the loss, while ZeRO 3 has the head's weight."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.task = torch.zeros(())

    def forward(self, batch: Batch, divisor: torch.Tensor) -> torch.Tensor:
        def loss(outputs: dict[str, Any]) -> torch.Tensor:
            task = objective()(outputs, batch, None, divisor).loss
            self.task = task.detach()
            return task + inner_loss(outputs, self.model.tower.width)

        found: torch.Tensor = self.model(batch.tokens, layers=LAYERS, use=loss)
        return found


def zero_three(rank: int, world: int, cases: list[Case]) -> list[Found]:
    """Loss and gradients under ZeRO 3, in fp32, of models that are not split; gradients are whole on every rank."""
    return [_zero_three(rank, world, case) for case in cases]


def _zero_three(rank: int, world: int, case: Case) -> Found:
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    from compt_megatron.engine.runtime import Runtime
    from compt_megatron.models.build import build_language_model
    from compt_megatron.models.part import ModelPart
    from compt_megatron.models.state import load_canonical

    Runtime.start()
    spec = spec_from_config(CONFIGS[case.config], case.config)
    model = build_language_model(spec, recompute=case.recompute)
    load_canonical(model, spec, weights(spec).__getitem__)
    zero = {"stage": 3, "memory_efficient_linear": False, "stage3_param_persistence_threshold": 0}
    engine, *_ = deepspeed.initialize(
        model=Student(model).train(),
        optimizer=torch.optim.AdamW(model.parameters(), lr=RATE),
        config={
            "train_micro_batch_size_per_gpu": ROWS // world,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
        },
        dist_init_required=False,
    )
    assert all(parameter.numel() == 0 for parameter in model.parameters()), "nothing is partitioned"
    batch = whole_batch().rows(rank * ROWS // world, (rank + 1) * ROWS // world)
    loss = engine(batch, objective().divisor(batch))
    engine.backward(loss * world)
    part, gradients = ModelPart(spec), []
    names = part.names()
    for module_name, parameter in model.named_parameters():
        for name, value in part.split(names[module_name], safe_get_full_grad(parameter)).items():
            gradients.append((name, part.box(name), value.clone()))
    total = engine.module.task.clone()
    dist.all_reduce(total)
    engine.destroy()
    return Found(float(total), float(total), gradients)


def buffered(rank: int, world: int, cases: list[tuple[Case, bool]]) -> list[Stepped]:
    """Steps of AdamW by megatron's optimizers; per case, whether by the distributed one."""
    return [_buffered(*case) for case in cases]


def _buffered(case: Case, sharded: bool) -> Stepped:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer.optimizer import FP32Optimizer

    from compt_megatron.models.megatron_cpu import cuda_types_on_cpu
    from compt_megatron.models.stages import sum_tied_gradients

    chunks, part, place = parts_of(case)
    own = ROWS // place.data
    batch = whole_batch().rows(place.data_rank * own, (place.data_rank + 1) * own)
    settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=sharded)
    buffers = [DistributedDataParallel(chunk.config, settings, chunk) for chunk in chunks]
    base = torch.optim.AdamW([p for chunk in chunks for p in chunk.parameters()], lr=RATE)
    options = OptimizerConfig(optimizer="adam", params_dtype=torch.float32, use_distributed_optimizer=sharded)
    with cuda_types_on_cpu():
        wrapped: Any
        if sharded:
            wrapped = DistributedOptimizer(
                base, options, None, None, model_chunks=buffers,
                per_model_buffers={index: chunk.buffers for index, chunk in enumerate(buffers)},
                data_parallel_group=place.data_group, data_parallel_group_gloo=None, data_parallel_group_idx=0,
                distributed_optimizer_instance_id=0,
            )  # fmt: skip
            wrapped.grad_stats_parallel_group = None
        else:
            wrapped = FP32Optimizer(base, options, None)
            wrapped.grad_stats_parallel_group = place.model_group
    wrapped.tp_group = place.tensor_group
    norms = []
    for _ in range(STEPS):
        schedule(chunks, batch, case, place, backward=True, scale=place.data)  # megatron averages over the ranks
        for buffer in buffers:
            buffer.finish_grad_sync()
        sum_tied_gradients(chunks)
        with cuda_types_on_cpu():
            wrapped.prepare_grads()
            norms.append(float(wrapped.get_grad_norm()))
            wrapped.step_with_ready_grads()
        for buffer in buffers:
            buffer.zero_grad_buffer()
        wrapped.zero_grad()
    pieces: Pieces = []
    for chunk, model in enumerate(chunks):
        parameters = dict(model.named_parameters())
        for module_name, names in part.names(chunk).items():
            for name, value in part.split(names, parameters[module_name].detach()).items():
                pieces.append((name, part.box(name), value.clone()))
    return Stepped(norms, pieces)


def stepped(config: str) -> tuple[list[float], State]:
    """Gradient norms and weights of one process, in fp64."""
    from compt_megatron.models.build import build_language_model
    from compt_megatron.models.state import canonical_state, load_canonical

    spec, batch, norms = spec_from_config(CONFIGS[config], config), whole_batch(), []
    model = build_language_model(spec, dtype=torch.float64)
    load_canonical(model, spec, weights(spec).__getitem__)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    for _ in range(STEPS):
        outputs = model(batch.tokens, layers=LAYERS)
        (objective()(outputs, batch).loss + inner_loss(outputs, model.tower.width)).backward()
        norms.append(float(torch.nn.utils.get_total_norm([one.grad for one in model.parameters()])))
        optimizer.step()
        optimizer.zero_grad()
    return norms, canonical_state(model, spec)
