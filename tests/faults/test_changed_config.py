"""A model config beside our weights that was edited or swapped is refused by the name of the field that differs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from compt_megatron import cli
from compt_megatron.checkpoint.api import convert, defects
from compt_megatron.checkpoint.changed_config import changed_config
from compt_megatron.checkpoint.formats import open_reader
from compt_megatron.growth.api import grow
from compt_megatron.spec.families import spec_from_config
from tests.faults.test_bad_input import change
from tests.unit.checkpoint_samples import CLIP, refused, weights, write
from tests.unit.hf_samples import CONFIGS

LLAMA = spec_from_config(CONFIGS["llama"], "llama")
WIDER = spec_from_config({**CONFIGS["llama"], "hidden_size": 48, "num_attention_heads": 8}, "wider")
OTHER_MODEL: list[tuple[str, str, Any, str]] = [
    ("hf", "rope_theta", 1e6, "'rope_theta' is 1000000.0 where compt.json has 500000.0"),  # the shapes stay the same
    ("hf", "rms_norm_eps", 1e-5, "'rms_norm_eps' is 1e-05 where compt.json has none"),
    ("hf", "hidden_size", 48, "'hidden_size' is 48 where compt.json has 24"),
    ("hf", "num_hidden_layers", ..., "'num_hidden_layers' is missing where compt.json has 2"),
    ("hf", "model_type", "qwen3", '"qwen3" where compt.json has "llama"'),
    ("hf", "tie_word_embeddings", True, "'tie_word_embeddings' is true where compt.json has none"),
    ("hf", "vocab_size", "many", "'vocab_size' is \"many\" where compt.json has 61"),
    ("open_clip", "model_cfg.vision_cfg.layers", 4, "'vision_cfg.layers' is 4 where compt.json has 3"),
    ("open_clip", "model_cfg.quick_gelu", True, "'quick_gelu' is true where compt.json has none"),
    ("open_clip", "model_cfg.text_cfg", ..., "is missing where compt.json has"),
]


def made(path: Path, format: str) -> Path:
    spec = LLAMA if format == "hf" else CLIP
    write(path, format, spec, weights(spec))
    return path / ("config.json" if format == "hf" else "open_clip_config.json")


@pytest.mark.parametrize(("format", "field", "value", "say"), OTHER_MODEL)
def test_the_config_of_another_model(tmp_path: Path, format: str, field: str, value: Any, say: str) -> None:
    path = tmp_path / "ours"
    config = made(path, format)
    change(config, field, value)
    say = f"{config}: changed since it was written, the config of another model: {say}" if say[0] == "'" else say
    refused(lambda: open_reader(path), str(config), "another model", say)
    refused(lambda: grow(path, tmp_path / "out", WIDER), say)
    refused(lambda: convert(path, tmp_path / "out", "megatron"), say)
    (line,) = defects(path)
    assert say in line
    assert {entry.name for entry in tmp_path.iterdir()} == {"ours"}


def test_verify_and_grow_say_it_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = str(tmp_path / "ours"), str(tmp_path / "out")
    change(made(tmp_path / "ours", "hf"), "rope_theta", 7)
    (tmp_path / "wider.json").write_text(json.dumps(WIDER.config))
    for argv in (
        ["verify", source],
        ["grow", source, out, "--to", str(tmp_path / "wider.json")],
        ["convert", source, out, "--format", "megatron"],
    ):
        assert cli.main(argv) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert "'rope_theta' is 7 where compt.json has 500000.0" in said


def test_several_fields_are_counted(tmp_path: Path) -> None:
    config = made(tmp_path / "ours", "hf")
    config.write_text(json.dumps({**json.loads(config.read_text()), "hidden_size": 48, "intermediate_size": 56}))
    refused(lambda: open_reader(tmp_path / "ours"), "'hidden_size' is 48", "(and 1 more)")


def test_a_change_that_is_none_of_the_model_is_said_to_be_so(tmp_path: Path) -> None:
    """A checksum allows no change at all; but nobody is told that the model is another one."""
    config = made(tmp_path / "ours", "hf")
    content = json.loads(config.read_text())
    harmless = {"transformers_version": "9", "_name_or_path": "x", "torch_dtype": "float16", "use_cache": False}
    for changed in (content | harmless, {**content, "head_dim": None}, dict(reversed(content.items()))):
        config.write_text(json.dumps(changed))
        refused(lambda: open_reader(tmp_path / "ours"), str(config), "though still a config of the same model")
    config.write_text("{")
    refused(lambda: open_reader(tmp_path / "ours"), str(config), "truncated or changed")
    assert changed_config(tmp_path / "ours" / "tokenizer.json", {}) == ""


def test_a_config_beside_a_single_file_of_ours_is_not_its_config(tmp_path: Path) -> None:
    """The record of the file says which model it is; the folder may hold the config of its smaller relative."""
    write(tmp_path / "one.safetensors", "hf", LLAMA, weights(LLAMA))
    (tmp_path / "config.json").write_text(json.dumps(WIDER.config))
    reader = open_reader(tmp_path / "one.safetensors")
    assert reader.spec is not None
    assert reader.spec.digest == LLAMA.digest
    reader.close()
    assert defects(tmp_path / "one.safetensors") == []
