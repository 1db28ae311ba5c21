"""The DeepSpeed configuration of a layout. One function: it can be printed, compared and tested."""

from __future__ import annotations

from typing import Any

from compt_megatron.errors import UserError
from compt_megatron.recipe.parallel_section import ParallelSettings
from compt_megatron.recipe.sections import OptimizerSettings


def deepspeed_config(
    parallel: ParallelSettings,
    optimizer: OptimizerSettings,
    precision: str,
    rows_per_micro_batch: int,
    world: int,
    largest: int,
) -> dict[str, Any]:
    """DeepSpeed's JSON for one link. `rows_per_micro_batch` counts this rank's samples of one micro-batch; `largest`
    counts the elements of the largest parameter."""
    zero: dict[str, Any] = {"stage": parallel.zero}
    if parallel.zero == 3:
        # DeepSpeed's memory-efficient linear patches F.linear for the whole process and shifts bf16 numerics of
        # every other model in it, the teacher's too.
        zero |= {"memory_efficient_linear": False, "stage3_gather_16bit_weights_on_model_save": False}
    zero |= _offload(parallel, -(-largest // world))
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": rows_per_micro_batch,
        "gradient_accumulation_steps": parallel.micro_batches,
        "train_batch_size": rows_per_micro_batch * parallel.micro_batches * world,
        "gradient_clipping": optimizer.clip_grad or 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW serves offload too; no C++ build at start
        "steps_per_print": None,
    }
    if precision == "bf16":
        config["bf16"] = {"enabled": True, "check_grad_overflow": True}
        if parallel.zero:
            # Gradients are summed over micro-batches in fp32 (over ranks in bf16); stage 0 does both in bf16.
            config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def _offload(parallel: ParallelSettings, largest: int) -> dict[str, Any]:
    """Where optimizer state, and weights, are kept outside the device: CPU memory, or files on a local NVMe disk.

    `largest` counts the elements of a rank's largest piece of a parameter: buffers for weights need that room.
    Raises UserError where DeepSpeed cannot write to such a disk.
    """
    if parallel.offload == "none":
        return {}
    kept = ["offload_optimizer", *(["offload_param"] if parallel.offload == "parameters" else [])]
    if parallel.offload_path is None:
        return {name: {"device": "cpu"} for name in kept}
    check_disk(parallel)
    found: dict[str, Any] = {name: {"device": "nvme", "nvme_path": parallel.offload_path} for name in kept}
    if "offload_param" in found:
        found["offload_param"]["buffer_size"] = largest
        # Its reading ahead asks twice for a parameter that a pass ends and the next begins with, and dies of that;
        # what it keeps for the next use keeps a buffer, of which there are five.
        found |= {"stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": 0}
    return found


def check_disk(parallel: ParallelSettings) -> None:
    """Raise UserError if a layout offloads to a disk and DeepSpeed cannot write to one on this machine."""
    if parallel.offload_path is None:
        return
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise UserError(
            "parallel.offload_path: DeepSpeed needs libaio to write to a disk, which is not installed here; "
            "install it (Debian: libaio-dev), or leave offload_path out to offload to CPU memory"
        )
