"""The command line: exit statuses, one line a mistake, what is imported, and what launchers do to it."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import compt_megatron
from compt_megatron import cli, cli_exit
from compt_megatron.chain.status import read_status, reported_since, write_status
from compt_megatron.errors import StopRequested, UserError
from compt_megatron.growth.fresh import write_fresh
from compt_megatron.spec.families import load_spec

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the demo's smallest model with fresh weights."""
    return write_fresh(load_spec("clip-emoji-s"), tmp_path_factory.mktemp("small") / "s", 0)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "compt: give a command: train, plan"),
        (["trian", "emoji"], "compt: no command 'trian'; did you mean 'train'?"),
        (["plan"], "compt plan: the following arguments are required: RECIPE"),
        (["plan", "emoji", "--jsno"], "compt plan: unknown option '--jsno'; did you mean '--json'?"),
        (["plan", "emoji", "--rank", "2"], "unknown option '--rank'; did you mean '--ranks'?"),
        (["plan", "emojy"], "compt: emojy: no such recipe file; did you mean 'emoji'?"),
        (["plan", "emoji", "links.2.epoch=4"], "links.2.epoch=4: unknown key; did you mean 'epochs'?"),
        (["plan", "emoji", "--ranks", "3"], "is not divisible by 3 data-parallel ranks"),
        (["train", "emoji", "--resume"], "compt train: argument --resume: expected one argument"),
        (["inspect", "nowhere"], "compt: nowhere: does not exist"),
        (["grow", "a", "b"], "the following arguments are required: --to"),
        (["grow", "a", "b", "--to", "clip-emoji-m", "--set", "mlp"], "'mlp' is not AXIS=MODE"),
        (
            ["grow", "a", "b", "--to", "clip-emoji-m", "--operator", "best"],
            "argument --operator: invalid choice: 'best'",
        ),
        (["report", "nowhere"], "compt: nowhere: no such run folder"),
        (["data", "txt", "x"], "compt data: argument SET: invalid choice: 'txt'"),
        (["data"], "compt data: the following arguments are required: SET"),
        (["data", "emoji", "x", "--sise", "3"], "compt data emoji: unknown option '--sise'; did you mean '--size'?"),
    ],
)
def test_a_mistake_is_exit_2_and_one_line(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert err.count("\n") == 1
    assert out == ""
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_traceback_of_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", "nowhere", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("a.yaml: links:\n is wrong"), 2, "compt: a.yaml: links: is wrong\n"),
        (StopRequested("checkpoint written at step 7"), 3, "compt: checkpoint written at step 7\n"),
        (KeyboardInterrupt(), 1, "compt: interrupted\n"),
        (PermissionError(13, "Permission denied", "/x"), 2, "compt: /x: Permission denied; choose a place"),
        (OSError(28, "No space left on device"), 2, "compt: disk: No space left on device; choose a place"),
        (ZeroDivisionError("division by zero"), 1, "Traceback"),
        (FileNotFoundError(2, "No such file", "bug"), 1, "Traceback"),
    ],
)
def test_exit_status_of_every_end(
    error: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(_: argparse.Namespace) -> None:
        raise error

    assert cli_exit.guarded(lambda: argparse.Namespace(command=command, name="plan")) == code
    err = capsys.readouterr().err
    assert said in err
    assert ("Traceback" in err) == (said == "Traceback")


@pytest.mark.parametrize(("rank", "written"), [(None, False), ("0", True), ("1", True)])
def test_under_a_launcher_the_run_folder_says_how_it_ended(
    rank: str | None,
    written: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One process leaves nothing behind; rank 1 speaks only because here rank 0 never does."""
    monkeypatch.setattr(cli_exit, "_WAIT_FOR_MAIN_S", 0.1)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    folder = tmp_path / "run"
    assert cli.main(["--local_rank=0", "train", "emoji", "--run-dir", str(folder), "sed=3"]) == 2
    assert capsys.readouterr().err == "compt: sed=3: unknown key; did you mean 'seed'?\n"
    assert folder.exists() == written
    if written:
        status = read_status(folder)
        assert status is not None
        assert (status["state"], status["exit_code"]) == ("user_error", 2)
        assert "did you mean 'seed'" in status["message"]


def test_other_ranks_are_silent_once_rank_0_has_spoken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(cli_exit.time, "time", lambda: 0.0)
    write_status(tmp_path, 2, "from rank 0")
    assert cli.main(["train", "emoji", "--run-dir", str(tmp_path), "sed=3", "--local-rank", "1"]) == 2
    assert capsys.readouterr().err == ""
    assert (read_status(tmp_path) or {})["message"] == "from rank 0"


def test_an_old_status_is_not_taken_for_this_start(tmp_path: Path) -> None:
    write_status(tmp_path, 0)
    assert reported_since(tmp_path, 0.0, 0.0)
    assert not reported_since(tmp_path, (read_status(tmp_path) or {})["time"] + 1, 0.0)


def test_print_recipe_is_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        cli.main(["train", "emoji", "--print-recipe", "seed=7", "--run-dir", str(tmp_path / "r"), "links.0.epochs=2"])
        == 0
    )
    printed = capsys.readouterr().out
    (tmp_path / "printed.yaml").write_text(printed)
    recipe = compt_megatron.load_recipe(tmp_path / "printed.yaml")
    assert (recipe.seed, recipe.links[0].epochs) == (7, 2.0)
    assert not (tmp_path / "r").exists()


def test_json_is_one_document(capsys: pytest.CaptureFixture[str], small: Path, tmp_path: Path) -> None:
    for argv in (
        ["plan", "emoji", "--json"],
        ["grow", str(small), str(tmp_path / "m"), "--to", "clip-emoji-m", "--json"],
        ["inspect", str(tmp_path / "m"), "--json"],
        ["verify", str(small), "--json"],
        ["doctor", "--json"],
    ):
        assert cli.main(argv) == 0, capsys.readouterr().err
        assert json.loads(capsys.readouterr().out)


def test_grow_convert_and_verify_say_what_they_did(
    capsys: pytest.CaptureFixture[str], small: Path, tmp_path: Path
) -> None:
    grown, copy = tmp_path / "m", tmp_path / "m.pt"
    assert cli.main(["grow", str(small), str(grown), "--to", "clip-emoji-m", "--dry-run"]) == 0
    assert not grown.exists()
    assert cli.main(["grow", str(small), str(grown), "--to", "clip-emoji-m"]) == 0
    assert cli.main(["convert", str(grown), str(copy), "--format", "open_clip"]) == 0
    capsys.readouterr()
    assert cli.main(["verify", str(copy)]) == 0
    assert "tensors byte for byte as grown from" in capsys.readouterr().out
    content = bytearray(copy.read_bytes())
    content[-2000] ^= 1
    copy.write_bytes(content)
    assert cli.main(["verify", str(copy)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def _options(parser: argparse.ArgumentParser) -> set[str]:
    shown = [action for action in parser._actions if action.help != argparse.SUPPRESS]
    return {
        option for action in shown for option in action.option_strings if option not in ("-h", "--help", "--version")
    }


def _deepspeed_options(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The options of the `deepspeed` launcher, whose parser is made inside a function."""
    from deepspeed.launcher import runner

    made: list[argparse.ArgumentParser] = []

    def capture(self: argparse.ArgumentParser, *_: Any, **__: Any) -> argparse.Namespace:
        made.append(self)
        raise KeyError

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", capture)
        with pytest.raises(KeyError):
            runner.parse_args([])
    return _options(made[0])


def test_no_option_is_a_prefix_of_a_launchers(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.run import get_args_parser

    theirs = _options(get_args_parser()) | _deepspeed_options(monkeypatch)
    assert {"--log-dir", "--hostfile"} <= theirs
    commands = cli.build_parser().commands
    assert commands is not None
    ours = {option for parser in commands.parsers.values() for option in _options(parser)}
    assert "--run-dir" in ours
    clashes = [(option, other) for option in ours for other in theirs if other.startswith(option)]
    assert clashes == []


IMPORTS = """
import sys
from compt_megatron.cli import main
code = 0
for argv in {commands!r}:
    try:
        code = code or main(argv)
    except SystemExit as stop:
        code = code or stop.code
heavy = [name for name in sys.modules if name.split(".")[0] in ("megatron", "deepspeed", "open_clip", "matplotlib")]
print(code, heavy, file=sys.stderr)
"""


def test_planning_and_growing_import_no_training_library(small: Path, tmp_path: Path) -> None:
    commands = [
        ["plan", "emoji"],
        ["train", "emoji", "--print-recipe"],
        ["grow", str(small), str(tmp_path / "m"), "--to", "clip-emoji-m"],
        ["inspect", str(tmp_path / "m")],
        ["doctor"],
        ["--help"],
    ]
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS.format(commands=commands)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stderr == "0 []\n"


def test_the_package_offers_every_command_as_a_function() -> None:
    assert set(compt_megatron._PUBLIC) <= set(dir(compt_megatron))
    for name in ("load_recipe", "plan", "grow", "convert", "inspect", "verify"):
        assert callable(getattr(compt_megatron, name))
    with pytest.raises(AttributeError, match="no attribute 'grwo'"):
        compt_megatron.grwo  # noqa: B018


@pytest.mark.parametrize("command", ["inspect", "report"])  # one that ends at once, and one that does not
def test_python_m_gives_the_exit_status(command: str, tmp_path: Path) -> None:
    full = [sys.executable, "-m", "compt_megatron", command, str(tmp_path / "nowhere")]
    done = subprocess.run(full, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("compt: ")
    assert "nowhere" in done.stderr
    full[3:] = ["inspect", "--json", str(write_fresh(load_spec("clip-emoji-s"), tmp_path / "s", 1))]
    done = subprocess.run(full, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["format"] == "megatron"
