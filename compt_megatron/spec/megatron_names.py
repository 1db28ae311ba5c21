"""How our megatron-core modules, and the torch_dist files they are saved to, name and fuse the parameters of the table.

A tower is a `TransformerBlock` called `decoder` under `vision.` or `text.`. In files all layers of a parameter are one
tensor with a leading layer axis, and its key is the Transformer Engine spelling (the norm belongs to the linear that
follows it), as Megatron writes it. The rows of the fused QKV are interleaved per query group:
[groups, heads per group + 2, head_dim].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from compt_megatron.spec.table import ModelSpec

Part = Literal["q", "k", "v"]

# canonical suffix -> (module suffix, file suffix, part of the fused tensor)
_LAYER_NAMES: dict[str, tuple[str, str, Part | None]] = {
    "ln_1.weight": ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight", None),
    "ln_1.bias": ("input_layernorm.bias", "self_attention.linear_qkv.layer_norm_bias", None),
    "attn.q_proj.weight": ("self_attention.linear_qkv.weight", "self_attention.linear_qkv.weight", "q"),
    "attn.k_proj.weight": ("self_attention.linear_qkv.weight", "self_attention.linear_qkv.weight", "k"),
    "attn.v_proj.weight": ("self_attention.linear_qkv.weight", "self_attention.linear_qkv.weight", "v"),
    "attn.q_proj.bias": ("self_attention.linear_qkv.bias", "self_attention.linear_qkv.bias", "q"),
    "attn.k_proj.bias": ("self_attention.linear_qkv.bias", "self_attention.linear_qkv.bias", "k"),
    "attn.v_proj.bias": ("self_attention.linear_qkv.bias", "self_attention.linear_qkv.bias", "v"),
    "attn.out_proj.weight": ("self_attention.linear_proj.weight", "self_attention.linear_proj.weight", None),
    "attn.out_proj.bias": ("self_attention.linear_proj.bias", "self_attention.linear_proj.bias", None),
    "ln_2.weight": ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight", None),
    "ln_2.bias": ("pre_mlp_layernorm.bias", "mlp.linear_fc1.layer_norm_bias", None),
    "mlp.c_fc.weight": ("mlp.linear_fc1.weight", "mlp.linear_fc1.weight", None),
    "mlp.c_fc.bias": ("mlp.linear_fc1.bias", "mlp.linear_fc1.bias", None),
    "mlp.c_proj.weight": ("mlp.linear_fc2.weight", "mlp.linear_fc2.weight", None),
    "mlp.c_proj.bias": ("mlp.linear_fc2.bias", "mlp.linear_fc2.bias", None),
}

_OUTER_NAMES = {
    "visual.class_embedding": "vision.class_embedding",
    "visual.positional_embedding": "vision.position_embedding",
    "visual.conv1.weight": "vision.conv1.weight",
    "visual.ln_pre.weight": "vision.ln_pre.weight",
    "visual.ln_pre.bias": "vision.ln_pre.bias",
    "visual.ln_post.weight": "vision.ln_post.weight",
    "visual.ln_post.bias": "vision.ln_post.bias",
    "visual.proj": "vision.projection",
    "positional_embedding": "text.position_embedding",
    "token_embedding.weight": "text.token_embedding.weight",
    "ln_final.weight": "text.ln_final.weight",
    "ln_final.bias": "text.ln_final.bias",
    "text_projection": "text.projection",
    "logit_scale": "logit_scale",
    "logit_bias": "logit_bias",
}


@dataclass(frozen=True)
class MegatronPlace:
    """Where a parameter of the table lives in our megatron-core modules and in torch_dist files.

    `module`: the parameter's name in the unsharded module; `key`: its key in a file; `layer`: its index on the file
    tensor's leading layer axis (None: no such axis); `part`: which rows of the fused QKV it is (None: all).
    """

    module: str
    key: str
    layer: int | None
    part: Part | None


def megatron_place(spec: ModelSpec, name: str) -> MegatronPlace:
    """The place of canonical parameter `name`."""
    param = spec.params[name]
    if param.stage != "layer":
        return MegatronPlace(_OUTER_NAMES[name], _OUTER_NAMES[name], None, None)
    tower = spec.towers[param.tower]
    suffix = name.removeprefix(f"{tower.block_prefix}.{param.layer}.")
    module, key, part = _LAYER_NAMES[suffix]
    prefix = f"{param.tower}.decoder.layers"
    return MegatronPlace(f"{prefix}.{param.layer}.{module}", f"{prefix}.{key}", param.layer, part)


def fused_rows(part: Part, head: int, heads: int, groups: int, head_dim: int) -> slice:
    """Rows of the interleaved QKV that hold one head of q (head < heads), or of k or v (head < groups)."""
    per_group = heads // groups
    if part == "q":
        group, slot = divmod(head, per_group)
    else:
        group, slot = head, per_group + (0 if part == "k" else 1)
    start = (group * (per_group + 2) + slot) * head_dim
    return slice(start, start + head_dim)
