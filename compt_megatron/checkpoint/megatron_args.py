"""The arguments of Megatron-LM (megatron/training/arguments.py) that say which model it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compt_megatron.errors import UserError
from compt_megatron.spec.table import ModelSpec, Tower

# arguments that a checkpoint of the model must have been saved with, where it says so at all
_CHECKED = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "swiglu",
    "normalization",
    "position_embedding_type",
    "untie_embeddings_and_output_weights",
    "qk_layernorm",
)
_TANH_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")  # what Megatron's fused bias and GELU computes
_TOLD = ("norm_epsilon", "rotary_base")  # another value makes another function of the same weights: said, not refused


def model_args(spec: ModelSpec) -> dict[str, Any]:
    """The arguments that make Megatron-LM build the language model `spec`, under the names of its argument parser.

    Raises UserError for a model that Megatron's GPTModel cannot be.
    """
    tower = spec.towers["text"]
    linear, qkv = _biases(spec, tower)
    learned = tower.rope is None
    return {
        "num_layers": tower.layers,
        "hidden_size": tower.width,
        "ffn_hidden_size": tower.mlp,
        "num_attention_heads": tower.heads,
        "group_query_attention": tower.groups != tower.heads,
        "num_query_groups": tower.groups if tower.groups != tower.heads else 1,
        "kv_channels": tower.head_dim,
        "seq_length": tower.tokens,
        "max_position_embeddings": tower.tokens,
        "position_embedding_type": "learned_absolute" if learned else "rope",
        "add_position_embedding": True,
        "use_rotary_position_embeddings": not learned,
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        **_rope(tower),
        "normalization": "RMSNorm" if tower.norm == "rms" else "LayerNorm",
        "norm_epsilon": tower.norm_eps,
        "apply_layernorm_1p": False,
        "qk_layernorm": tower.head_norm,
        "swiglu": tower.gated,
        "squared_relu": False,
        "bias_gelu_fusion": tower.activation in _TANH_GELU,
        "add_bias_linear": linear,
        "add_qkv_bias": qkv,
        "untie_embeddings_and_output_weights": not tower.tied,
        "attention_dropout": float(spec.config.get("attn_pdrop", 0.1) if learned else 0.0),
        "hidden_dropout": float(spec.config.get("resid_pdrop", 0.1) if learned else 0.0),
        "apply_query_key_layer_scaling": False,
    }


def _biases(spec: ModelSpec, tower: Tower) -> tuple[bool, bool]:
    """`add_bias_linear` and `add_qkv_bias`."""

    def has(*leaves: str) -> bool:
        return any(f"{tower.block_prefix}.0.{leaf}.bias" in spec.params for leaf in leaves)

    qkv, out = has("attn.q_proj", "self_attn.q_proj"), has("attn.c_proj", "self_attn.o_proj")
    mlp = has("mlp.c_fc", "mlp.down_proj")
    if out != mlp or (out and not qkv):
        raise UserError(
            f"'{spec.name}' has biases in some of its linears only, which Megatron-LM's GPT model cannot have; "
            "write another format"
        )
    return out, qkv and not out


def _rope(tower: Tower) -> dict[str, Any]:
    if tower.rope is None:
        return {"rotary_base": 10000}
    found: dict[str, Any] = {"rotary_base": _whole(tower.rope.theta)}
    scaling = dict(tower.rope.scaling)
    if tower.rope.kind == "llama3":
        found |= {"use_rope_scaling": True, "rope_scaling_factor": float(scaling.get("factor", 8.0))}
    elif tower.rope.kind == "linear":
        found["rotary_seq_len_interpolation_factor"] = _whole(float(scaling.get("factor", 1.0)))
    return found


def _whole(value: float) -> int | float:
    return int(value) if value == int(value) else value


# what megatron-core's RotaryEmbedding has built in for llama3 scaling
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def left_to_the_user(spec: ModelSpec) -> list[str]:
    """What Megatron-LM must be told on its command line, where `--use-checkpoint-args` takes it from no checkpoint."""
    tower = spec.towers["text"]
    flags = [f"--norm-epsilon {tower.norm_eps:g}"] if tower.norm_eps != 1e-5 else []
    flags += ["--qk-layernorm"] * tower.head_norm
    flags += ["--no-bias-gelu-fusion"] * (tower.activation == "gelu")
    notes = []
    if not tower.gated and tower.activation not in (*_TANH_GELU, "gelu"):
        notes.append(f"it has no argument for the activation '{tower.activation}'")
    if tower.rope is not None and tower.rope.kind == "llama3":
        scaling = dict(tower.rope.scaling)
        flags.append(f"--use-rope-scaling --rope-scaling-factor {scaling.get('factor', 8.0):g}")
        if any(scaling.get(key, value) != value for key, value in _LLAMA3.items()):
            notes.append("--use-rope-scaling has other numbers than the model's rotary scaling")
    elif tower.rope is not None and tower.rope.kind == "linear":
        factor = dict(tower.rope.scaling).get("factor", 1.0)
        flags.append(f"--rotary-seq-len-interpolation-factor {factor:g}")
    elif tower.rope is not None and tower.rope.kind != "default":
        notes.append(f"it has no argument for the rotary scaling '{tower.rope.kind}'")
    if tower.gated and tower.activation not in ("silu", "swish"):
        notes.append(f"--swiglu means silu, the model's gate is '{tower.activation}'")
    if (window := spec.identity.get("window")) is not None:
        flags.append(f"--window-size {window - 1},0")
    return ([f"Megatron-LM needs these arguments beside --use-checkpoint-args: {' '.join(flags)}"] if flags else []) + [
        f"Megatron-LM does not compute this model: {note}" for note in notes
    ]


def check_args(spec: ModelSpec, args: dict[str, Any], path: Path) -> list[str]:
    """Compare the arguments that a checkpoint was saved with to the model that it is said to be.

    Returns lines on differences that change the function, not the weights. Raises UserError if it is another model.
    """
    if not spec.is_language_model or not args:
        return []
    expected = model_args(spec)
    told = []
    for name in (*_CHECKED, *_TOLD):
        found, wanted = args.get(name), expected.get(name)
        if name == "num_query_groups" and not args.get("group_query_attention", wanted != 1):
            found = 1
        if found is None or wanted is None or found == wanted or not isinstance(found, bool | int | float | str):
            continue
        if name in _CHECKED:
            raise UserError(
                f"{path}: checkpoint of another model than '{spec.name}': it was saved with {name} {found}, the model "
                f"config says {wanted}; name the right model config with --from"
            )
        told.append(f"was saved with {name} {found}, the model config says {wanted}")
    return told
