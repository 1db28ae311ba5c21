"""The registry of model families: which builder makes the parameter table of a config."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from compt_megatron.errors import UserError
from compt_megatron.recipe.files import find_model_config, read_json
from compt_megatron.spec.clip import clip_spec
from compt_megatron.spec.gpt2 import gpt2_spec
from compt_megatron.spec.llama import MODEL_TYPES, llama_spec
from compt_megatron.spec.table import ModelSpec

# (does this config belong to the family?, its table): a new family is one module and one entry here
FAMILIES: list[tuple[Callable[[dict[str, Any]], bool], Callable[[dict[str, Any], str], ModelSpec]]] = [
    (lambda config: "vision_cfg" in config, clip_spec),
    (lambda config: config.get("model_type") == "gpt2", gpt2_spec),
    (lambda config: config.get("model_type") in MODEL_TYPES, llama_spec),
]


def spec_from_config(config: dict[str, Any], name: str) -> ModelSpec:
    """The parameter table of a model config: open_clip's JSON, or a language model's config.json.

    Raises UserError if no family knows the config.
    """
    if isinstance(config.get("model_cfg"), dict):  # open_clip_config.json wraps the model config
        config = config["model_cfg"]
    for belongs, build in FAMILIES:
        if belongs(config):
            return build(config, name)
    if "model_type" in config:
        known = ", ".join(("gpt2", *MODEL_TYPES))
        raise UserError(f"{name}: model_type {config['model_type']!r} is not supported; those supported: {known}")
    raise UserError(
        f"{name}: not a model config of a known family (open_clip's has 'embed_dim' and 'vision_cfg', Hugging Face's "
        "'model_type')"
    )


def load_spec(name: str, beside: Path | None = None) -> ModelSpec:
    """The parameter table of model config `name` (see `recipe.files.find_model_config` for where it is looked for)."""
    path = find_model_config(name, beside)
    stem = path.parent.name if path.name in ("open_clip_config.json", "config.json") else path.stem
    return spec_from_config(read_json(path), stem)
