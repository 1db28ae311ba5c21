"""The parameter table: one pure-data description of a model, made from its config alone (no weights, no GPU).

Growth, checkpoint formats, the planner, sharding and initialisation all read this table; nothing else in the project
knows a parameter's name or shape. The axes follow "Growth, mathematically" in docs/growth.md:

- `embed` is the residual axis: the width that a tower's residual stream has everywhere;
- `heads` (head-major: head h owns rows h*head_dim .. (h+1)*head_dim), `kv_heads` (the same for the keys and values of
  query groups, where there are fewer of them than heads), `head_dim` (norms inside a head) and `mlp` are hidden axes of
  one block;
- `joint` is the shared image-text embedding (or the classes of a plain ViT);
- every other axis (`vocab`, `tokens`, `channels`, `patch`) never grows.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

Role = Literal["write", "read", "norm_scale", "norm_bias", "write_scale", "free"]
Stage = Literal["pre", "layer", "post"]

Part = Literal["q", "k", "v"]

# fields of open_clip's text_cfg that say how text becomes tokens, not what the model is
TOKENIZER_FIELDS = ("hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs")


@dataclass(frozen=True)
class Dim:
    """One dimension of a parameter: its logical axis, what the parameter does with that axis, and its size.

    Roles: `write`, the parameter's output feeds the axis; `read`, it consumes the axis; `norm_scale` and `norm_bias`,
    a normalisation over it; `write_scale`, it multiplies, entry by entry, what other parameters write (those that name
    it as `scaled_by`); `free`, growth leaves it alone.
    """

    axis: str
    role: Role
    size: int


@dataclass(frozen=True)
class Init:
    """A fresh parameter's distribution: `normal` (scale = std), `uniform` (scale = bound) or `constant` (= scale)."""

    kind: Literal["normal", "uniform", "constant"]
    scale: float


@dataclass(frozen=True)
class Param:
    """One parameter under its canonical name (open_clip's or Hugging Face's own, with q, k, v as separate tensors)."""

    name: str
    dims: tuple[Dim, ...]
    tower: str  # "vision", "text", or "" for parameters of the whole model
    stage: Stage
    layer: int | None  # the layer's index within its tower where stage is "layer"
    init: Init
    tensor_dim: int | None = None  # the dimension that tensor parallelism splits
    part: Part | None = None  # of attention's input projection: the query, key or value of it
    scaled_by: str | None = None  # the parameter of role `write_scale` that multiplies what this one writes

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(dim.size for dim in self.dims)

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def decays(self) -> bool:
        """Whether weight decay applies: to matrices and larger only, never to biases, norms or the logit scale."""
        return len(self.dims) >= 2


@dataclass(frozen=True)
class Rope:
    """Rotary positions: base frequency, kind of scaling ("default", "linear", "llama3", "yarn", ...), its numbers."""

    theta: float
    kind: str = "default"
    scaling: tuple[tuple[str, Any], ...] = ()  # sorted by name


@dataclass(frozen=True)
class Tower:
    """The shape of one transformer tower. Sizes are counts; `tokens` is the sequence length the tower runs at."""

    name: str  # "vision" or "text"
    width: int
    layers: int
    heads: int
    head_dim: int
    mlp: int
    tokens: int
    activation: str  # "gelu", "quick_gelu"; a language model's as its config calls it
    norm_eps: float
    causal: bool
    pool: Literal["tok", "avg", "argmax", "eos", "first", "last", "none"]  # "none": a language model
    ln_pre: bool  # a LayerNorm before the first block (CLIP's vision tower)
    norm_after_pool: bool
    block_prefix: str  # canonical prefix of layer i is f"{block_prefix}.{i}."
    kv_heads: int = 0  # query groups; 0: as many as heads
    norm: Literal["layer", "rms"] = "layer"
    gated: bool = False  # the MLP multiplies an activated gate (SwiGLU)
    rope: Rope | None = None  # None: learned positions
    tied: bool = False  # the language-model head is the token embedding
    head_norm: bool = False  # queries and keys are normalised inside each head (Qwen3)
    layer_scale: bool = False  # what a block adds to the residual stream is multiplied by a learned vector (LayerScale)

    @property
    def groups(self) -> int:
        """Query groups: heads that share one key and value count as one."""
        return self.kv_heads or self.heads


@dataclass(frozen=True)
class ModelSpec:
    """A whole model. `config` is the ecosystem's own config, verbatim: open_clip's JSON, Hugging Face's config.json."""

    family: str  # "clip" (two towers), "vit" (the vision tower alone), "gpt2" or "llama" (a text tower alone)
    name: str
    config: dict[str, Any]
    towers: dict[str, Tower]
    params: dict[str, Param]  # in the order of the model, keyed by canonical name
    joint: int  # size of the shared embedding, classes of a plain ViT, 0 for a language model
    identity: dict[str, Any]  # what of the config makes it this model and no other

    @property
    def numel(self) -> int:
        """Number of parameters."""
        return sum(param.numel for param in self.params.values())

    @property
    def digest(self) -> str:
        """A short hash of `identity`: two checkpoints with the same digest hold the same model.

        How the tokenizer is found (a path, usually) is no part of it, nor what a config says about training.
        """
        text = json.dumps(self.identity, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def is_language_model(self) -> bool:
        """Whether it predicts tokens: one tower, whose tokens are not pooled."""
        return list(self.towers) == ["text"] and self.towers["text"].pool == "none"


def block_table(tower: Tower, rows: list[tuple[str, tuple[Dim, ...], Init, int | None]]) -> list[Param]:
    """The parameters of all blocks of a tower; `rows`: name within the block, dimensions, distribution, tensor_dim."""
    parts: dict[str, Part] = {"q_proj": "q", "k_proj": "k", "v_proj": "v"}
    return [
        Param(
            f"{tower.block_prefix}.{layer}.{suffix}",
            dims,
            tower.name,
            "layer",
            layer,
            init,
            tensor_dim,
            parts.get(suffix.split(".")[-2]),
        )
        for layer in range(tower.layers)
        for suffix, dims, init, tensor_dim in rows
    ]
