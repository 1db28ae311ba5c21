"""A growth killed at any moment: nothing under its name, a rerun goes on, and the result has the same bytes."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compt_megatron import cli
from compt_megatron.checkpoint import journal, out_file, stream, workers, writing
from compt_megatron.checkpoint.contract import Layout
from compt_megatron.checkpoint.formats import open_reader, open_writer
from compt_megatron.errors import UserError
from compt_megatron.growth.api import grow, verify, write_fresh
from tests.unit.checkpoint_samples import VIT
from tests.unit.growth_helpers import clip_config
from tests.unit.lm_helpers import gpt2, llama, make_spec

SMALL, LARGE = llama(64, 4, 2, 3, 96), llama(96, 6, 2, 4, 160)
CLIP, LARGE_CLIP = clip_config(), clip_config(80, 3, 48, 2)
GPT, LARGE_GPT = gpt2(64, 4, 3), gpt2(96, 6, 4)
KILLS = 5
_fork = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a small model is written in many pieces and noted often."""
    monkeypatch.setattr(stream, "SLAB", 10_000)
    monkeypatch.setattr(writing, "KEEP", 60_000)
    monkeypatch.setattr(out_file, "_this", threading.local())  # blocks of that size
    monkeypatch.setattr(out_file, "_BLOCK", 16 * 4096)
    monkeypatch.setattr(out_file, "_WORTH", 3 * 4096)
    monkeypatch.setattr(out_file, "_this", threading.local())  # blocks of that size stay in this test


def in_child(body: Callable[[], object]) -> int:
    """Run `body` in a fork of this process; returns its exit code, negative if a signal ended it."""
    child = _fork.Process(target=body)
    child.start()
    child.join(120)
    assert child.exitcode is not None, "the child hangs"
    return child.exitcode


def die_at(count: int) -> None:
    """Let this process be killed at the start of its `count`th call to the system that changes what is on the disk."""
    left = [count]

    def watched(call: Callable[..., Any]) -> Callable[..., Any]:
        def maybe(*args: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **options)

        return maybe

    for name in ("pwrite", "write", "fsync", "ftruncate", "rename", "replace", "unlink", "mkdir"):
        setattr(os, name, watched(getattr(os, name)))


def content(path: Path) -> dict[str, bytes]:
    """Every file of a checkpoint, in a folder or alone with its record."""
    if path.is_dir():
        return {entry.relative_to(path).as_posix(): entry.read_bytes() for entry in path.rglob("*") if entry.is_file()}
    return {entry.name: entry.read_bytes() for entry in (path, path.with_name(f"{path.name}.compt.json"))}


CASES = {
    "hf": (SMALL, LARGE, "result", "hf", {}),
    "hf file": (SMALL, LARGE, "result.safetensors", "hf", {"dtype": "bfloat16"}),
    "gpt2": (GPT, LARGE_GPT, "result", "hf", {}),
    "megatron": (SMALL, LARGE, "result", "megatron", {}),
    "megatron layout": (SMALL, LARGE, "result", "megatron", {"layout": Layout(2, 2)}),
    "deepspeed": (SMALL, LARGE, "result", "deepspeed", {}),
    "open_clip": (CLIP, LARGE_CLIP, "result.pt", "open_clip", {}),
}


@pytest.mark.parametrize("name", CASES)
def test_killed_at_random_moments_until_it_is_done(tmp_path: Path, name: str) -> None:
    small, large, target, format, options = CASES[name]
    source = write_fresh(make_spec(small), tmp_path / "source", 3)
    whole, path = tmp_path / "whole" / target, tmp_path / "killed" / target

    def run(path: Path, progress: Any = None) -> None:
        grow(source, path, make_spec(large, "large"), format=format, seed=5, progress=progress, **options)

    run(whole)
    kept: list[int] = []
    generator = random.Random(name)
    for _ in range(KILLS):
        moment = generator.randrange(1, 100)
        code = in_child(lambda moment=moment: (die_at(moment), run(path)))
        if path.exists():  # done, or killed after the last rename
            break
        assert code == -signal.SIGKILL
        if path.with_name(f"{target}.partial").exists():
            with pytest.raises(UserError, match="unfinished"):
                open_reader(path.with_name(f"{target}.partial"))
    else:
        run(path, lambda done, total, before: kept.append(before))
        assert len(kept) > 0
    assert content(path) == content(whole)
    assert verify(path).ok


@pytest.mark.parametrize("format", ["hf", "megatron"])
def test_a_rerun_goes_on_and_believes_no_damaged_byte(tmp_path: Path, format: str) -> None:
    source = write_fresh(make_spec(SMALL), tmp_path / "source", 3)
    whole, path, other = tmp_path / "whole" / "run", tmp_path / "killed" / "run", tmp_path / "other" / "run"
    reports: list[tuple[int, int, int]] = []

    def run(path: Path, seed: int = 0, die_at: float = 2.0) -> None:
        def progress(done: int, total: int, before: int) -> None:
            reports.append((done, total, before))
            if done > die_at * total:
                os.kill(os.getpid(), signal.SIGKILL)

        grow(source, path, make_spec(LARGE, "large"), format=format, seed=seed, progress=progress)

    run(whole)
    assert in_child(lambda: run(path, die_at=0.8)) == -signal.SIGKILL
    data = max(path.with_name("run.partial").iterdir(), key=lambda entry: entry.stat().st_size)
    with open(data, "r+b") as file:  # a bit that the disk lost, in the second half of what was noted
        file.seek(int(0.45 * data.stat().st_size))
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 4]))
    (data.parent / "notes.txt").write_text("not of this run")
    reports.clear()
    run(path)
    _, total, before = reports[0]
    assert 0.2 * total < before < 0.46 * total
    assert content(path) == content(whole)
    assert in_child(lambda: run(other, die_at=0.8)) == -signal.SIGKILL
    reports.clear()
    run(other, seed=9)  # another request begins anew
    assert reports[0][2] == 0
    assert verify(other).ok


def test_a_torn_journal_is_believed_up_to_the_tear(tmp_path: Path) -> None:
    entries = [journal.Entry([journal.Box("weight/a", (at,), (1,), "00")], {"at": at}) for at in range(3)]
    journal.Journal(tmp_path, 0, "request", entries).close()
    path = tmp_path / ".journal-0"
    whole = path.read_bytes()
    assert journal.earlier_entries(tmp_path, 0, "request") == entries
    assert journal.earlier_entries(tmp_path, 0, "another") == []
    assert not journal.is_of(tmp_path, None)
    last = whole.rindex(b"\n", 0, -1) + 1
    for stop in range(last, len(whole) - 1):
        path.write_bytes(whole[:stop])
        assert journal.earlier_entries(tmp_path, 0, "request") == entries[:2]


def test_one_place_is_written_by_one_job(tmp_path: Path) -> None:
    writer = open_writer(tmp_path / "run", "megatron", VIT, request="one")
    for request in ("one", "two", None):
        with pytest.raises(UserError, match="another job is writing"):
            open_writer(tmp_path / "run", "megatron", VIT, request=request, overwrite=True)
    writer.abort()
    assert not list(tmp_path.iterdir())


def test_an_interrupted_job_leaves_what_it_has_a_failed_one_nothing(tmp_path: Path) -> None:
    source = write_fresh(make_spec(SMALL), tmp_path / "source", 3)

    def raising(error: BaseException) -> Callable[..., None]:
        def progress(done: int, total: int, before: int) -> None:
            if done > total / 2:
                raise error

        return progress

    with pytest.raises(KeyboardInterrupt):
        grow(source, tmp_path / "a" / "out", make_spec(LARGE), progress=raising(KeyboardInterrupt()))
    assert [entry.name for entry in (tmp_path / "a").iterdir()] == ["out.partial"]
    kept: list[int] = []
    grow(source, tmp_path / "a" / "out", make_spec(LARGE), progress=lambda done, total, before: kept.append(before))
    assert kept[0] > 0
    assert [entry.name for entry in (tmp_path / "a").iterdir()] == ["out"]
    with pytest.raises(ZeroDivisionError):
        grow(source, tmp_path / "b" / "out", make_spec(LARGE), progress=raising(ZeroDivisionError()))
    assert not (tmp_path / "b").exists()


def test_workers_of_a_launcher_share_the_work(tmp_path: Path) -> None:
    """As torchrun would start them; the second run loses one of them."""
    source = write_fresh(make_spec(SMALL), tmp_path / "source", 3)
    (tmp_path / "large").mkdir()
    (tmp_path / "large" / "config.json").write_text(json.dumps(LARGE))
    command = ["grow", str(source), "", "--to", str(tmp_path / "large"), "--format", "hf", "--dtype", "bfloat16"]
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]

    def worker(rank: int) -> None:
        os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=str(port))
        command[2] = str(tmp_path / "two")
        os._exit(cli.main(command))

    children = [_fork.Process(target=worker, args=(rank,)) for rank in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0]
    command[2] = str(tmp_path / "one")
    assert cli.main(command) == 0
    assert content(tmp_path / "one") == content(tmp_path / "two")


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """compt grow of a model that takes a second or two to make."""
    small = llama(256, 4, 4, 2, 512, vocab_size=4000)
    large = llama(512, 8, 8, 4, 2048, vocab_size=4000)
    write_fresh(make_spec(small), tmp_path / "source", 3, dtype=torch.bfloat16)
    (tmp_path / "large").mkdir()
    (tmp_path / "large" / "config.json").write_text(json.dumps(large))
    return [
        sys.executable,
        "-m",
        "compt_megatron",
        "grow",
        str(tmp_path / "source"),
        "",
        "--to",
        str(tmp_path / "large"),
    ]


def test_a_worker_that_dies_ends_the_command_and_leaves_the_rest(tmp_path: Path, command: list[str]) -> None:
    target = tmp_path / "out" / "grown"
    command[5:6] = [str(target), "--format", "hf", "--workers", "2"]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    journals = [target.with_name("grown.partial") / f".journal-{rank}" for rank in range(2)]
    until = time.monotonic() + 60
    while not all(path.exists() for path in journals) and started.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    children = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()
    assert len(children) == 2
    os.kill(int(children[1]), signal.SIGKILL)
    _, errors = started.communicate(timeout=60)
    assert started.returncode == 1
    assert errors.splitlines() == [
        "compt: worker 1 of 2 was killed by signal 9 (Killed); the same command goes on where it stopped"
    ]
    assert not Path(f"/proc/{children[0]}").exists()
    assert [entry.name for entry in target.parent.iterdir()] == ["grown.partial"]


@pytest.mark.parametrize("count", ["1", "2"])
def test_sigterm_leaves_what_the_same_command_continues(tmp_path: Path, command: list[str], count: str) -> None:
    target = tmp_path / "out" / "grown"
    command[5:6] = [str(target), "--format", "hf", "--workers", count]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 60
    while not (target.with_name("grown.partial") / ".journal-0").exists() and time.monotonic() < until:
        time.sleep(0.005)
    started.send_signal(signal.SIGTERM)
    _, errors = started.communicate(timeout=60)
    assert errors.splitlines() == ["compt: stopped on request; start it again to go on"]
    assert started.returncode == 3
    assert [entry.name for entry in target.parent.iterdir()] == ["grown.partial"]


def test_workers_die_with_their_starter() -> None:
    """A worker looks for its starter: see that it ends when that has gone."""

    def body() -> None:
        if os.fork() == 0:
            workers.die_with(os.getppid() + 1)  # somebody else's child now
        os._exit(0)

    assert in_child(body) == 0
