"""This process: its device, its rank, and how the ranks of a job talk. The one place that knows CPU from GPU."""

from __future__ import annotations

import logging
import os
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from compt_megatron.errors import UserError
from compt_megatron.heap import kept_heap

_SLURM = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}


@dataclass(frozen=True)
class Runtime:
    """Rank and device of this process. Made by `start`; all methods are collective where they say so."""

    rank: int
    world: int
    local_rank: int
    device: torch.device

    @classmethod
    def start(cls, timeout_minutes: float = 30.0) -> Runtime:
        """Join the job that the environment describes (torchrun, deepspeed, slurm), or be a job of one process.

        Raises UserError where only a part of the launcher's variables is set.
        """
        _adopt_slurm()
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
            if not os.environ.get(name, "0").isdecimal():
                raise UserError(f"environment: {name} is {os.environ[name]!r}, not a number; unset it or start through "
                                "torchrun, deepspeed or launchers/")  # fmt: skip
        given = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name in os.environ]
        if not dist.is_initialized() and len(given) < 4 and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError(f"environment: {', '.join(given)} set, but not all four of RANK, WORLD_SIZE, MASTER_ADDR, "
                            "MASTER_PORT; start through torchrun, deepspeed or launchers/")  # fmt: skip
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        cuda = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") != "cpu"
        if cuda:
            torch.cuda.set_device(local_rank)
        else:
            os.environ["DS_ACCELERATOR"] = "cpu"
            kept_heap()
        device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
        if not dist.is_initialized():
            backend, limit = ("nccl" if cuda else "gloo"), timedelta(minutes=timeout_minutes)
            if len(given) == 4:
                dist.init_process_group(backend, timeout=limit)
            else:
                dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=limit)
        os.environ.setdefault("LOCAL_RANK", str(local_rank))  # DeepSpeed reads it, launcher or not
        from compt_megatron.models.groups import ensure_groups

        ensure_groups()
        _quiet_deepspeed()
        if cuda and dist.get_rank() == 0:
            _tell_of_kernels()
        return cls(dist.get_rank(), dist.get_world_size(), local_rank, device)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def exchange(self, value: Any) -> list[Any]:
        """Every rank's picklable `value`, in rank order. Collective."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def max(self, value: int) -> int:
        """The largest of the ranks' values. Collective."""
        if self.world == 1:
            return value
        votes = torch.tensor([value], device=self.device)
        dist.all_reduce(votes, op=dist.ReduceOp.MAX)
        return int(votes.item())

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Elementwise sum of a tensor over the ranks. Collective."""
        if self.world > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Rank 0 does the block alone; a failure there is raised as the same kind of error on every rank. Collective.

        The other ranks skip nothing: they run the block after rank 0 has finished it, so it must then be cheap.
        """
        if not self.is_main:
            self.raise_any(None)
            yield
            return
        try:
            yield
        except BaseException as error:
            self.exchange(error)
            raise
        self.exchange(None)

    def raise_any(self, error: BaseException | None) -> None:
        """Raise on every rank the first error that a rank has. Collective."""
        for found in self.exchange(error):
            if found is not None:
                raise found


def seed_step(seed: int, step: int, micro_batch: int, rank: int) -> None:
    """Seed every random generator of this process for one micro-batch.

    The state is a function of (seed, step, micro-batch, rank) alone, so nothing has to be saved for an exact resume,
    and both forwards of a cached-gradient step see the same state.
    """
    entropy = np.random.SeedSequence([seed, step, micro_batch, rank]).generate_state(2)
    value = int(entropy[0]) << 32 | int(entropy[1])
    bits = value & (2**63 - 1)
    # torch.manual_seed would also queue a call, with the stack in text, for every accelerator that is not started
    torch.default_generator.manual_seed(bits)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(bits)
    random.seed(value)


def _adopt_slurm() -> None:
    """srun starts the ranks without telling torch: translate its variables."""
    if "SLURM_PROCID" in os.environ and "RANK" not in os.environ and "MASTER_ADDR" in os.environ:
        for name, slurm in _SLURM.items():
            os.environ[name] = os.environ[slurm]


def _tell_of_kernels() -> None:
    """Print once what the losses run as, CUDA kernels or plain PyTorch, and why. (On a CPU there is no choice.)"""
    log = logging.getLogger("compt_kernels")
    if not log.handlers:
        log.addHandler(logging.StreamHandler())
        log.setLevel(logging.INFO)


def _quiet_deepspeed() -> None:
    """Keep DeepSpeed from building a C++ all-reduce for CPU at the first init (minutes; training never uses it), and
    from repeating warnings that are about its own calls."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    import deepspeed.ops
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    logger.addFilter(lambda record: "untested optimizer" not in record.getMessage())  # a subclass of torch's AdamW

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
