"""The first weights of a link that grows: their certificate has the measured parity, whatever the family."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from compt_megatron.chain.initial import write_initial
from compt_megatron.chain.member import Member, link_members
from compt_megatron.growth.api import write_fresh
from compt_megatron.observe.family import parity_of
from compt_megatron.recipe.load import load_recipe
from compt_megatron.spec.families import spec_from_config
from tests.unit.growth_helpers import clip_config
from tests.unit.lm_helpers import gpt2, llama

MODELS: dict[str, tuple[dict[str, Any], dict[str, Any], set[str]]] = {
    "llama": (llama(), llama(36, 6, 3), {"logits"}),
    "gpt2": (gpt2(), gpt2(36, 6), {"logits"}),
    "clip": (clip_config(), clip_config(64, 3), {"image", "text", "logits"}),
}


def member_of(config: dict[str, Any]) -> Member:
    """The second link of the packaged recipe, with another model."""
    grown = link_members(load_recipe("emoji", []), None)[1]
    return replace(grown, spec=spec_from_config(config, "larger"))


@pytest.mark.parametrize("family", MODELS)
def test_the_parity_of_a_grown_link_is_measured(tmp_path: Path, family: str) -> None:
    small, large, outputs = MODELS[family]
    source = write_fresh(spec_from_config(small, "small"), tmp_path / "small", 0)
    certificate = write_initial(member_of(large), source, tmp_path / "large")
    assert certificate is not None
    assert certificate["parity"].keys() == outputs
    assert 0 < max(certificate["parity"].values()) < 1e-5
    assert parity_of(certificate) == max(certificate["parity"].values())


def test_a_machine_that_cannot_measure_it_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small, large, _ = MODELS["llama"]
    source = write_fresh(spec_from_config(small, "small"), tmp_path / "small", 0)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "transformers" else find(name))
    certificate = write_initial(member_of(large), source, tmp_path / "large")
    assert certificate is not None
    assert certificate["parity"] is None
