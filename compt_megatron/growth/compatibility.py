"""Which pairs of models growth can connect at all, whatever the operator."""

from __future__ import annotations

from math import isqrt
from typing import Any

from compt_megatron.errors import UserError
from compt_megatron.spec.table import ModelSpec, Tower

# sizes that may only grow, and fields that must be the same: (attribute of a tower, how a user calls it)
_GROWING = (("width", "width"), ("layers", "number of layers"), ("heads", "number of heads"))
_GROWING_INSIDE = (("groups", "number of key-value heads"), ("head_dim", "head size"), ("mlp", "MLP size"))
_SAME = (
    ("activation", "activation"),
    ("norm_eps", "norm eps"),
    ("pool", "pooling"),
    ("ln_pre", "norm before the first block (no_ln_pre)"),
    ("norm_after_pool", "place of the final norm (final_ln_after_pool)"),
    ("causal", "attention mask"),
    ("layer_scale", "layer scale (ls_init_value)"),
    ("norm", "kind of norm"),
    ("gated", "kind of MLP"),
    ("head_norm", "norm inside the heads"),
    ("rope", "rotary positions (rope_theta, rope_scaling)"),
    ("tied", "head (tie_word_embeddings)"),
)
# rotary scalings that do not look at the longest sequence: without weights for positions, it may differ
_ANY_LENGTH = ("default", "linear", "llama3")


def check_growable(source: ModelSpec, target: ModelSpec) -> None:
    """Raise UserError, naming the first field, if no growth makes `target` out of `source`."""
    pair = f"cannot grow {source.name} into {target.name}"
    if source.family != target.family:
        raise UserError(
            f"{pair}: a {source.family} model is not a {target.family} model; both configs must be of one family"
        )
    for name, small in source.towers.items():
        _check_tower(f"{pair}: {name} tower", small, target.towers[name])
    _check_inputs(pair, source, target)
    if source.family == "vit" and source.joint != target.joint:
        raise UserError(
            f"{pair}: {source.joint} classes in the source and {target.joint} in the target; make embed_dim the same"
        )
    if source.joint > target.joint:
        raise UserError(
            f"{pair}: the joint embedding would shrink from {source.joint} to {target.joint}; "
            f"set embed_dim to {source.joint} or more"
        )
    for name in ("logit_bias",):
        if (name in source.params) != (name in target.params):
            have, lack = (source, target) if name in source.params else (target, source)
            raise UserError(
                f"{pair}: {have.name} has a {name} and {lack.name} has none; set init_logit_bias in both or none"
            )


def _check_tower(where: str, small: Tower, large: Tower) -> None:
    for field, words in (*_GROWING, *_GROWING_INSIDE):
        old, new = getattr(small, field), getattr(large, field)
        if old > new:
            raise UserError(f"{where}: the {words} would shrink from {old} to {new}; growth needs {old} or more")
    for field, words in _SAME:
        old, new = getattr(small, field), getattr(large, field)
        if old != new:
            raise UserError(
                f"{where}: the {words} differs, {old!r} in the source and {new!r} in the target; make them equal"
            )


def _check_inputs(pair: str, source: ModelSpec, target: ModelSpec) -> None:
    """Patch, image, context and vocabulary: every dimension that growth leaves alone."""
    old, new = _input_sizes(source), _input_sizes(target)
    for words, value in old.items():
        if value != new[words]:
            raise UserError(
                f"{pair}: the {words} differs, {value!r} in the source, {new[words]!r} in the target; make them equal"
            )


def _input_sizes(spec: ModelSpec) -> dict[str, Any]:
    """What a model reads, by the words a user knows it by; patch first, as it explains the number of tokens."""
    sizes: dict[str, Any] = {}
    if spec.is_language_model:
        tower = spec.towers["text"]
        sizes["vocabulary size"] = next(iter(spec.params.values())).shape[0]
        if tower.rope is None or tower.rope.kind not in _ANY_LENGTH:
            sizes["longest sequence"] = tower.tokens
        sizes["biases"] = spec.identity.get("biases")
        sizes["attention window"] = spec.identity.get("window")
        return sizes
    patch = spec.params["visual.conv1.weight"].shape[-1]
    sizes["patch size"] = patch
    sizes["image size"] = isqrt(spec.towers["vision"].tokens - 1) * patch
    if "text" in spec.towers:
        sizes["context length"] = spec.towers["text"].tokens
        sizes["vocabulary size"] = spec.params["token_embedding.weight"].shape[0]
        config = spec.config.get("text_cfg") or {}
        sizes["end-of-text id (eos_id)"] = config.get("eos_id", 2)
        sizes["padding id (pad_id)"] = config.get("pad_id", 0)
    return sizes
