"""A checkpoint exists whole or not at all, whatever happens while it is written."""

from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from compt_megatron.checkpoint import commit
from compt_megatron.checkpoint.api import check, convert, weight_hash
from compt_megatron.checkpoint.commit import committed, read_pointer, remove_checkpoint, write_pointer
from compt_megatron.checkpoint.contract import TensorInfo
from compt_megatron.checkpoint.formats import open_reader, open_writer
from compt_megatron.errors import UserError
from tests.unit.checkpoint_samples import VIT, infos, row_share, weights, write, write_together


def _in_child(body: Callable[[], object]) -> int:
    """Run `body` in a fork of this process (no imports to pay for); returns its exit code, negative if killed."""
    child = multiprocessing.get_context("fork").Process(target=body)
    child.start()
    child.join(60)
    assert child.exitcode is not None, "the child hangs"
    return child.exitcode


def _die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _write_until(path: Path, format: str, moment: str) -> None:
    if moment == "before the rename":
        commit._move_folder = commit.Destination._move_files = _die  # type: ignore[assignment, method-assign]
    values = weights(VIT, seed=1)
    writer = open_writer(path, format, VIT, overwrite=True)
    writer.declare(infos(values))
    for count, (name, value) in enumerate(values.items()):
        writer.write(name, (0,) * value.dim(), value)
        if moment == "while writing" and count == 9:
            _die()
    writer.commit({})


@pytest.mark.parametrize(
    ("name", "moment", "replaces"),
    [
        ("run", "while writing", False),
        ("run", "before the rename", True),
        ("model.pt", "while writing", True),
        ("model.pt", "before the rename", False),
    ],
)
def test_a_kill_leaves_only_the_partial_folder(tmp_path: Path, name: str, moment: str, replaces: bool) -> None:
    path, format = tmp_path / name, "open_clip" if "." in name else "megatron"
    old, new = weights(VIT), weights(VIT, seed=1)
    if replaces:
        write(path, format, VIT, old)
    before = {entry.name for entry in tmp_path.iterdir()}
    assert _in_child(lambda: _write_until(path, format, moment)) == -signal.SIGKILL
    assert {entry.name for entry in tmp_path.iterdir()} == before | {f"{name}.partial"}
    with pytest.raises(UserError, match="unfinished"):
        open_reader(tmp_path / f"{name}.partial")
    if replaces:
        check(path)
        assert torch.equal(open_reader(path).read("weight/visual.proj"), old["weight/visual.proj"])
    writer = open_writer(path, format, VIT, overwrite=replaces)
    writer.declare(infos(new))
    for key, value in new.items():
        writer.write(key, (0,) * value.dim(), value)
    writer.commit({})
    check(path)
    assert torch.equal(open_reader(path).read("weight/visual.proj"), new["weight/visual.proj"])
    assert not (tmp_path / f"{name}.partial").exists()


def test_replacing_without_exchange_of_names_works_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commit, "_swap", lambda left, right: False)
    path = write(tmp_path / "run", "megatron", VIT, weights(VIT))
    with pytest.raises(UserError, match=r"exists already; .*--overwrite"):
        open_writer(path, "megatron", VIT)
    writer = open_writer(path, "megatron", VIT, overwrite=True)
    values = weights(VIT, seed=1)
    writer.declare(infos(values))
    for key, value in values.items():
        writer.write(key, (0,) * value.dim(), value)
    writer.commit({})
    check(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]


def test_nothing_but_checkpoints_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="not overwritten"):
        open_writer(tmp_path / "home", "megatron", VIT, overwrite=True)
    with pytest.raises(UserError, match="unfinished"):
        open_writer(tmp_path / "x.partial", "megatron", VIT)
    (tmp_path / "file").write_text("text")
    with pytest.raises(UserError, match="is a file"):
        open_writer(tmp_path / "file", "megatron", VIT, overwrite=True)
    source = write(tmp_path / "run", "megatron", VIT, weights(VIT))
    with pytest.raises(UserError, match="the source itself"):
        convert(source, tmp_path / "home" / ".." / "run", "open_clip", overwrite=True)
    assert (tmp_path / "home" / "thesis.tex").read_text() == "years of work"


def test_a_disk_too_full_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**7))
    writer = open_writer(tmp_path / "new" / "deep" / "run", "megatron", VIT)
    with pytest.raises(UserError, match=r"needs \d\d\.\d\d MB, 10\.00 MB free at .*deep"):
        writer.declare(infos(weights(VIT)))
    writer.abort()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["run", "model.safetensors"])
def test_a_disk_that_fills_up_while_writing(tmp_path: Path, name: str) -> None:
    """The system refuses to let a file grow beyond 60 kB, as a full disk would."""

    def body() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
        with pytest.raises(UserError, match=r"cannot be written .*free some space") as caught:
            write(tmp_path / "there" / name, "open_clip" if "." in name else "megatron", VIT, weights(VIT))
        assert "\n" not in str(caught.value)

    assert _in_child(body) == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fault", ["missing", "twice", "raises", "loses its disk"])
def test_a_failing_rank_fails_all_and_leaves_nothing(tmp_path: Path, fault: str) -> None:
    values = weights(VIT)

    def body(writer, rank: int) -> None:  # type: ignore[no-untyped-def]
        writer.declare(infos(values))
        for name, value in values.items():
            share = row_share(value, rank, 3)
            if rank == 1 and name == "weight/visual.proj":
                if fault == "missing":
                    continue
                if fault == "raises":
                    raise ZeroDivisionError("a bug of rank 1")
            if share is not None:
                writer.write(name, *share)
            if rank == 1 and fault == "twice" and name == "weight/visual.proj":
                writer.write(name, (20, 0), value[20:22])
        if rank == 1 and fault == "loses its disk":
            next(iter(writer._files._files.values()))._file.error = OSError(28, "No space left on device")
        writer.commit({})

    raised = write_together(tmp_path / "run", "megatron", VIT, 3, body)
    assert all(isinstance(error, Exception) for error in raised), raised
    told = {"missing": "elements were written", "twice": "written twice", "raises": "gave up"}
    told["loses its disk"] = "No space left"
    assert told[fault] in str(raised[2])
    assert not list(tmp_path.iterdir())


def test_ranks_hear_of_a_taken_path(tmp_path: Path) -> None:
    write(tmp_path / "run", "megatron", VIT, weights(VIT))
    raised = write_together(tmp_path / "run", "megatron", VIT, 2, lambda writer, rank: None)
    assert all(isinstance(error, UserError) for error in raised)


def test_one_process_may_not_forget_an_element(tmp_path: Path) -> None:
    values = weights(VIT)
    writer = open_writer(tmp_path / "run", "megatron", VIT)
    writer.declare(infos(values))
    for name, value in values.items():
        if name != "weight/visual.conv1.weight":
            writer.write(name, (0,) * value.dim(), value)
    writer.write("weight/visual.conv1.weight", (0, 0, 0, 0), values["weight/visual.conv1.weight"][:, :, :, :7])
    with pytest.raises(RuntimeError, match=r"conv1.weight: 5376 of 6144 elements"):
        writer.commit({})
    assert not list(tmp_path.iterdir())
    writer.abort()  # harmless


def test_the_pointer_moves_last_and_leftovers_do_not_count(tmp_path: Path) -> None:
    assert committed(tmp_path / "none") == []
    assert read_pointer(tmp_path) is None
    for step in (1, 2):
        write(tmp_path / f"step_{step:08}", "megatron", VIT, weights(VIT, seed=step), train={"step": step})
        write_pointer(tmp_path, f"step_{step:08}")
    leftover = open_writer(tmp_path / "step_00000003", "megatron", VIT)
    leftover.declare({"data/x": TensorInfo((1,), torch.uint8)})
    assert [path.name for path in committed(tmp_path)] == ["step_00000001", "step_00000002"]
    found = read_pointer(tmp_path)
    assert found is not None
    assert weight_hash(open_reader(found)) == weight_hash(open_reader(tmp_path / "step_00000002"))
    with pytest.raises(UserError, match=r"name one of them: .*step_00000002"):
        open_reader(tmp_path)
    remove_checkpoint(tmp_path / "step_00000002")
    with pytest.raises(UserError, match=r"step_00000002.*not a whole checkpoint"):
        read_pointer(tmp_path)
