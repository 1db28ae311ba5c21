"""What llm_chain trains: the three models, the settings that are varied, and a cell, which is one training.

A cell has an id, the hash of all that decides its result, the cell that it grows from included.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compt_megatron.recipe.schema import merge

# Batches of 48 leave a model alone 800 steps, a tenth of which go by before it learns more than how often tokens are.
VOCABULARY, LENGTH, BATCH = 1024, 128, 16
WARMUP = 0.05  # of the steps, for a model alone
OPTIMIZER = {"name": "adamw", "weight_decay": 0.1, "betas": [0.9, 0.95], "schedule": "cosine", "clip_grad": 1.0}
OBJECTIVE = {"name": "causal_lm", "chunk": 256}
TEXT, HELD_OUT = "stdlib/train", "stdlib/held_out"


def _llama(width: int, layers: int, units: int) -> dict[str, Any]:
    return {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": VOCABULARY, "hidden_size": width,
        "num_hidden_layers": layers, "num_attention_heads": width // 16, "num_key_value_heads": width // 16,
        "head_dim": 16, "intermediate_size": units, "hidden_act": "silu", "max_position_embeddings": LENGTH,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "attention_bias": False, "mlp_bias": False,
        "initializer_range": 0.02, "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip


# each takes about twice the MACs of the one before, and is wider and deeper
MODELS = {"s": _llama(48, 2, 128), "m": _llama(64, 3, 176), "l": _llama(80, 5, 208)}
PREVIOUS = {"m": "s", "l": "m"}

# what a link is by default; `rate` is a factor on the rate that is best for the model alone
DEFAULT: dict[str, Any] = {
    "grow": {"operator": "exact", "depth": "identity", "moments": "fresh"},
    "align": {"weight": 0.3, "schedule": "cosine"},
    "distill": None,
    "rate": 1.0,
    "warmup": 0.02,
}
# one factor at a time; what needs the most of the program comes last
VARIATIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "align-off": {"align": None},
    "rate-half": {"rate": 0.5},
    "rate-double": {"rate": 2.0},
    "depth-interleave": {"grow": {"depth": "interleave", "allow_approximate": True}},
    "depth-stack": {"grow": {"depth": "stack", "allow_approximate": True}},
    "operator-corner": {"grow": {"operator": "corner"}},
    "moments-grown": {"grow": {"moments": "grow"}},
    "warmup-none": {"warmup": 0.0},
    "warmup-5": {"warmup": 0.05},
    "align-constant": {"align": {"schedule": "constant"}},
    "align-layers": {"align": {"layers": True}},
    "distill": {"align": None, "distill": {"weight": 1.0, "schedule": "cosine"}},
    "distill-align": {"distill": {"weight": 1.0, "schedule": "cosine"}},
}


def variation(name: str) -> dict[str, Any]:
    """DEFAULT with the changes of a variation, or of several joined by "+". Raises KeyError for an unknown one."""
    settings = DEFAULT
    for part in name.split("+"):
        settings = merge(settings, VARIATIONS[part])
    return settings


def layer_map(student: int, teacher: int) -> dict[int, int]:
    """{student's layer: teacher's} behind which an exactly grown student of `student` layers has the same states as its
    teacher: the last use of each of the teacher's layers under depth `identity`, without the final layer."""
    last = {layer * teacher // student: layer for layer in range(student)}
    return {layer: source for source, layer in last.items() if source < teacher - 1}


@dataclass(frozen=True)
class Cell:
    """One training: of a model alone, or with a `parent` as the link after the parent's model.

    `tokens` trained on, rounded to steps; `rate` is the peak; `link` has the recipe's fields grow, align and distill.
    `evaluations` of the held-out text, the last at the end, and the variation's name change nothing of the result and
    are no part of the id.
    """

    model: str
    seed: int
    tokens: int
    rate: float
    warmup: float = WARMUP
    parent: Cell | None = None
    link: dict[str, Any] = field(default_factory=dict)
    evaluations: int = 1
    name: str = ""

    @property
    def steps(self) -> int:
        return max(1, round(self.tokens / (BATCH * LENGTH)))

    @property
    def definition(self) -> dict[str, Any]:
        """All that decides the result."""
        return {
            "model": MODELS[self.model], "seed": self.seed, "steps": self.steps, "batch": BATCH, "length": LENGTH,
            "data": [TEXT, HELD_OUT], "objective": OBJECTIVE, "optimizer": self._optimizer(), "link": self.link,
            "parent": self.parent.id if self.parent else None,
        }  # fmt: skip

    @property
    def id(self) -> str:
        return hashlib.sha256(json.dumps(self.definition, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def label(self) -> str:
        """For the log: models, variation, seed, steps, rate."""
        place = f"{self.parent.model} -> {self.model} ({self.name})" if self.parent else f"{self.model} alone"
        return f"{place}, seed {self.seed}, {self.steps} steps, rate {self.rate:g}"

    def recipe(self, models: Path, parent_checkpoint: Path | None) -> dict[str, Any]:
        """The recipe of this training; the predecessor is read from `parent_checkpoint` and not trained."""
        every = -(-self.steps // self.evaluations)
        own: dict[str, Any] = {
            "model": str(models / f"llm-{self.model}.json"), "name": self.model, "steps": self.steps,
            "optimizer": self._optimizer(), "data": {"samples": BATCH * every},
            "evaluate": {"every_epochs": 1.0 if self.evaluations > 1 else None},
        }  # fmt: skip
        links = [own]
        if self.parent is not None:
            name = self.parent.model
            before = {"model": str(models / f"llm-{name}.json"), "name": name, "train": False}
            links.insert(0, {**before, "init": str(parent_checkpoint), "evaluate": {"at_end": False}})
            own.update(self.link)
        return {
            "name": "llm-chain", "seed": self.seed, "objective": OBJECTIVE,
            "data": {"train": TEXT, "eval": [HELD_OUT], "batch_size": BATCH, "length": LENGTH},
            "optimizer": self._optimizer(), "parallel": {"zero": 0}, "checkpoint": {"every_steps": 500, "keep": 1},
            "report": {"every_steps": 50, "tensorboard": False}, "links": links,
        }  # fmt: skip

    def _optimizer(self) -> dict[str, Any]:
        return {**OPTIMIZER, "lr": self.rate, "warmup_steps": round(self.warmup * self.steps)}


def link_cell(parent: Cell, model: str, tokens: int, rate: float, name: str = "default") -> Cell:
    """The link after `parent` with the settings of variation `name`; `rate` is the model's own, alone."""
    settings = variation(name)
    link = {key: settings[key] for key in ("grow", "align", "distill") if settings[key] is not None}
    if "align" in link and link["align"].get("layers"):
        depths = [MODELS[name]["num_hidden_layers"] for name in (model, parent.model)]
        chosen = {str(layer): source for layer, source in layer_map(*depths).items()}
        link = {**link, "align": {**link["align"], "layers": chosen}}
    return Cell(model, parent.seed, tokens, rate * settings["rate"], settings["warmup"], parent, link, 2, name)
