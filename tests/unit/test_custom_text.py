"""open_clip's `CustomTextCLIP` is the same model with other names in its files: `text.` before the text tower's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from compt_megatron import cli
from compt_megatron.chain.export import export
from compt_megatron.checkpoint.api import convert, weight_hash
from compt_megatron.checkpoint.formats import open_reader
from compt_megatron.checkpoint.module_names import find_names, trainer_names
from compt_megatron.growth.api import grow
from compt_megatron.spec.open_clip_names import open_clip_shapes, with_custom_text
from compt_megatron.torchvision_mend import ensure_torchvision
from tests.unit.checkpoint_samples import refused
from tests.unit.growth_helpers import (
    clip_config,
    features,
    make_spec,
    open_clip_model,
    perturbed,
    relative_error,
    split_state,
)

PLAIN, LARGE = clip_config(), clip_config(80, 3, 48, 3)
CUSTOM, LARGE_CUSTOM = {**PLAIN, "custom_text": True}, {**LARGE, "custom_text": True}
FP32 = 1e-5


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights as `plain.pt` and `custom.pt`, as open_clip's classes save them, and the configs."""
    folder = tmp_path_factory.mktemp("files")
    custom = perturbed(CUSTOM)
    plain = open_clip_model(PLAIN)
    plain.load_state_dict({key.removeprefix("text."): value for key, value in custom.state_dict().items()})
    torch.save(custom.state_dict(), folder / "custom.pt")
    torch.save(plain.state_dict(), folder / "plain.pt")
    configs = {"plain": PLAIN, "custom": CUSTOM, "large": LARGE, "large_custom": LARGE_CUSTOM}
    for name, config in configs.items():
        (folder / f"{name}.json").write_text(json.dumps(config))
    return folder


def hash_of(path: Path, config: dict[str, Any] | None = None) -> str:
    reader = open_reader(path, make_spec(config) if config else None)
    try:
        return weight_hash(reader)
    finally:
        reader.close()


def test_the_names_in_a_file_say_what_it_is_whatever_the_config_says(files: Path) -> None:
    """Nothing records that somebody trained with --force-custom-text."""
    state = torch.load(files / "custom.pt")
    assert {key for key in state if key.startswith("text.")} > {"text.ln_final.weight", "text.text_projection"}
    for given in (PLAIN, CUSTOM):
        for name, custom in (("custom.pt", True), ("plain.pt", False)):
            reader = open_reader(files / name, make_spec(given))
            assert reader.spec is not None
            assert bool(reader.spec.config.get("custom_text")) == custom
            for key, value in split_state(make_spec(CUSTOM), state).items():
                assert torch.equal(reader.read(f"weight/{key}"), value), key
            reader.close()
    assert make_spec(PLAIN).digest == make_spec(CUSTOM).digest
    assert make_spec(PLAIN).params == make_spec(CUSTOM).params


def test_neither_or_both_kinds_of_names_are_another_model(files: Path, tmp_path: Path) -> None:
    state = torch.load(files / "custom.pt")
    torch.save({**state, "positional_embedding": state["text.positional_embedding"]}, tmp_path / "both.pt")
    refused(lambda: open_reader(tmp_path / "both.pt", make_spec(CUSTOM)), "it also has 'positional_embedding'")
    less = {key: value for key, value in state.items() if key != "text.ln_final.bias"}
    torch.save(less, tmp_path / "less.pt")
    refused(lambda: open_reader(tmp_path / "less.pt", make_spec(PLAIN)), "it has no 'text.ln_final.bias'")


@pytest.mark.parametrize("given", [PLAIN, CUSTOM], ids=["plain config", "custom config"])
def test_it_goes_to_megatron_and_back_bit_for_bit(files: Path, tmp_path: Path, given: dict[str, Any]) -> None:
    state = torch.load(files / "custom.pt")
    convert(files / "custom.pt", tmp_path / "run", "megatron", spec=make_spec(given))
    convert(tmp_path / "run", tmp_path / "folder", "open_clip")
    back = load_file(tmp_path / "folder" / "open_clip_model.safetensors")
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], value) for key, value in state.items())
    convert(tmp_path / "folder", tmp_path / "first.pt", "open_clip")
    convert(tmp_path / "run", tmp_path / "second.pt", "open_clip")
    assert (tmp_path / "first.pt").read_bytes() == (tmp_path / "second.pt").read_bytes()


def grown(files: Path, folder: Path) -> Iterator[tuple[str, dict[str, Any], Path]]:
    """Every kind grown into every kind: the source's name, the target's config, the result."""
    for name, small in (("plain", PLAIN), ("custom", CUSTOM)):
        for to, large in (("large", LARGE), ("large_custom", LARGE_CUSTOM)):
            out = folder / f"{name}_{to}"
            grow(files / f"{name}.pt", out, to=make_spec(large), source_spec=make_spec(small), format="open_clip")
            yield name, large, out


def test_each_grows_into_each_and_open_clip_loads_the_result_strictly(files: Path, tmp_path: Path) -> None:
    ensure_torchvision()
    import open_clip

    model = open_clip_model(CUSTOM)
    model.load_state_dict(torch.load(files / "custom.pt"))
    wanted, hashes = features(model), set()
    for _, large, out in grown(files, tmp_path):
        loaded = open_clip.create_model(f"local-dir:{out}").eval()
        assert type(loaded).__name__ == ("CustomTextCLIP" if large.get("custom_text") else "CLIP")
        for tower, value in features(loaded).items():
            assert relative_error(value, wanted[tower]) < FP32, (out.name, tower)
        hashes.add(hash_of(out))
    assert len(hashes) == 1  # of the weights, which have one name in the table


def test_the_published_rule_makes_the_same_weights_from_either(files: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"operator": "reference", "seed": 3, "source_spec": make_spec(PLAIN)}
    large = clip_config(80, 2, 48, 2)
    hashes = set()
    for name in ("plain", "custom"):
        for custom in (False, True):
            out = tmp_path / f"{name}_{custom}"
            to = make_spec({**large, "custom_text": custom})
            grow(files / f"{name}.pt", out, to=to, format="open_clip", **options)
            hashes.add(hash_of(out))
    assert len(hashes) == 1


def test_the_commands_take_it(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = str(files / "custom.pt"), str(tmp_path / "large")
    given = ["--from", str(files / "plain.json")]
    for argv in (
        ["inspect", source, *given],
        ["grow", source, out, *given, "--to", str(files / "large_custom.json"), "--format", "open_clip"],
        ["verify", out, "--against", source],
        ["export", out, str(tmp_path / "export")],
        ["verify", source, *given],
    ):
        assert cli.main(argv) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "tensors byte for byte as grown from" in said
    assert "outputs differ by image" in said  # run by open_clip's own class
    assert json.loads((tmp_path / "export" / "open_clip_config.json").read_text())["model_cfg"]["custom_text"] is True
    keys = load_file(tmp_path / "export" / "open_clip_model.safetensors").keys()
    assert keys == open_clip_shapes(make_spec(LARGE_CUSTOM)).keys()


def test_an_export_of_a_forced_one_is_loaded_by_open_clip(files: Path, tmp_path: Path) -> None:
    """The config that the user named does not say `custom_text`; the exported one must."""
    ensure_torchvision()
    import open_clip

    export(files / "custom.pt", tmp_path / "out", spec=make_spec(PLAIN))
    model = open_clip_model(CUSTOM)
    model.load_state_dict(torch.load(files / "custom.pt"))
    loaded = open_clip.create_model(f"local-dir:{tmp_path / 'out'}").eval()
    assert all(torch.equal(value, features(model)[tower]) for tower, value in features(loaded).items())


@pytest.mark.parametrize("prefix", ["", "module.", "model."])
def test_trainers_that_hold_either_are_told_apart(prefix: str) -> None:
    """Behind any prefix, a user's module may be either, whatever the config says."""
    for stored, given in ((CUSTOM, PLAIN), (PLAIN, CUSTOM)):
        shapes = {prefix + key: shape for key, shape in open_clip_shapes(make_spec(stored)).items()}
        names, notes = find_names(Path("x"), make_spec(given), shapes)
        assert (names.prefix, notes) == (prefix, [])
        assert names.shapes == open_clip_shapes(make_spec(stored))
    assert "text.ln_final.weight" in trainer_names(make_spec(CUSTOM)).shapes


def test_a_deepspeed_folder_of_it_is_read_and_written(files: Path, tmp_path: Path) -> None:
    state = torch.load(files / "custom.pt")
    folder = tmp_path / "trained" / "global_step2"
    folder.mkdir(parents=True)
    (folder.parent / "latest").write_text("global_step2")
    content = {"module": {f"module.{key}": value for key, value in state.items()}, "optimizer": None}
    torch.save({**content, "param_shapes": None, "dp_world_size": 1}, folder / "mp_rank_00_model_states.pt")
    convert(folder.parent, tmp_path / "folder", "open_clip", spec=make_spec(PLAIN))
    back = load_file(tmp_path / "folder" / "open_clip_model.safetensors")
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], value) for key, value in state.items())
    convert(tmp_path / "folder", tmp_path / "universal", "deepspeed")
    assert next((tmp_path / "universal").rglob("zero/text.ln_final.weight")).is_dir()
    assert hash_of(tmp_path / "universal") == hash_of(tmp_path / "folder")


def test_only_the_config_of_a_model_says_which_it_is() -> None:
    spec = make_spec(PLAIN)
    assert with_custom_text(spec, False) is spec
    custom = with_custom_text(spec, True)
    assert custom.config == CUSTOM
    assert with_custom_text(custom, False).config == PLAIN
    refused(lambda: make_spec({**PLAIN, "custom_text": "yes"}), "'custom_text' must be true or false, not 'yes'")
