"""Damaged, foreign and misnamed checkpoints are refused in one line that names the file."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from compt_megatron.checkpoint.api import check, convert, inspect
from compt_megatron.checkpoint.formats import detect, open_reader
from compt_megatron.checkpoint.manifest import manifest_bytes, manifest_path
from compt_megatron.errors import UserError
from compt_megatron.spec.families import spec_from_config
from tests.unit.checkpoint_samples import CLIP, VISION, VIT, refused, training_state, weights, write

WIDER = spec_from_config({"embed_dim": 10, "vision_cfg": {**VISION, "width": 40, "pool_type": "avg"}}, "vit-wider")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write(tmp_path / "run", "megatron", VIT, training_state(VIT))


@pytest.fixture(params=["folder", "file.pt", "file.safetensors"])
def exported(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write(tmp_path / request.param, "open_clip", VIT, weights(VIT))


def _flip(path: Path, at: int) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 4]))


@pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata", "common.pt", "metadata.json", "compt.json"])
def test_one_flipped_bit_of_any_file_is_found(run: Path, file: str) -> None:
    check(run)
    _flip(run / file, (run / file).stat().st_size // 2)
    refused(lambda: check(run), file)


def test_a_flipped_bit_is_found_before_any_tensor_of_the_file_is_used(run: Path) -> None:
    _flip(run / "__0_0.distcp", (run / "__0_0.distcp").stat().st_size - 900)
    reader = open_reader(run)
    refused(lambda: reader.read("weight/visual.proj"), "__0_0.distcp", "checksum")
    refused(lambda: convert(run, run.parent / "copy", "open_clip"), "__0_0.distcp")
    assert {path.name for path in run.parent.iterdir()} == {"run"}


def test_flipped_and_truncated_exports_are_found_when_opened(exported: Path) -> None:
    file = exported if exported.is_file() else exported / "open_clip_model.safetensors"
    good = file.read_bytes()
    _flip(file, len(good) // 2)
    refused(lambda: open_reader(exported), file.name, "checksum")
    file.write_bytes(good[: len(good) // 3])
    refused(lambda: open_reader(exported), file.name, "truncated")
    manifest_path(exported).unlink()
    refused(lambda: check(exported, VIT), str(exported))


def test_truncated_and_missing_files_of_a_run_checkpoint(run: Path) -> None:
    data = run / "__0_0.distcp"
    os.truncate(data, 1000)
    refused(lambda: check(run), "__0_0.distcp", "truncated")
    data.unlink()
    refused(lambda: open_reader(run).read("weight/visual.proj"), "__0_0.distcp", "missing")
    (run / ".metadata").unlink()
    refused(lambda: open_reader(run), str(run), "megatron", "missing")


def test_truncated_data_without_checksums_is_found(run: Path) -> None:
    (run / "compt.json").unlink()
    data = run / "__0_0.distcp"
    os.truncate(data, data.stat().st_size // 2)
    refused(lambda: check(run, VIT), "__0_0.distcp", "cannot read")
    (run / ".metadata").write_bytes((run / ".metadata").read_bytes()[:500])
    refused(lambda: open_reader(run, VIT), ".metadata", "damaged")


def test_another_model_is_named(run: Path, exported: Path, tmp_path: Path) -> None:
    for path in (run, exported):
        refused(lambda path=path: open_reader(path, WIDER), "another model", "vit-wider")
        manifest_path(path).unlink()
        if path.is_dir() and path != run:
            refused(lambda path=path: open_reader(path, WIDER), "another model", "vit-wider")
            (path / "open_clip_config.json").unlink()
        refused(lambda path=path: open_reader(path), "does not record which model", "--from")
        refused(lambda path=path: open_reader(path, WIDER), "another model", "shape")
        refused(lambda path=path: open_reader(path, CLIP), "another model")
        open_reader(path, VIT).close()


def test_one_tensor_too_many_or_too_few(run: Path, tmp_path: Path) -> None:
    content = json.loads((run / "compt.json").read_text())
    content["tensors"]["exp_avg/new"] = ["float32", [3]]
    (run / "compt.json").write_bytes(manifest_bytes({k: v for k, v in content.items() if k != "self"}))
    refused(lambda: check(run), "exp_avg/new", "missing")
    path = write(tmp_path / "whole.pt", "open_clip", VIT, weights(VIT))
    state = {**torch.load(path, weights_only=True), "visual.extra": torch.zeros(1)}
    torch.save(state, tmp_path / "more.pt")
    refused(lambda: open_reader(tmp_path / "more.pt", VIT), "another model", "also has 'visual.extra'")
    state = {f"visual.{key}": torch.zeros(1) for key in "ab"}
    torch.save(state, tmp_path / "other.pt")
    refused(lambda: open_reader(tmp_path / "other.pt", VIT), "another model", "it has no")


def test_paths_that_hold_no_checkpoint(run: Path, tmp_path: Path) -> None:
    refused(lambda: detect(tmp_path / "rum"), "does not exist", "did you mean", "run")
    refused(lambda: detect(Path("/nowhere/at/all")), "does not exist")
    (tmp_path / "empty").mkdir()
    refused(lambda: detect(tmp_path / "empty"), "not a checkpoint")
    (tmp_path / "notes.txt").write_text("nothing")
    refused(lambda: detect(tmp_path / "notes.txt"), "not a checkpoint")
    shutil.copytree(run, tmp_path / "half.partial")
    refused(lambda: inspect(tmp_path / "half.partial"), "unfinished")
    shutil.copy(write(tmp_path / "e.safetensors", "open_clip", VIT, weights(VIT)), run / "open_clip_model.safetensors")
    refused(lambda: inspect(run), "two checkpoints", "megatron and open_clip")


def test_a_stranger_in_the_folder_and_a_newer_version(run: Path) -> None:
    (run / "notes.txt").write_text("mine")
    refused(lambda: check(run), "notes.txt")
    (run / "notes.txt").unlink()
    content = json.loads((run / "compt.json").read_text())
    content = {**content, "format_version": 3}
    (run / "compt.json").write_bytes(manifest_bytes({k: v for k, v in content.items() if k != "self"}))
    refused(lambda: open_reader(run), "format_version 3", "update compt_megatron")
    (run / "compt.json").write_text("{}")
    refused(lambda: open_reader(run), "compt.json", "damaged")


class _Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("ran",)


def test_no_pickle_of_a_stranger_is_run(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (run / "compt.json").unlink()
    (run / ".metadata").write_bytes(pickle.dumps(_Evil()))
    refused(lambda: open_reader(run, VIT), ".metadata", "posix.mkdir", "--trust-pickle")
    torch.save({"state_dict": {"visual.proj": _Evil()}}, tmp_path / "evil.pt")
    refused(lambda: open_reader(tmp_path / "evil.pt", VIT), "evil.pt", "not loaded")
    assert not (tmp_path / "ran").exists()
    with pytest.raises(UserError):
        open_reader(run, VIT, trust_pickle=True)
    assert (tmp_path / "ran").exists()
