"""Parameter tables of GPT-2-type language models from Hugging Face's `config.json`.

LayerNorm before each half of a block, learned positions, biases everywhere. Names and the [in, out] orientation of the
matrices are transformers' own; q, k and v, which its files fuse, are tensors of their own here.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from compt_megatron.spec.hf_config import HfConfig, check_plain
from compt_megatron.spec.table import Dim, Init, ModelSpec, Param, Tower, block_table


def gpt2_spec(config: dict[str, Any], name: str) -> ModelSpec:
    """The parameter table of a GPT-2-type config.json. `name` is used in messages.

    Raises UserError for a missing or unsupported field, and where Hugging Face would refuse the sizes.
    """
    found = HfConfig(config, name)
    check_plain(found)
    found.only("scale_attn_by_inverse_layer_idx", False)
    found.only("scale_attn_weights", True)
    width, heads = found.integer("n_embd", 768), found.integer("n_head", 12)
    found.divides("n_head", "n_embd", heads, width)
    tower = Tower(
        name="text",
        width=width,
        layers=found.integer("n_layer", 12),
        heads=heads,
        head_dim=width // heads,
        mlp=found.integer("n_inner", 4 * width),
        tokens=found.integer("n_positions", 1024),
        activation=found.text("activation_function", "gelu_new"),
        norm_eps=found.number("layer_norm_epsilon", 1e-5),
        causal=True,
        pool="none",
        ln_pre=False,
        norm_after_pool=False,
        block_prefix="transformer.h",
        tied=found.flag("tie_word_embeddings", True),
    )
    vocab, std = found.integer("vocab_size", 50257), found.number("initializer_range", 0.02)
    params = {param.name: param for param in _params(tower, vocab, std)}
    identity = {"family": "gpt2", "tower": asdict(tower), "vocab": vocab}
    return ModelSpec("gpt2", name, config, {"text": tower}, params, 0, identity)


def _params(tower: Tower, vocab: int, std: float) -> list[Param]:
    normal, zero, one = Init("normal", std), Init("constant", 0.0), Init("constant", 1.0)
    out = Init("normal", std * (2 * tower.layers) ** -0.5)  # writers of the residual stream, by its number of them
    words, places = Dim("vocab", "free", vocab), Dim("tokens", "free", tower.tokens)
    write, read = Dim("embed", "write", tower.width), Dim("embed", "read", tower.width)
    scale, shift = (Dim("embed", "norm_scale", tower.width),), (Dim("embed", "norm_bias", tower.width),)
    size = tower.heads * tower.head_dim
    heads, used = Dim("heads", "write", size), Dim("heads", "read", size)
    units, active = Dim("mlp", "write", tower.mlp), Dim("mlp", "read", tower.mlp)
    rows: list[tuple[str, tuple[Dim, ...], Init, int | None]] = [
        ("ln_1.weight", scale, one, None),
        ("ln_1.bias", shift, zero, None),
        *((f"attn.{part}_proj.weight", (read, heads), normal, 1) for part in "qkv"),
        *((f"attn.{part}_proj.bias", (heads,), zero, 0) for part in "qkv"),
        ("attn.c_proj.weight", (used, write), out, 0),
        ("attn.c_proj.bias", (write,), zero, None),
        ("ln_2.weight", scale, one, None),
        ("ln_2.bias", shift, zero, None),
        ("mlp.c_fc.weight", (read, units), normal, 1),
        ("mlp.c_fc.bias", (units,), zero, 0),
        ("mlp.c_proj.weight", (active, write), out, 0),
        ("mlp.c_proj.bias", (write,), zero, None),
    ]
    params = [
        Param("transformer.wte.weight", (words, write), "text", "pre", None, normal, 0),
        Param("transformer.wpe.weight", (places, write), "text", "pre", None, normal),
        *block_table(tower, rows),
        Param("transformer.ln_f.weight", scale, "text", "post", None, one),
        Param("transformer.ln_f.bias", shift, "text", "post", None, zero),
    ]
    if not tower.tied:
        params.append(Param("lm_head.weight", (words, read), "text", "post", None, normal, 0))
    return params
