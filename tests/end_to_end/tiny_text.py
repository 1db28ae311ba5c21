"""A whole chain of language models in a few seconds: three tiny Llamas on a few hundred lines of text, one control."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from compt_megatron.data.text.build import Request, build_text
from tests.unit.text_samples import texts

STEPS = {"s": 7, "m": 5, "l": 4, "l-alone": 4}
VOCABULARY = 280
LENGTH = 16


def model(width: int, heads: int, layers: int, **changes: Any) -> dict[str, Any]:
    return {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": width, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 2 * width,
        "vocab_size": VOCABULARY, "max_position_embeddings": 2 * LENGTH, "tie_word_embeddings": True,
        "rms_norm_eps": 0.0001, **changes,
    }  # fmt: skip


def write_text(folder: Path) -> Path:
    """`folder`/text: the splits train and held_out, with a BPE of their own."""
    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(text.replace("\n", " ") for text in texts(600)), encoding="utf-8")
    build_text([corpus], folder / "text", Request(train_bpe=VOCABULARY, append_eod=True, lines=True, held_out=0.1))
    return folder / "text"


def write_recipe(folder: Path, **changes: Any) -> Path:
    """The recipe, its models and its data in `folder`; `changes` replace whole sections."""
    write_text(folder)
    for name, config in (("s", model(16, 2, 1)), ("m", model(24, 4, 2)), ("l", model(32, 4, 2))):
        (folder / f"{name}.json").write_text(json.dumps(config))
    grow = {"operator": "exact"}
    recipe = {
        "name": "tiny-text",
        "objective": {"name": "causal_lm", "z_loss": 1e-4, "chunk": 64},
        "data": {"train": "text", "eval": ["text/held_out"], "batch_size": 8, "length": LENGTH},
        "optimizer": {"lr": 1e-2, "warmup_steps": 2},
        "checkpoint": {"every_steps": 2, "keep": 2},
        "report": {"every_steps": 1, "tensorboard": False},
        "links": [
            {"model": "s.json", "steps": STEPS["s"], "evaluate": {"every_epochs": 0.01}},
            {"model": "m.json", "steps": STEPS["m"], "grow": {**grow, "new_rate": 2.0}, "align": {"layers": {0: 0}}},
            {
                "model": "l.json",
                "steps": STEPS["l"],
                "grow": grow,
                "align": {"weight": 0.5, "end": 0.5},
                "distill": {"temperature": 2.0, "end": 0.5},
            },
        ],
        "controls": [{"link": "l", "steps": STEPS["l-alone"]}],
        **changes,
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path
