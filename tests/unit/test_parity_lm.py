"""Language models' parity: transformers runs both checkpoints, and the noise of their dtype stands beside the error."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from compt_megatron import cli
from compt_megatron.checkpoint.api import convert
from compt_megatron.checkpoint.formats import open_reader
from compt_megatron.errors import UserError
from compt_megatron.evaluate import memory, parity_lm
from compt_megatron.evaluate import parity as parity_module
from compt_megatron.evaluate.parity import Parity, measure, parity
from compt_megatron.growth.api import grow
from compt_megatron.spec.families import spec_from_config
from tests.unit.hf_samples import CONFIGS, loaded, saved
from tests.unit.test_evaluate_parity import CONFIG as CLIP_CONFIG
from tests.unit.test_evaluate_parity import InMemory

WIDER = {
    "llama": {"hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 6},
    "gpt2": {"n_embd": 36, "n_head": 6},
}


def grown(tmp_path: Path, name: str, **options: Any) -> tuple[Path, Path]:
    saved(name, tmp_path / "small")
    target = spec_from_config({**CONFIGS[name], **WIDER[name]}, "larger")
    grow(tmp_path / "small", tmp_path / "large", target, **options)
    return tmp_path / "small", tmp_path / "large"


def measured(a: Path, b: Path) -> Parity:
    first, second = open_reader(a), open_reader(b)
    try:
        return measure(first, second)
    finally:
        first.close()
        second.close()


@pytest.mark.parametrize("name", CONFIGS)
def test_the_model_is_the_one_that_transformers_loads(tmp_path: Path, name: str) -> None:
    saved(name, tmp_path / "hub")
    reader = open_reader(tmp_path / "hub")
    model, theirs = parity_lm.build(reader), loaded(tmp_path / "hub")
    assert model.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(value, theirs.state_dict()[key]) for key, value in model.state_dict().items())
    probe = parity_lm.probe(reader, reader, 0)
    with torch.no_grad():
        a, b = parity_lm.run(model, probe)["logits"], theirs(probe).logits
    assert (a - b).norm() / b.norm() < 1e-6
    assert probe.min() >= 0
    assert probe.max() < 61


@pytest.mark.parametrize("name", WIDER)
def test_exact_growth_is_within_the_noise_and_another_is_not(tmp_path: Path, name: str) -> None:
    found = measured(*grown(tmp_path, name))
    assert found.dtype == "float32"
    assert 1e-9 < found.noise["logits"] < 1e-6
    assert found.errors["logits"] < 20 * found.noise["logits"]
    assert measured(tmp_path / "small", tmp_path / "small").errors == {"logits": 0}
    target = spec_from_config({**CONFIGS[name], **WIDER[name]}, "larger")
    grow(tmp_path / "small", tmp_path / "corner", target, operator="corner")
    assert measured(tmp_path / "small", tmp_path / "corner").errors["logits"] > 0.1


def test_one_changed_weight_is_seen() -> None:
    small, changed = InMemory(CONFIGS["gpt2"]), InMemory(CONFIGS["gpt2"])
    changed.weights["weight/transformer.h.1.attn.v_proj.weight"][3, 5] += 0.1
    assert 1e-5 < parity(small, changed)["logits"] < 1


def test_the_noise_is_that_of_the_coarser_dtype(tmp_path: Path) -> None:
    saved("llama", tmp_path / "small")
    found = {}
    for dtype in (torch.bfloat16, torch.float16):
        path = tmp_path / str(dtype)
        convert(tmp_path / "small", path, "hf", dtype=dtype)
        found[dtype] = measured(tmp_path / "small", path)
        assert found[dtype].dtype == str(dtype).removeprefix("torch.")
        assert 0.1 < found[dtype].errors["logits"] / found[dtype].noise["logits"] < 3
    assert 4 < found[torch.bfloat16].noise["logits"] / found[torch.float16].noise["logits"] < 16  # 3 bits


def test_the_noise_of_open_clips_models() -> None:
    found = measure(InMemory(CLIP_CONFIG), InMemory(CLIP_CONFIG, seed=1))
    assert found.errors.keys() == found.noise.keys() == {"image", "text", "logits"}
    assert min(found.errors.values()) > 0.5
    assert all(1e-9 < value < 1e-6 for value in found.noise.values())
    half = InMemory(CLIP_CONFIG)
    half.weights = {name: value.bfloat16() for name, value in half.weights.items()}
    found = measure(half, half)
    assert (found.dtype, set(found.errors.values())) == ("bfloat16", {0})
    assert all(1e-3 < value < 0.1 for value in found.noise.values())


def test_models_of_another_vocabulary_are_refused() -> None:
    other = {**CONFIGS["gpt2"], "vocab_size": 60}
    with pytest.raises(UserError, match="different vocabulary"):
        measure(InMemory(CONFIGS["gpt2"]), InMemory(other))


def test_verify_prints_the_error_beside_the_noise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small, large = grown(tmp_path, "gpt2")
    assert cli.main(["verify", str(large), "--against", str(small)]) == 0
    said = capsys.readouterr().out
    assert "outputs differ by logits" in said
    assert "(noise" in said
    assert "float32" in said


def test_what_cannot_be_measured_is_a_note(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small, large = grown(tmp_path, "gpt2")
    with monkeypatch.context() as patch:
        patch.setattr(parity_module, "available_memory", lambda: 10**8)
        assert cli.main(["verify", str(large), "--against", str(small)]) == 0
        assert "note: parity was not measured: it needs 0.3 GB of memory, 0.1 GB are free" in capsys.readouterr().out
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "transformers" else find(name))
    assert cli.main(["verify", str(large), "--against", str(small)]) == 0
    said = capsys.readouterr().out
    assert "note: parity was not measured: transformers is not installed" in said
    assert "differ" not in said


def test_memory_that_may_be_taken_is_within_the_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = memory.available_memory()
    assert 2**26 < free < 2**50
    (tmp_path / "memory.max").write_text(f"{2**20}\n")
    (tmp_path / "memory.current").write_text(f"{2**19}\n")
    (tmp_path / "memory.stat").write_text(f"anon 5\ninactive_file {2**10}\nactive_file 0\n")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    assert memory.available_memory() == 2**19 + 2**10
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available_memory() > 2**26
