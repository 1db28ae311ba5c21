"""Parity sees what two checkpoints' features differ by, and nothing else."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from compt_megatron.checkpoint.contract import Region, TensorInfo
from compt_megatron.errors import UserError
from compt_megatron.evaluate.parity import parity
from compt_megatron.evaluate.parity_clip import build, open_clip_state
from compt_megatron.spec.families import spec_from_config
from compt_megatron.spec.random import initial

CONFIG: dict[str, Any] = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 16, "head_width": 8, "layers": 2},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 2},
}


class InMemory:
    """A checkpoint that is not on a disk: fresh weights of a config."""

    def __init__(self, config: dict[str, Any], seed: int = 0) -> None:
        self.path, self.spec = Path(f"memory-{seed}"), spec_from_config(config, "tiny")
        self.weights = {f"weight/{name}": initial(param, seed) for name, param in self.spec.params.items()}

    def tensors(self) -> dict[str, TensorInfo]:
        return {name: TensorInfo(tuple(value.shape), value.dtype) for name, value in self.weights.items()}

    def read(self, name: str, region: Region | None = None) -> torch.Tensor:
        return self.weights[name].clone() if region is None else self.weights[name][region].clone()

    def metadata(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        pass


def without_text() -> dict[str, Any]:
    return {field: value for field, value in CONFIG.items() if field != "text_cfg"}


def test_a_checkpoint_equals_itself_and_differs_from_another() -> None:
    assert parity(InMemory(CONFIG), InMemory(CONFIG)) == {"image": 0, "text": 0, "logits": 0}
    assert min(parity(InMemory(CONFIG), InMemory(CONFIG, seed=1)).values()) > 0.5
    assert parity(InMemory(without_text()), InMemory(without_text())) == {"image": 0}


def test_a_change_in_one_tower_is_seen_in_that_tower() -> None:
    changed = InMemory(CONFIG)
    changed.weights["weight/visual.proj"] *= 1.001
    found = parity(InMemory(CONFIG), changed)
    assert found["image"] == pytest.approx(1e-3, rel=1e-3)
    assert found["text"] == 0
    assert found["logits"] < 1e-6  # cosines do not see a scale
    changed = InMemory(CONFIG)
    changed.weights["weight/transformer.resblocks.1.attn.v_proj.weight"][3, 5] += 0.1
    found = parity(InMemory(CONFIG), changed)
    assert found["image"] == 0
    assert found["text"] > 1e-4


def test_a_wider_joint_embedding_is_compared_on_its_leading_entries() -> None:
    config = copy.deepcopy(CONFIG)
    config["embed_dim"] = 24
    small, wide = InMemory(CONFIG), InMemory(config)
    for name in small.weights:
        wide.weights[name] = small.weights[name].clone()
    for name in ("weight/visual.proj", "weight/text_projection"):
        wide.weights[name] = small.weights[name].repeat(1, 2)
    assert max(parity(small, wide).values()) < 1e-6


def test_the_model_has_the_checkpoints_weights() -> None:
    reader = InMemory(CONFIG)
    model, state = build(reader), open_clip_state(reader)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items() if name in state)
    key = state["visual.transformer.resblocks.0.attn.in_proj_weight"]
    assert torch.equal(key[16:32], reader.weights["weight/visual.transformer.resblocks.0.attn.k_proj.weight"])


def test_models_of_other_input_are_refused() -> None:
    config = copy.deepcopy(CONFIG)
    config["vision_cfg"]["image_size"] = 24
    with pytest.raises(UserError, match="different image size or context"):
        parity(InMemory(CONFIG), InMemory(config))
