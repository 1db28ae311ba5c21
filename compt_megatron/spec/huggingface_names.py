"""How Hugging Face's files name and fuse the parameters of the table, and which field of config.json a misfit is about.

Canonical names are those of transformers' `*ForCausalLM` already. GPT-2's files fuse q, k and v: they are columns of
`attn.c_attn`, whose matrices are [in, out].
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from compt_megatron.spec.table import ModelSpec

# model_type of config.json -> the class in transformers that a language model of it is
ARCHITECTURES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
HEAD = "lm_head.weight"
_FUSED = re.compile(r"(.*\.attn)\.([qkv])_proj\.(weight|bias)")
# what older files hold beside the parameters: causal masks, rotary tables
_BUFFERS = {"gpt2": re.compile(r"(.*\.)?attn\.(masked_)?bias"), "llama": re.compile(r"(.*\.)?rotary_emb\.\w+")}
_FIELDS = {
    "gpt2": {"vocab": "vocab_size", "tokens": "n_positions", "embed": "n_embd", "heads": "n_embd", "mlp": "n_inner"},
    "llama": {
        "vocab": "vocab_size",
        "embed": "hidden_size",
        "heads": "num_attention_heads",
        "kv_heads": "num_key_value_heads",
        "head_dim": "head_dim",
        "mlp": "intermediate_size",
    },
}
_LAYERS = {"gpt2": "n_layer", "llama": "num_hidden_layers"}


@dataclass(frozen=True)
class HfPlace:
    """Where a parameter lies in a Hugging Face file: tensor `key`, from index `start` of its last dimension on."""

    key: str
    start: int = 0


def hf_place(spec: ModelSpec, name: str) -> HfPlace:
    """The place of canonical parameter `name` in a Hugging Face state dict of the same model."""
    if spec.family == "gpt2" and (found := _FUSED.fullmatch(name)):
        module, part, leaf = found.groups()
        return HfPlace(f"{module}.c_attn.{leaf}", "qkv".index(part) * spec.params[name].shape[-1])
    return HfPlace(name)


def hf_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Key -> shape of the Hugging Face state dict, in the order of the table. A tied head is no tensor of its own."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, param in spec.params.items():
        place = hf_place(spec, name)
        last = max(place.start + param.shape[-1], shapes.get(place.key, (0,))[-1])
        shapes[place.key] = (*param.shape[:-1], last)
    return shapes


def embedding_key(spec: ModelSpec) -> str:
    """The key of the token embedding."""
    return next(iter(spec.params))


def head_key(spec: ModelSpec) -> str:
    """The canonical name of a language model's head: the token embedding where they are tied."""
    return embedding_key(spec) if spec.towers["text"].tied else HEAD


def stored_keys(spec: ModelSpec, stored: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """Key of transformers' language model -> key in the files, and the keys in the files that are none.

    Base models are stored without the prefix `model.` or `transformer.`, models wrapped for data parallelism with
    `module.` before it; buffers are left out. A head beside a tied embedding is among the keys.
    """
    stored = list(stored)
    wrapper = "module." if stored and all(key.startswith("module.") for key in stored) else ""
    known = {*hf_shapes(spec), HEAD}
    base = embedding_key(spec).partition(".")[0]
    found: dict[str, str] = {}
    strangers = []
    for full in stored:
        key = full.removeprefix(wrapper)
        key = key if key in known else f"{base}.{key}"
        if key in known and key not in found:
            found[key] = full
        elif not _BUFFERS[spec.family].fullmatch(key):
            strangers.append(full)
    return found, strangers


def misfit_field(spec: ModelSpec, key: str, shape: tuple[int, ...] | None = None) -> str:
    """The field of config.json that most likely is wrong where the files disagree on tensor `key`, "" if unknown.

    `shape`: what the files say where both have the tensor; else one of the two lacks it.
    """
    if shape is not None:
        return _field_of_shape(spec, key, shape)
    if key.endswith(HEAD):
        return "tie_word_embeddings"
    prefix = re.escape(spec.towers["text"].block_prefix)
    block = re.match(rf"(?:module\.)?(?:{prefix}|h|layers)\.(\d+)\.", key)
    if block and int(block.group(1)) >= spec.towers["text"].layers:
        return _LAYERS[spec.family]
    if spec.family == "llama" and key.endswith(".bias"):
        return "mlp_bias" if ".mlp." in key else "attention_bias"
    return "model_type" if key.endswith(("q_norm.weight", "k_norm.weight")) else ""


def _field_of_shape(spec: ModelSpec, key: str, shape: tuple[int, ...]) -> str:
    expected = hf_shapes(spec)[key]
    param = next(param for name, param in spec.params.items() if hf_place(spec, name).key == key)
    if len(shape) != len(expected):
        return ""
    wrong = [dim.axis for dim, here, there in zip(param.dims, shape, expected, strict=True) if here != there]
    fields = [_FIELDS[spec.family].get(axis, "") for axis in wrong]
    return fields[0] if fields else ""


def explicit_config(spec: ModelSpec, dtype: str) -> dict[str, object]:
    """config.json for a checkpoint of `spec` whose weights are stored as `dtype`.

    The model's own config, with what transformers would otherwise fill in from other fields (`head_dim`, `n_inner`),
    the architecture, and the dtype as `torch_dtype`, which transformers 4 and 5 read; 5 prefers `dtype` where it is.
    """
    tower, config = spec.towers["text"], dict(spec.config)
    if spec.family == "gpt2":
        config["n_inner"] = tower.mlp
    else:
        config["head_dim"] = tower.head_dim
    own = ARCHITECTURES[str(config["model_type"])]
    given = config.get("architectures")
    if not (isinstance(given, list) and any(str(name).endswith(("ForCausalLM", "LMHeadModel")) for name in given)):
        config["architectures"] = [own]
    config["torch_dtype"] = dtype
    if "dtype" in config:
        config["dtype"] = dtype
    return config
