"""Mistakes in recipes and data of language models: exit status 2, one line that names them, nothing left behind."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end import tiny, tiny_text
from tests.end_to_end.commands import compt
from tests.faults.test_bad_input import Capture, change, refused


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kept")
    tiny_text.write_recipe(folder)
    return folder


@pytest.fixture
def here(kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `kept` to spoil, as the working directory."""
    shutil.copytree(kept, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


RECIPES: list[tuple[str, Any, str]] = [
    ("objective", {"name": "clip"}, "s is a language model, objective 'clip' is for images; use objective: {name: cau"),
    ("objective.label_smoothing", 0.1, "'label_smoothing' is not an option of objective 'causal_lm'; remove it"),
    ("objective.z_loss", 1.5, "objective.z_loss: needs a number >= 0 and < 1, not 1.5"),
    ("data.captions", 2, "data.captions does not go with objective 'causal_lm'; remove it"),
    ("data.augment", {"scale": [0.5, 1.0]}, "data.augment does not go with objective 'causal_lm'"),
    ("data.train", [{"path": "text", "wait": 1}], "wait: unknown key; did you mean 'weight'?"),
    ("data.length", 33, "data.length is 33, the model has 32 positions; use at most 32"),
    ("links.1.align", {"towers": ["text"]}, "align.towers is for images and captions; remove it"),
    ("links.1.parallel", {"micro_batches": 2}, ""),
    ("links.1.align", {"tensor": 2}, "align.tensor is 2, which does not divide the 1 ranks of one copy of the student"),
]


@pytest.mark.parametrize(("place", "value", "say"), RECIPES)
def test_recipe(here: Path, capsys: Capture, place: str, value: Any, say: str) -> None:
    change(here / "tiny.yaml", place, value)
    if value == {"name": "clip"}:  # else that is what is said
        change(here / "tiny.yaml", "data.length", ...)
    if not say:  # fine by itself, not with a clamp
        change(here / "tiny.yaml", "links.1.align", {"clamp": True})
        say = "parallel.micro_batches 2 cuts it; use micro_batches: 1 or clamp: false"
    refused(here, capsys, "plan", "tiny.yaml", say=[say])


def test_a_teacher_of_fewer_positions(here: Path, capsys: Capture) -> None:
    change(here / "s.json", "max_position_embeddings", 8)
    change(here / "tiny.yaml", "links.0.data", {"length": 8})
    say = "samples have 16 tokens, its teacher s has 8 positions; use data.length: 8 or less"
    refused(here, capsys, "plan", "tiny.yaml", say=[say])


@pytest.mark.parametrize(
    ("place", "value", "say"),
    [
        ("objective", {"name": "causal_lm"}, "objective 'causal_lm' is for language models, s is none"),
        ("data.length", 16, "data.length does not go with objective 'clip'; remove it"),
        ("data.train", [{"path": "emoji.tar", "weight": 1.0}], "do not go with objective 'clip'; name sources"),
    ],
)
def test_text_and_images_are_not_mixed(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, place: str, value: Any, say: str
) -> None:
    tiny.write_recipe(tmp_path)
    monkeypatch.chdir(tmp_path)
    if place == "objective":
        change(tmp_path / "tiny.yaml", "data", {"train": "emoji.tar", "batch_size": 32})
    change(tmp_path / "tiny.yaml", place, value)
    refused(tmp_path, capsys, "plan", "tiny.yaml", say=[say])


def _vocabulary(size: int) -> Callable[[Path], None]:
    def spoil(here: Path) -> None:
        for name in "sml":
            change(here / f"{name}.json", "vocab_size", size)

    return spoil


def _without_record(here: Path) -> None:
    (here / "text" / "text.json").unlink()
    change(here / "tiny.yaml", "data.train", "text/train")
    _vocabulary(256)(here)


def _cut(here: Path) -> None:
    with (here / "text" / "train.bin").open("r+b") as file:
        file.truncate(1000)


def _foreign_id(split: str) -> Callable[[Path], None]:
    def spoil(here: Path) -> None:
        with (here / "text" / f"{split}.bin").open("r+b") as file:  # its first id
            file.write((60_000).to_bytes(2, "little"))

    return spoil


def _of_another_version(here: Path) -> None:
    with (here / "text" / "train.idx").open("r+b") as file:
        file.seek(9)
        file.write(b"\x07")


def _in_recipe(place: str, value: Any) -> Callable[[Path], None]:
    return lambda here: change(here / "tiny.yaml", place, value)


BROKEN: list[tuple[Callable[[Path], None], str]] = [
    (_vocabulary(400), "its tokenizer has 280 tokens, the model 400"),
    (_without_record, "has id 269, beyond a vocabulary of 256 tokens"),
    (_foreign_id("train"), "train.bin: document 0 has id 60000, beyond a vocabulary of 280 tokens"),
    (_foreign_id("held_out"), "held_out.bin: document 0 has id 60000, beyond a vocabulary of 280 tokens"),
    (_cut, "train.bin"),
    (_of_another_version, "version"),
    (_in_recipe("data.train", "stdlib/tests"), "the built-in text is stdlib/train and stdlib/held_out"),
    (_in_recipe("data.train", "nope"), "data.train: data 'nope': there is neither such a folder"),
    (_in_recipe("data.eval", ["text/nope"]), "data.eval: data "),
    (_in_recipe("data.train", [{"path": "text", "weight": 0}, {"path": "text", "weight": 1}]), "weight 0 is not a num"),
    (_in_recipe("data.batch_size", 4096), "samples of 16 tokens, 4096 are needed"),
    (_in_recipe("data.tokenizer", "s.json"), "s.json: is no tokenizer that can be read"),
]


@pytest.mark.parametrize(("spoil", "say"), BROKEN, ids=[say[:32] for _, say in BROKEN])
def test_data_is_refused_before_a_start(here: Path, tmp_path: Path, spoil: Callable[[Path], None], say: str) -> None:
    spoil(here)
    before = sorted(str(path) for path in here.rglob("*"))
    ended = compt("train", here / "tiny.yaml", "--run-dir", here / "run", folder=tmp_path)
    assert ended.code == 2, ended
    assert ended.stderr.count("\n") == 1, ended.stderr
    assert say in ended.stderr, ended.stderr
    assert sorted(str(path) for path in here.rglob("*")) == before
