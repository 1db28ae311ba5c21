"""Random damage to everything that is read from outside: what comes is a UserError of one line, or nothing at all."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compt_megatron.chain.checks import check_recipe
from compt_megatron.checkpoint.api import check, convert
from compt_megatron.checkpoint.manifest import MANIFEST, manifest_bytes
from compt_megatron.errors import UserError
from compt_megatron.recipe.load import load_recipe, recipe_from
from compt_megatron.spec.families import spec_from_config
from tests.end_to_end.tiny import model, write_recipe
from tests.unit.checkpoint_samples import VIT, weights, write

JUNK: list[Any] = [
    None, True, 0, -1, 1, 2**70, -0.5, float("nan"), float("inf"), "", "x", "\0", "é", "a" * 300, "1e-3", "{", "/",
    "..", "~nobody", "{0..3}", "pipe:", "emoji/", "emoji/train", "s.json", "exact", [], [None], [1], ["a"], {},
    {"a": 1}, {1: 2}, [[]], {"x": {"y": {}}},
]  # fmt: skip
QUICK = settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def _only_user_errors(act: Callable[[], object]) -> None:
    try:
        act()
    except UserError as error:
        assert str(error).strip()  # noqa: PT017 - no error at all is as good


@st.composite
def spoilt(draw: st.DrawFn, value: Any) -> Any:
    """`value`, plain data, with one to three of its entries replaced, removed or misspelt."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        here, inner = None, value
        while isinstance(inner, dict | list) and inner and (here is None or draw(st.integers(0, 3))):
            here = inner
            key = draw(st.sampled_from(list(here) if isinstance(here, dict) else range(len(here))))
            inner = here[key]
        if here is None:
            return value
        how = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
        if how == "replace":
            here[key] = copy.deepcopy(draw(st.sampled_from(JUNK)))
        elif how == "remove":
            del here[key]
        elif isinstance(here, dict):
            name = draw(st.sampled_from([f"{key}s", "grow", "name", "links", 1]))
            here[name] = copy.deepcopy(draw(st.sampled_from(JUNK)))
        else:
            here.append(copy.deepcopy(draw(st.sampled_from(JUNK))))
    return value


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """`content` with a few bits flipped, bytes overwritten, removed or put in, mostly near its start or end."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        reach = draw(st.sampled_from([16, 400, len(data)]))
        at = draw(st.integers(0, max(0, min(reach, len(data)) - 1)))
        at = len(data) - 1 - at if draw(st.booleans()) else at
        match draw(st.sampled_from(["flip", "write", "cut", "insert"])):
            case "flip" if data:
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "write":
                data[at : at + 4] = draw(st.sampled_from([b"\xff\xff\xff\x0f", b"null", b"[[[[", bytes(4), b""]))
            case "cut":
                del data[at:]
            case "insert":
                data[at:at] = draw(st.binary(max_size=6))
    return bytes(data)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    write_recipe(folder)
    write(folder / "run", "megatron", VIT, weights(VIT))
    write(folder / "export", "open_clip", VIT, weights(VIT))
    write(folder / "whole.pt", "open_clip", VIT, weights(VIT))
    (folder / f"whole.pt.{MANIFEST}").unlink()
    return folder


@QUICK
@given(st.data())
def test_recipe(kept: Path, data: st.DataObject) -> None:
    values = data.draw(spoilt(yaml.safe_load((kept / "tiny.yaml").read_text())))
    _only_user_errors(lambda: check_recipe(recipe_from(values, folder=kept), data=False))


@QUICK
@given(st.data())
def test_recipe_text(kept: Path, data: st.DataObject) -> None:
    (kept / "r.yaml").write_bytes(data.draw(damaged((kept / "tiny.yaml").read_bytes())))
    _only_user_errors(lambda: load_recipe(kept / "r.yaml"))


@QUICK
@given(st.sampled_from(["links.0.steps", "links.s.grow", "data", "..", "", "links", "seed.x", "links.²"]), st.text())
def test_override(kept: Path, place: str, value: str) -> None:
    _only_user_errors(lambda: load_recipe(kept / "tiny.yaml", [f"{place}={value}"]))


@QUICK
@given(spoilt(model(48, 3, 2)))
def test_model_config(config: Any) -> None:
    _only_user_errors(lambda: spec_from_config(config, "m"))


@QUICK
@given(st.data())
@pytest.mark.parametrize("file", [".metadata", "__0_0.distcp", "metadata.json", "common.pt", MANIFEST])
@pytest.mark.parametrize("recorded", [True, False])
def test_run_checkpoint(kept: Path, tmp_path: Path, recorded: bool, file: str, data: st.DataObject) -> None:
    """With checksums any damage is an error; without, whatever can be read has the right shapes."""
    folder = tmp_path / "run"
    folder.mkdir(exist_ok=True)
    for path in (kept / "run").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    good = (folder / file).read_bytes()
    bad = data.draw(damaged(good))
    (folder / file).write_bytes(bad)
    if recorded:
        if bad != good and _differs(file, good, bad):
            with pytest.raises(UserError):
                check(folder)
        return
    (folder / MANIFEST).unlink()
    _only_user_errors(lambda: check(folder, VIT))


def _differs(file: str, good: bytes, bad: bytes) -> bool:
    """compt.json covers what it says, not its blanks."""
    try:
        return file != MANIFEST or json.loads(good) != json.loads(bad)
    except ValueError:
        return True


@QUICK
@given(st.data())
@pytest.mark.parametrize("file", ["export/open_clip_model.safetensors", "export/open_clip_config.json", "whole.pt"])
def test_open_clip(kept: Path, tmp_path: Path, file: str, data: st.DataObject) -> None:
    source = kept / file
    bad = tmp_path / source.name
    bad.write_bytes(data.draw(damaged(source.read_bytes())))
    if bad.suffix == ".json":
        shutil.copy(kept / "export" / "open_clip_model.safetensors", tmp_path)
        bad = tmp_path
    _only_user_errors(lambda: check(bad, VIT))
    copy_ = tmp_path.parent / f"{tmp_path.name}.copy"
    _only_user_errors(lambda: convert(bad, copy_, "open_clip", spec=VIT, dtype=torch.float16, overwrite=True))
    assert not copy_.with_name(f"{copy_.name}.partial").exists()


@QUICK
@given(st.data())
def test_forged_compt_json(kept: Path, tmp_path: Path, data: st.DataObject) -> None:
    """Its own checksum is right, what it says is not."""
    folder = tmp_path / "run"
    folder.mkdir(exist_ok=True)
    for path in (kept / "run").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    content = json.loads((folder / MANIFEST).read_text())
    forged = data.draw(spoilt({key: value for key, value in content.items() if key != "self"}))
    (folder / MANIFEST).write_bytes(manifest_bytes({str(key): value for key, value in forged.items()}))
    _only_user_errors(lambda: check(folder))
