"""A training that cannot start or go on leaves nothing behind, and a run folder has one job at a time."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from compt_megatron.growth.fresh import write_fresh
from compt_megatron.spec.families import load_spec
from tests.end_to_end.commands import Job, compt
from tests.end_to_end.tiny import write_recipe

IMAGES = (".png", ".webp", ".jpg")


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of one short link and its data, `other`: a checkpoint of another model, `s`: one of the link's."""
    folder = tmp_path_factory.mktemp("kept")
    recipe = write_recipe(folder)
    content = yaml.safe_load(recipe.read_text())
    content |= {"links": [{"model": "s.json", "steps": 4, "evaluate": {"at_end": False}}], "controls": []}
    recipe.write_text(yaml.safe_dump(content))
    write_fresh(load_spec("m.json", folder), folder / "other", 0)
    write_fresh(load_spec("s.json", folder), folder / "s", 0)
    return folder


@pytest.fixture
def here(kept: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(kept, tmp_path / "here"))


def _refused(here: Path, *argv: str, say: str) -> None:
    before = sorted(str(path) for path in here.rglob("*"))
    ended = compt(*argv, folder=here)
    for output in [*here.glob("stdout.*"), *here.glob("stderr.*")]:
        output.unlink()
    assert ended.code == 2, ended
    assert ended.stderr.count("\n") == 1, ended.stderr
    assert say in ended.stderr, ended.stderr
    assert sorted(str(path) for path in here.rglob("*")) == before


def _rewrite(shard: Path, change: Callable[[int, str, bytes], bytes | None], count: int = 10**9) -> None:
    """The shard's members as `change(sample number, name, content)` gives them; the first `count` samples."""
    source = io.BytesIO(shard.read_bytes())
    stems: list[str] = []
    with tarfile.open(fileobj=source) as old, tarfile.open(shard, "w") as new:
        for member in old:
            if (stem := member.name.partition(".")[0]) not in stems:
                stems.append(stem)
            file = old.extractfile(member)
            assert file is not None
            content = change(len(stems) - 1, member.name, file.read())
            if len(stems) <= count and content is not None:
                member.size = len(content)
                new.addfile(member, io.BytesIO(content))


def _broken(change: Callable[[bytes], bytes | None], images: bool = True) -> Callable[[Path], None]:
    """Ten samples of which the image (or what is not the image) is changed."""
    return lambda shard: _rewrite(
        shard,
        lambda sample, name, content: change(content) if sample < 10 and name.endswith(IMAGES) == images else content,
    )


SHARDS: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut": (lambda shard: os.truncate(shard, shard.stat().st_size // 2), "is damaged or cut off"),
    "empty file": (lambda shard: shard.write_bytes(b""), "is damaged or cut off"),
    "garbage": (lambda shard: shard.write_bytes(b"\x00\xff" * 999), "is damaged or cut off"),
    "no samples": (lambda shard: tarfile.open(shard, "w").close(), "has 0 samples, 32 are needed"),
    "less than a batch": (lambda shard: _rewrite(shard, lambda *given: given[2], 20), "has 20 samples, 32 are needed"),
    "cut images": (_broken(lambda content: content[: len(content) // 2]), "mend the shard or raise data.skip_budget"),
    "empty images": (_broken(lambda content: b""), "the skip budget allows 1"),
    "no captions": (_broken(lambda content: None, images=False), "no caption"),
}


@pytest.mark.parametrize(("spoil", "say"), SHARDS.values(), ids=SHARDS)
def test_a_bad_shard_leaves_no_run_behind(here: Path, spoil: Callable[[Path], object], say: str) -> None:
    spoil(here / "emoji.tar")
    _refused(here, "train", "tiny.yaml", "--run-dir", "new/run", say=say)


def test_a_bad_shard_of_the_evaluation_is_found_before_training(here: Path) -> None:
    shutil.copy(here / "emoji.tar", here / "held.tar")
    os.truncate(here / "held.tar", 9999)
    _refused(here, "train", "tiny.yaml", "--run-dir", "run", "data.eval=[held.tar]", say="held.tar is damaged")
    _refused(here, "eval", "s", "--data", "held.tar", say="held.tar is damaged")


@pytest.mark.parametrize(
    ("argv", "say"),
    [
        (["data.caption_fields=[nam]"], "no caption (json with 'nam')"),
        (["--resume", "other"], "checkpoint of another model: it holds 'm'"),
        (["--resume", "s"], "holds weights only"),
        (["--resume", "nope"], "--resume nope: no such checkpoint"),
        (["links.0.init=other"], "checkpoint of another model: it holds 'm'"),
        (["--link", "x"], "the recipe has no such link; it has s"),
        (["--run-dir", "s.json"], "a file is in the way"),
        (["--run-dir", "s.json/x"], "a file is in the way"),
        (["--run-dir", "s"], "not a run of compt"),
        (["--run-dir", "x" * 300], "File name too long"),
    ],
)
def test_train(here: Path, argv: list[str], say: str) -> None:
    _refused(here, "train", "tiny.yaml", "--run-dir", "run", *argv, say=say)


@pytest.mark.parametrize("file", ["__0_0.distcp", "compt.json", "common.pt"])
def test_an_init_that_is_damaged(here: Path, file: str) -> None:
    os.truncate(here / "s" / file, (here / "s" / file).stat().st_size // 2)
    _refused(here, "train", "tiny.yaml", "--run-dir", "run", "links.0.init=s", say=file)


def test_an_empty_folder_stays_and_stays_empty(here: Path) -> None:
    (here / "run").mkdir()
    os.truncate(here / "emoji.tar", 9999)
    _refused(here, "train", "tiny.yaml", "--run-dir", "run", say="emoji.tar is damaged")


def test_a_full_disk_is_found_before_the_first_checkpoint(here: Path) -> None:
    """A model that no disk can hold: 280 TB of token embedding."""
    config = json.loads((here / "s.json").read_text())
    config["text_cfg"]["vocab_size"], config["text_cfg"]["width"] = 2**24, 2**22
    config["text_cfg"]["heads"] = 2**18
    (here / "s.json").write_text(json.dumps(config))
    _refused(here, "train", "tiny.yaml", "--run-dir", "run", say="free some space or choose another destination")


def test_one_job_at_a_time_and_a_killed_one_lets_go(here: Path) -> None:
    first = Job(["train", "tiny.yaml", "--run-dir", "run", "links.0.steps=100000", "checkpoint.every_steps=1"], here)
    first.wait_for(lambda: (here / "run" / "s" / "checkpoints" / "latest").exists())
    second = compt("train", "tiny.yaml", "--run-dir", "run", "links.0.steps=100000", folder=here)
    assert second.code == 2, second
    assert "run: another compt is at work in it (process" in second.stderr
    assert not (here / "run" / "status.json").exists()
    first.kill(signal.SIGKILL)
    first.finish()
    third = Job(["train", "tiny.yaml", "--run-dir", "run", "links.0.steps=100000", "checkpoint.every_steps=1"], here)
    lines = (here / "run" / "metrics.jsonl").stat().st_size
    third.wait_for(lambda: (here / "run" / "metrics.jsonl").stat().st_size > lines)
    third.kill(signal.SIGINT)
    ended = third.finish()
    assert ended.code == 3, ended
    assert "give the same command again to go on" in ended.stderr
    assert (here / "run" / "s" / "checkpoints" / "latest").exists()


@pytest.mark.parametrize(
    ("field", "say"),
    [
        ("parallel.layers=transformer_engine", "m: parallel.layers: 'transformer_engine' cannot be had here: no CUDA"),
        ("optimizer.implementation=apex", "m: optimizer.implementation: 'apex' needs"),
    ],
)
def test_what_a_later_link_lacks_is_said_before_the_first_trains(here: Path, field: str, say: str) -> None:
    if torch.cuda.is_available():
        pytest.skip("a machine with CUDA may have them")
    content = yaml.safe_load((here / "tiny.yaml").read_text())
    content["links"].append({"model": "m.json", "name": "m", "steps": 2, "grow": {}})
    (here / "tiny.yaml").write_text(yaml.safe_dump(content))
    _refused(here, "train", "tiny.yaml", "--run-dir", "run", f"links.m.{field}", say=say)
