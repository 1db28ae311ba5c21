"""Parameter tables of Llama-type language models from Hugging Face's `config.json`.

RMSNorm before each half of a block, rotary positions, query groups, a gated MLP. `model_type` llama, mistral, qwen2 and
qwen3 differ in which biases and norms they have. Names are those of transformers' `*ForCausalLM`.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from compt_megatron.errors import UserError
from compt_megatron.spec.hf_config import HfConfig, check_plain
from compt_megatron.spec.table import Dim, Init, ModelSpec, Param, Tower, block_table

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")


def llama_spec(config: dict[str, Any], name: str) -> ModelSpec:
    """The parameter table of a Llama-type config.json. `name` is used in messages.

    Raises UserError for a missing or unsupported field, and where Hugging Face would refuse the sizes.
    """
    found = HfConfig(config, name)
    check_plain(found)
    kind = str(config["model_type"])
    tower = _tower(found, kind)
    biases = _biases(found, kind)
    vocab, std = found.integer("vocab_size", 32000), found.number("initializer_range", 0.02)
    params = {param.name: param for param in _params(tower, vocab, std, biases)}
    identity = {"family": "llama", "tower": asdict(tower), "vocab": vocab, "biases": biases, "window": _window(found)}
    return ModelSpec("llama", name, config, {"text": tower}, params, 0, identity)


def _tower(found: HfConfig, kind: str) -> Tower:
    width, heads = found.integer("hidden_size"), found.integer("num_attention_heads")
    if kind != "qwen3":
        found.divides("num_attention_heads", "hidden_size", heads, width)
    groups = found.integer("num_key_value_heads", {"mistral": 8, "qwen2": 32, "qwen3": 32}.get(kind, heads))
    if heads % groups:
        raise UserError(
            f"{found.name}: 'num_attention_heads' {heads} is not divisible by 'num_key_value_heads' {groups}; "
            "change one of them"
        )
    size = found.integer("head_dim", 128 if kind == "qwen3" else width // heads)
    if size % 2:
        raise UserError(f"{found.name}: 'head_dim' is {size}; rotary positions need an even number")
    return Tower(
        name="text",
        width=width,
        layers=found.integer("num_hidden_layers"),
        heads=heads,
        head_dim=size,
        mlp=found.integer("intermediate_size"),
        tokens=found.integer("max_position_embeddings", 2048),
        activation=found.text("hidden_act", "silu"),
        norm_eps=found.number("rms_norm_eps", 1e-6),
        causal=True,
        pool="none",
        ln_pre=False,
        norm_after_pool=False,
        block_prefix="model.layers",
        kv_heads=groups,
        norm="rms",
        gated=True,
        rope=found.rope(),
        tied=found.flag("tie_word_embeddings", False),
        head_norm=kind == "qwen3",
    )


def _biases(found: HfConfig, kind: str) -> dict[str, bool]:
    """Which projections have biases: `qkv`, `out` (attention's output), `mlp`."""
    if kind == "qwen2":  # not a field of its config
        return {"qkv": True, "out": False, "mlp": False}
    if kind == "mistral":
        return {"qkv": False, "out": False, "mlp": False}
    attention = found.flag("attention_bias", False)
    return {"qkv": attention, "out": attention, "mlp": kind == "llama" and found.flag("mlp_bias", False)}


def _window(found: HfConfig) -> int | None:
    """The length of the sliding attention window that all layers have, None for full attention."""
    layers = found.integer("num_hidden_layers")
    given = found.config.get("layer_types")
    if given is not None and (not isinstance(given, list) or len(given) != layers):
        raise UserError(
            f"{found.name}: 'layer_types' must have an entry for each of the {layers} layers (num_hidden_layers); "
            "lengthen it or leave it out"
        )
    kinds = set(given or _implied_kinds(found, layers))
    if kinds - {"full_attention", "sliding_attention"} or len(kinds) > 1:
        raise UserError(
            f"{found.name}: layers of different kinds of attention (layer_types, max_window_layers) are not supported; "
            "all must be full or all sliding"
        )
    if kinds == {"full_attention"} or found.config.get("sliding_window") is None:
        return None
    return found.integer("sliding_window")


def _implied_kinds(found: HfConfig, layers: int) -> list[str]:
    """What transformers makes of a config without layer_types: Qwen's first max_window_layers layers do not slide."""
    kind = found.config["model_type"]
    if kind == "mistral":
        return ["sliding_attention"] * layers
    if kind == "llama" or not found.flag("use_sliding_window", False):
        return ["full_attention"] * layers
    first = found.config.get("max_window_layers", 28)
    if isinstance(first, bool) or not isinstance(first, int):
        raise UserError(f"{found.name}: 'max_window_layers' must be an integer, not {first!r}")
    return ["sliding_attention" if layer >= first else "full_attention" for layer in range(layers)]


def _params(tower: Tower, vocab: int, std: float, biases: dict[str, bool]) -> list[Param]:
    normal, zero, one = Init("normal", std), Init("constant", 0.0), Init("constant", 1.0)
    words = Dim("vocab", "free", vocab)
    write, read = Dim("embed", "write", tower.width), Dim("embed", "read", tower.width)
    scale = (Dim("embed", "norm_scale", tower.width),)
    params = [
        Param("model.embed_tokens.weight", (words, write), "text", "pre", None, normal, 0),
        *block_table(tower, _rows(tower, normal, zero, one, biases)),
        Param("model.norm.weight", scale, "text", "post", None, one),
    ]
    if not tower.tied:
        params.append(Param("lm_head.weight", (words, read), "text", "post", None, normal, 0))
    return params


def _rows(
    tower: Tower, normal: Init, zero: Init, one: Init, biases: dict[str, bool]
) -> list[tuple[str, tuple[Dim, ...], Init, int | None]]:
    heads, groups = tower.heads * tower.head_dim, tower.groups * tower.head_dim
    write, read = Dim("embed", "write", tower.width), Dim("embed", "read", tower.width)
    scale = (Dim("embed", "norm_scale", tower.width),)
    inside = (Dim("head_dim", "norm_scale", tower.head_dim),)
    q, kv, out = Dim("heads", "write", heads), Dim("kv_heads", "write", groups), Dim("heads", "read", heads)
    units, used = Dim("mlp", "write", tower.mlp), Dim("mlp", "read", tower.mlp)
    rows: list[tuple[str, tuple[Dim, ...], Init, int | None]] = [("input_layernorm.weight", scale, one, None)]
    for name, dim in (("q_proj", q), ("k_proj", kv), ("v_proj", kv)):
        rows.append((f"self_attn.{name}.weight", (dim, read), normal, 0))
        if biases["qkv"]:
            rows.append((f"self_attn.{name}.bias", (dim,), zero, 0))
    rows.append(("self_attn.o_proj.weight", (write, out), normal, 1))
    if biases["out"]:
        rows.append(("self_attn.o_proj.bias", (write,), zero, None))
    if tower.head_norm:
        rows += [(f"self_attn.{name}.weight", inside, one, None) for name in ("q_norm", "k_norm")]
    rows.append(("post_attention_layernorm.weight", scale, one, None))
    for name in ("gate_proj", "up_proj"):
        rows.append((f"mlp.{name}.weight", (units, read), normal, 0))
        if biases["mlp"]:
            rows.append((f"mlp.{name}.bias", (units,), zero, 0))
    rows.append(("mlp.down_proj.weight", (write, used), normal, 1))
    if biases["mlp"]:
        rows.append(("mlp.down_proj.bias", (write,), zero, None))
    return rows
