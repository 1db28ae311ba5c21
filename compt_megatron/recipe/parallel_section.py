"""How a recipe's links are spread over devices."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from compt_megatron.recipe.section import Positive, Section


def _recompute(value: Any) -> Any:
    """What recipes say with true and false."""
    return {True: "full", False: "none"}[value] if isinstance(value, bool) else value


class ParallelSettings(Section):
    """How one link is spread over devices: tensor x pipeline x data-parallel ranks."""

    engine: Literal["deepspeed", "megatron"] = Field(
        default="deepspeed",
        description="The training engine: `deepspeed` (tensor parallel x ZeRO 0 to 3, offload) or `megatron` (tensor x "
        "pipeline x data parallel, distributed optimizer).",
    )
    zero: Literal[0, 1, 2, 3] = Field(
        default=1,
        description="ZeRO stage: what is sharded over data-parallel ranks (1 optimizer, 2 gradients too, 3 weights "
        "too). `megatron`: 0, or 1 for its distributed optimizer.",
    )
    tensor: Positive = Field(
        default=1, description="Tensor-parallel size; must divide the heads and MLP units of every tower."
    )
    pipeline: Positive = Field(
        default=1, description="Pipeline-parallel size (`megatron`); must divide the layers of every tower."
    )
    virtual: Positive = Field(
        default=1,
        description="Chunks of layers that each pipeline stage has of every tower (interleaved schedule); "
        "`micro_batches` must then be a multiple of `pipeline`.",
    )
    sequence: bool = Field(
        default=False,
        description="Sequence parallel: what lies between the tensor-parallel parts is split over tokens.",
    )
    micro_batches: Positive = Field(default=1, description="Micro-batches that a rank's batch is cut into.")
    recompute: Annotated[Literal["none", "selective", "full"], BeforeValidator(_recompute)] = Field(
        default="none",
        description="What the backward pass computes again: nothing, the core attention of each block, or each whole "
        "block (`true` is `full`, `false` is `none`).",
    )
    layers: Literal["auto", "torch", "transformer_engine"] = Field(
        default="auto",
        description="Whose linear layers, norms and attention the blocks are made of: torch's, or NVIDIA Transformer "
        "Engine's (CUDA only, not with zero 3). `auto`: Transformer Engine's where it is installed and agrees with "
        "torch's on the device, otherwise torch's.",
    )
    offload: Literal["none", "optimizer", "parameters"] = Field(
        default="none",
        description="What `deepspeed` keeps outside the device: the optimizer's state (zero 1 to 3), or the weights "
        "too (zero 3).",
    )
    offload_path: str | None = Field(
        default=None, description="Folder on a local NVMe disk for what is offloaded (zero 3); null: CPU memory."
    )

    @model_validator(mode="after")
    def _check(self) -> ParallelSettings:
        if self.engine == "megatron":
            if self.zero > 1:
                raise ValueError(
                    f"zero {self.zero} does not go with engine 'megatron'; use zero: 1, its distributed optimizer"
                )
            if self.offload != "none":
                raise ValueError("'offload' does not go with engine 'megatron'; remove it or use engine: deepspeed")
        elif self.pipeline > 1:
            advice = "engine: megatron" + (" with zero: 1" if self.zero > 1 else "")
            raise ValueError(f"pipeline {self.pipeline} does not go with engine 'deepspeed'; use {advice}")
        if self.virtual > 1 and self.pipeline == 1:
            raise ValueError(f"virtual {self.virtual} needs a pipeline; use virtual: 1 or pipeline: 2 or more")
        if self.virtual > 1 and self.micro_batches % self.pipeline:
            raise ValueError(
                f"micro_batches {self.micro_batches} is not a multiple of pipeline {self.pipeline}, as virtual "
                f"{self.virtual} needs; use micro_batches: {-(-self.micro_batches // self.pipeline) * self.pipeline}"
            )
        if self.sequence and self.tensor == 1:
            raise ValueError("'sequence' splits tokens over tensor-parallel ranks; use tensor: 2 or more, or remove it")
        if self.layers == "transformer_engine" and self.zero == 3:
            raise ValueError("layers 'transformer_engine' does not go with zero 3; use zero: 2 or layers: auto")
        return self._check_offload()

    def _check_offload(self) -> ParallelSettings:
        if self.offload != "none" and self.zero == 0:
            raise ValueError("'offload' needs a sharded optimizer; use zero: 1 or more")
        if self.offload == "parameters" and self.zero != 3:
            raise ValueError("'offload: parameters' needs sharded weights; use zero: 3")
        if self.offload_path is not None and self.offload == "none":
            raise ValueError("'offload_path' is where something is offloaded to; set 'offload' or remove it")
        if self.offload_path is not None and self.zero != 3:
            raise ValueError("'offload_path' needs zero: 3; use that, or remove it to offload to CPU memory")
        return self

    def as_run(self, data_ranks: int, precision: str) -> ParallelSettings:
        """With the ZeRO stage that is run: one data-parallel rank has nothing to share out, so that the stages that
        cut optimizer and gradients would only copy them. DeepSpeed in bf16 keeps its stage, which sums in fp32."""
        idle = data_ranks == 1 and self.zero in (1, 2) and self.offload == "none"
        if not idle or (self.engine == "deepspeed" and precision != "fp32"):
            return self
        return self.model_copy(update={"zero": 0})
