"""Multiply-accumulates (MACs) of a forward pass, from the parameter table alone."""

from __future__ import annotations

from dataclasses import replace

from compt_megatron.spec.table import ModelSpec, Param, Tower


def at_length(spec: ModelSpec, tokens: int) -> ModelSpec:
    """A language model as it runs on sequences of `tokens` tokens, for counting what that costs."""
    return replace(spec, towers={"text": replace(spec.towers["text"], tokens=tokens)})


def forward_macs(spec: ModelSpec, tower: str) -> int:
    """MACs of one forward pass of `tower` ("vision" or "text") for one image or one caption.

    Counted are the patch convolution, every matrix of the blocks, attention scores and weighted values (in full, also
    under a causal mask, as PyTorch counts them) and the projection of the pooled token; not counted are biases, norms,
    activations, embedding look-ups and the loss. One MAC is two FLOPs. A language model's head is counted for every
    token.
    """
    shape = spec.towers[tower]
    matrices = sum(_uses(param, shape) * param.numel for param in spec.params.values() if param.tower == tower)
    attention = shape.layers * 2 * shape.tokens**2 * shape.heads * shape.head_dim
    return matrices + attention


def head_macs(spec: ModelSpec) -> int:
    """Those of a language model's forward pass that its head has: one product with the vocabulary for every token."""
    return sum(
        spec.towers["text"].tokens * param.numel
        for param in spec.params.values()
        if spec.is_language_model and _is_head(param, spec.towers["text"])
    )


def sample_macs(spec: ModelSpec, captions: int = 1) -> int:
    """Forward MACs of one training sample: its image, and each of its captions where the model has a text tower.

    Of a language model: one sequence of its longest length (see `at_length`).
    """
    if spec.is_language_model:
        return forward_macs(spec, "text")
    return forward_macs(spec, "vision") + (captions * forward_macs(spec, "text") if "text" in spec.towers else 0)


def _is_head(param: Param, tower: Tower) -> bool:
    """Whether a parameter is the matrix that makes a language model's logits; tied, it is the token embedding too."""
    vocabulary = any(dim.axis == "vocab" for dim in param.dims)
    return tower.pool == "none" and vocabulary and (tower.tied or param.stage == "post")


def _uses(param: Param, tower: Tower) -> int:
    """How many vectors a forward pass of one sample multiplies by this parameter."""
    axes = {dim.axis for dim in param.dims}
    if _is_head(param, tower):
        return tower.tokens
    if len(param.dims) < 2 or axes & {"tokens", "vocab"}:  # biases and norms; embeddings, which are looked up
        return 0
    if "patch" in axes:
        return tower.tokens - 1  # every token but the class token is a patch
    return tower.tokens if param.stage == "layer" else 1  # only the pooled token is projected
