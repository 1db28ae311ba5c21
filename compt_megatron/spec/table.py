"""The parameter table: one pure-data description of a model, made from its config alone (no weights, no GPU).

Growth, checkpoint formats, the planner, sharding and initialisation all read this table; nothing else in the project
knows a parameter's name or shape. The axes follow "Growth, mathematically" in docs/growth.md:

- `embed` is the residual axis: the width that a tower's residual stream has everywhere;
- `heads` (head-major: head h owns rows h*head_dim .. (h+1)*head_dim) and `mlp` are hidden axes of one block;
- `joint` is the shared image-text embedding (or the classes of a plain ViT);
- every other axis (`vocab`, `tokens`, `channels`, `patch`) never grows.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

Role = Literal["write", "read", "norm_scale", "norm_bias", "free"]
Stage = Literal["pre", "layer", "post"]

# fields of open_clip's text_cfg that say how text becomes tokens, not what the model is
TOKENIZER_FIELDS = ("hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs")


@dataclass(frozen=True)
class Dim:
    """One dimension of a parameter: its logical axis, what the parameter does with that axis, and its size.

    Roles: `write`, the parameter's output feeds the axis; `read`, it consumes the axis; `norm_scale` and `norm_bias`,
    a normalisation over it; `free`, growth leaves it alone.
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
class Tower:
    """The shape of one transformer tower. Sizes are counts; `tokens` is the sequence length the tower runs at."""

    name: str  # "vision" or "text"
    width: int
    layers: int
    heads: int
    head_dim: int
    mlp: int
    tokens: int
    activation: Literal["gelu", "quick_gelu"]
    norm_eps: float
    causal: bool
    pool: Literal["tok", "avg", "argmax", "eos", "first", "last"]
    ln_pre: bool  # a LayerNorm before the first block (CLIP's vision tower)
    norm_after_pool: bool
    block_prefix: str  # canonical prefix of layer i is f"{block_prefix}.{i}."


@dataclass(frozen=True)
class ModelSpec:
    """A whole model. `config` is the ecosystem's own config, verbatim (open_clip's JSON here)."""

    family: str  # "clip" (two towers) or "vit" (the vision tower alone)
    name: str
    config: dict[str, Any]
    towers: dict[str, Tower]
    params: dict[str, Param]  # in the order of the model, keyed by canonical name
    joint: int  # size of the shared embedding, or classes of a plain ViT

    @property
    def numel(self) -> int:
        """Number of parameters."""
        return sum(param.numel for param in self.params.values())

    @property
    def digest(self) -> str:
        """A short hash of the config: two checkpoints with the same digest hold the same model.

        How the tokenizer is found (a path, usually) is no part of it.
        """
        config = {**self.config}
        if isinstance(config.get("text_cfg"), dict):
            config["text_cfg"] = {
                key: value for key, value in config["text_cfg"].items() if key not in TOKENIZER_FIELDS
            }
        text = json.dumps(config, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]
