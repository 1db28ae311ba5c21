"""Process groups for the models: torch.distributed, megatron's parallel state and its random-state tracker."""

from __future__ import annotations

import atexit
import os

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection

from compt_megatron.models.megatron_cpu import cuda_seeding_on_cpu

_SEED = 1234  # no parameter and no dropout mask is ever drawn from it: weights come from files, dropout is 0


def ensure_groups(tensor: int = 1, pipeline: int = 1, virtual: int = 1) -> None:
    """Initialise torch.distributed (if nobody did) and megatron's groups for `tensor` x `pipeline` ranks a model, each
    with `virtual` chunks of layers. Collective.

    Under a launcher (RANK and WORLD_SIZE set) the ranks meet by `env://`, otherwise this is one process; gloo without
    CUDA, nccl with it. Calling again with the same sizes does nothing; other sizes replace megatron's groups.
    """
    if not dist.is_initialized():
        _initialise_distributed()
    if parallel_state.model_parallel_is_initialized():
        sizes = (
            parallel_state.get_tensor_model_parallel_world_size(),
            parallel_state.get_pipeline_model_parallel_world_size(),
            parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1,
        )
        if sizes == (tensor, pipeline, virtual):
            return
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
    )
    with cuda_seeding_on_cpu():
        tensor_parallel.model_parallel_cuda_manual_seed(_SEED, force_reset_rng=True)


def have_groups() -> bool:
    """Whether megatron's groups exist, whoever made them."""
    return dist.is_initialized() and parallel_state.model_parallel_is_initialized()


def model_groups() -> ProcessGroupCollection:
    """The current groups, which a model is built in."""
    return ProcessGroupCollection.use_mpu_process_groups()


def lone_groups(tensor: dist.ProcessGroup | None = None) -> ProcessGroupCollection:
    """The groups of a model that is not split (or that the ranks of `tensor` split) beside one that is."""
    if not have_groups():
        ensure_groups()
    alone = parallel_state.get_context_parallel_group()  # context parallelism is never used: this rank by itself
    names = ("tp", "pp", "cp", "mp", "tp_cp", "ep", "expt_tp", "tp_ep", "tp_ep_pp", "hcp")
    groups = ProcessGroupCollection(**dict.fromkeys(names, alone))
    if tensor is not None:
        groups.tp = tensor
    return groups


def _initialise_distributed() -> None:
    cuda = torch.cuda.is_available()
    backend = "nccl" if cuda else "gloo"
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend, init_method="env://")
        return
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    atexit.register(_leave)  # nccl warns about groups that are still there at exit


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
