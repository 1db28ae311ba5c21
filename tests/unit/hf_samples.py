"""Small language models that transformers makes and saves, for the tests of the Hugging Face format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from compt_megatron.spec.families import spec_from_config
from compt_megatron.torchvision_mend import ensure_torchvision

_SIZES = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT2 = {"vocab_size": 61, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 32} | {
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **_SIZES, "rope_theta": 5e5},
    "llama-tied-biases": {
        "model_type": "llama",
        **_SIZES,
        "tie_word_embeddings": True,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "mistral": {"model_type": "mistral", **_SIZES, "sliding_window": 8, "head_dim": 8},
    "qwen2": {"model_type": "qwen2", **_SIZES},
    "qwen3": {"model_type": "qwen3", **_SIZES, "head_dim": 8, "tie_word_embeddings": True},
    "gpt2": {"model_type": "gpt2", **_GPT2},
    "gpt2-untied": {"model_type": "gpt2", **_GPT2, "n_inner": 40, "tie_word_embeddings": False},
}


def made(name: str, seed: int = 0) -> Any:
    """transformers' model of CONFIGS[name], every parameter random: norms and biases too."""
    ensure_torchvision()
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**CONFIGS[name])).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def saved(name: str, folder: Path, shard: str = "9KB") -> Any:
    """Save `made(name)` as transformers does, in shards, with a tokenizer's files beside; returns the model."""
    from transformers.utils import logging

    model = made(name)
    logging.disable_progress_bar()
    model.save_pretrained(folder, max_shard_size=shard)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "tokenizer.model").write_bytes(bytes(range(256)))
    return model


def loaded(folder: Path) -> Any:
    """What transformers loads from a folder; asserts that nothing is missing or left over."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(found.values()), found
    return model.eval()


def logits(model: Any, length: int = 16) -> torch.Tensor:
    ids = torch.arange(2 * length).reshape(2, length) % 61
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids).logits
    return found


def canonical(model: Any, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """`weight/<name>` of a model, GPT-2's q, k and v apart as its attention splits them."""
    state = dict(model.state_dict())
    for key in [key for key in state if ".c_attn." in key]:
        for part, value in zip("qkv", state[key].split(config["n_embd"], dim=-1), strict=True):
            state[key.replace("c_attn", f"{part}_proj")] = value
    return {f"weight/{name}": state[name].clone() for name in spec_from_config(config, "canonical").params}
