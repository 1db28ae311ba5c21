"""The transformer block of a tower: megatron-core's TransformerBlock with our choice of layers and settings."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn

from compt_megatron.models.attention import SdpaAttention
from compt_megatron.models.linear import (
    BlockLayers,
    ColumnLinear,
    PlainColumnLinear,
    PlainRowLinear,
    RowLinear,
    ScaledRowLinear,
)
from compt_megatron.models.part import ModelPart
from compt_megatron.spec.table import Tower

Recompute = Literal["none", "selective", "full"]
LayerKind = Literal["torch", "transformer_engine"]

LINEARS = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")


def quick_gelu(x: Tensor) -> Tensor:
    """OpenAI CLIP's approximation of GELU: x · sigmoid(1.702 x), elementwise."""
    return x * torch.sigmoid(1.702 * x)


tanh_gelu = partial(F.gelu, approximate="tanh")  # GPT-2's GELU

ACTIVATIONS: dict[str, Any] = {
    "gelu": F.gelu,
    "gelu_python": F.gelu,
    "quick_gelu": quick_gelu,
    "gelu_new": tanh_gelu,
    "gelu_fast": tanh_gelu,
    "gelu_pytorch_tanh": tanh_gelu,
    "silu": F.silu,
    "swish": F.silu,
    "relu": F.relu,
}


class LayerNorm(nn.LayerNorm):
    """LayerNorm over the last dimension, with the tower's eps; torch computes statistics in fp32 for bf16 inputs.

    Unlike megatron-core's WrappedTorchNorm it may be used under sequence parallelism: each rank then sees only part of
    the tokens, and the mark on its parameters makes megatron sum their gradients over the tensor-parallel ranks.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class RMSNorm(nn.RMSNorm):
    """RMSNorm over the last dimension; statistics in fp32 for bf16 inputs. Marked like LayerNorm, see there."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class HeadNorm(RMSNorm):
    """RMSNorm of each query or key by itself (Qwen3). Tensor-parallel ranks have different heads, so its gradient is
    always to be summed over them: the mark says so."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(config, hidden_size, eps)
        self.weight.sequence_parallel = config.tensor_model_parallel_size > 1  # type: ignore[attr-defined]


TORCH_LAYERS = BlockLayers(
    column=ColumnLinear,
    plain_column=PlainColumnLinear,
    row=RowLinear,
    plain_row=PlainRowLinear,
    scaled_row=ScaledRowLinear,
    layer_norm=LayerNorm,
    rms_norm=RMSNorm,
    attention=SdpaAttention,
)


def block_layers(kind: LayerKind, tower: Tower, config: TransformerConfig, window: int | None = None) -> BlockLayers:
    """The layers of `kind` for the blocks of `tower`.

    Transformer Engine's attention is used where it means what ours does and is as sparing: in bf16 (in fp32 it keeps
    all scores), without a window, and without padding that no token may see.
    """
    if kind == "torch":
        return TORCH_LAYERS
    from compt_megatron.models.te_layers import TE_LAYERS

    padded = config.sequence_parallel and not tower.causal
    if config.params_dtype != torch.bfloat16 or window is not None or padded:
        return replace(TE_LAYERS, attention=SdpaAttention)
    return TE_LAYERS


def transformer_config(
    tower: Tower,
    dtype: torch.dtype,
    recompute: Recompute,
    part: ModelPart,
    sequence: bool = False,
    attention: float = 1.0,
) -> TransformerConfig:
    """megatron-core's settings for `tower`, split as `part` says.

    `recompute`: what the backward pass computes again, core attention (`selective`) or whole blocks (`full`);
    `sequence`: sequence parallelism; `attention`: a factor on the attention scores.
    """
    options: dict[str, Any] = {"sequence_parallel": sequence}
    if attention != 1.0:
        options["softmax_scale"] = attention * tower.head_dim**-0.5
    if recompute == "full":
        options |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    elif recompute == "selective":
        options |= {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    if part.virtual > 1:
        # the default way of sending gives wrong gradients in an interleaved pipeline of two stages
        options |= {"overlap_p2p_comm": True, "batch_p2p_comm": False}
        options["virtual_pipeline_model_parallel_size"] = part.virtual
    with warnings.catch_warnings():  # its own default for CUDA graphs is announced as deprecated
        warnings.filterwarnings("ignore", message="full scope is deprecated")
        warnings.filterwarnings("ignore", message="If you are using transformer_engine")  # core attention is ours
        return _config(tower, dtype, part, options)


def _config(tower: Tower, dtype: torch.dtype, part: ModelPart, options: dict[str, Any]) -> TransformerConfig:
    return TransformerConfig(
        num_layers=tower.layers,
        hidden_size=tower.width,
        num_attention_heads=tower.heads,
        kv_channels=tower.head_dim,
        ffn_hidden_size=tower.mlp,
        num_query_groups=tower.groups,
        activation_func=ACTIVATIONS[tower.activation],
        gated_linear_unit=tower.gated,
        normalization="RMSNorm" if tower.norm == "rms" else "LayerNorm",
        qk_layernorm=tower.head_norm,
        layernorm_epsilon=tower.norm_eps,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=part.tensor,
        pipeline_model_parallel_size=part.pipeline,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # weights always come from a file: allocate only, and on the ambient device (`with torch.device(...)`)
        perform_initialization=False,
        use_cpu_initialization=True,
        # fusions that need CUDA or apex
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        **options,
    )


def layer_spec(tower: Tower, biased: Collection[str] | None = None, layers: BlockLayers = TORCH_LAYERS) -> ModuleSpec:
    """The pre-norm layer x + attention(ln_1 x), x + mlp(ln_2 x), both scaled where the tower has a layer scale.

    `biased`: those of LINEARS that have a bias (None: all). Files name its norms as Transformer Engine does.
    """
    qkv, proj, fc1, fc2 = (biased is None or name in biased for name in LINEARS)
    last = layers.scaled_row if tower.layer_scale else layers.row  # of attention and of MLP
    norm = layers.rms_norm if tower.norm == "rms" else layers.layer_norm
    inside = HeadNorm if tower.head_norm else None
    attention = SelfAttentionSubmodules(
        linear_qkv=layers.column if qkv else layers.plain_column,
        core_attention=layers.attention,
        linear_proj=last if proj else layers.plain_row,
        q_layernorm=inside,
        k_layernorm=inside,
    )
    mask = AttnMaskType.causal if tower.causal else AttnMaskType.no_mask
    mlp = MLPSubmodules(
        linear_fc1=layers.column if fc1 else layers.plain_column, linear_fc2=last if fc2 else layers.plain_row
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(SelfAttention, params={"attn_mask_type": mask}, submodules=attention),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=_mlp_spec(mlp),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map={
                "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
                "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
            },
        ),
    )


def _mlp_spec(submodules: MLPSubmodules) -> Any:
    if hasattr(MLP, "as_mlp_submodule"):  # megatron-core >= 0.18 takes a callable and warns about a ModuleSpec
        return partial(MLP.as_mlp_submodule, submodules=submodules)
    return ModuleSpec(MLP, submodules=submodules)
