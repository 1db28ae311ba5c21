"""This rank's place in a layout: which rows of the batch it loads, which part of the model it has, whom it talks to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from compt_megatron.recipe.parallel_section import ParallelSettings


@dataclass(frozen=True)
class Topology:
    """tensor x pipeline ranks hold one copy of the model and load the same rows; `data` copies share out the batch.

    Ranks are numbered tensor-parallel first, then data-parallel, then by stage, as megatron-core does.
    """

    tensor: int
    pipeline: int
    virtual: int
    tensor_rank: int
    stage: int
    data: int
    data_rank: int
    tensor_group: dist.ProcessGroup
    data_group: dist.ProcessGroup
    model_group: dist.ProcessGroup  # the ranks of one copy
    pipeline_group: dist.ProcessGroup
    last_rank: int  # the global rank of the last stage of this rank's pipeline

    @classmethod
    def start(cls, parallel: ParallelSettings) -> Topology:
        """Make megatron's process groups for a layout, or keep those there are. Collective."""
        from compt_megatron.models.groups import ensure_groups

        ensure_groups(parallel.tensor, parallel.pipeline, parallel.virtual)
        return cls.current()

    @classmethod
    def current(cls) -> Topology:
        """The place in megatron's current process groups."""
        from megatron.core import parallel_state as groups

        return cls(
            tensor=groups.get_tensor_model_parallel_world_size(),
            pipeline=groups.get_pipeline_model_parallel_world_size(),
            virtual=groups.get_virtual_pipeline_model_parallel_world_size() or 1,
            tensor_rank=groups.get_tensor_model_parallel_rank(),
            stage=groups.get_pipeline_model_parallel_rank(),
            data=groups.get_data_parallel_world_size(),
            data_rank=groups.get_data_parallel_rank(),
            tensor_group=groups.get_tensor_model_parallel_group(),
            data_group=groups.get_data_parallel_group(),
            model_group=groups.get_model_parallel_group(),
            pipeline_group=groups.get_pipeline_model_parallel_group(),
            last_rank=groups.get_pipeline_model_parallel_last_rank(),
        )

    def neighbours(self, size: int) -> dist.ProcessGroup | None:
        """The group of `size` neighbouring ranks inside one copy of the model that this rank is in; None for 1.
        Collective over all ranks."""
        if size == 1:
            return None
        copies: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(copies, dist.get_process_group_ranks(self.model_group))
        own = None
        for ranks in sorted({tuple(copy) for copy in copies}):
            assert len(ranks) % size == 0, f"{size} does not divide the {len(ranks)} ranks of a copy"
            for start in range(0, len(ranks), size):
                group = dist.new_group(list(ranks[start : start + size]))  # every rank must take part in every one
                if dist.get_rank() in ranks[start : start + size]:
                    own = group
        return own

    @property
    def has_outputs(self) -> bool:
        """Whether the model's features come out on this rank."""
        return self.stage == self.pipeline - 1

    def total(self, shares: torch.Tensor | None, count: int, device: torch.device, inner: bool = False) -> torch.Tensor:
        """The sum over the batch of `count` values that the last stage has shares of (None elsewhere), and with `inner`
        other stages too. Collective."""
        values = torch.zeros(count, device=device) if shares is None else shares.clone()
        if self.data > 1 and (inner or shares is not None):
            dist.all_reduce(values, group=self.data_group)
        if not inner:
            return self.from_last(values)
        dist.all_reduce(values, group=self.pipeline_group)
        return values

    def told_by_all(self, value: Any) -> list[Any]:
        """Every stage's picklable `value`, in the order of stages. Collective."""
        found: list[Any] = [None] * self.pipeline
        dist.all_gather_object(found, value, group=self.pipeline_group)
        return found

    def told_by_last(self, value: Any) -> Any:
        """The last stage's picklable `value` on every stage. Collective."""
        values = [value]
        if self.pipeline > 1:
            dist.broadcast_object_list(values, self.last_rank, group=self.pipeline_group)
        return values[0]

    def from_last(self, value: torch.Tensor) -> torch.Tensor:
        """The last stage's `value` on every stage; elsewhere `value` gives shape and dtype, and is overwritten."""
        if self.pipeline > 1:
            value = value.contiguous()
            dist.broadcast(value, self.last_rank, group=self.pipeline_group)
        return value
