"""The launch forms of docs/launching.md with two real processes: the losses of one, and one line for a mistake."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end import tiny
from tests.end_to_end.commands import ROOT, compt, free_port, launcher_environment

STEPS = 8
FORMS = {"deepspeed": "single_node.sh", "torchrun": "torchrun.sh"}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of one grown and aligned link of a few steps, and its run in one process."""
    folder = tmp_path_factory.mktemp("launchers")
    links: list[dict[str, Any]] = [
        {"model": "s.json", "steps": STEPS},
        {"model": "m.json", "steps": STEPS, "grow": {"operator": "exact"}, "align": {"weight": 1.0}},
    ]
    changes = {"controls": [], "evaluate": {"at_end": False}, "checkpoint": {"every_steps": 100}}
    recipe = tiny.write_recipe(folder, links=links, **changes)
    assert compt("train", recipe, "--run-dir", folder / "one", folder=folder).codes == [0]
    return recipe


def assert_same_losses(run_dir: Path, expected: Path) -> None:
    for link in ("s", "m"):
        found = tiny.losses(run_dir, link)
        assert len(found) == STEPS
        assert found == pytest.approx(tiny.losses(expected, link), abs=1e-4)


def launch(form: str, *arguments: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = launcher_environment(MASTER_PORT=str(free_port()), NPROC="2")
    words = ["bash", str(ROOT / "launchers" / FORMS[form]), *map(str, arguments)]
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=280)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_two_ranks_have_the_losses_of_one_at_every_stage(zero: int, recipe: Path, tmp_path: Path) -> None:
    done = compt("train", recipe, "--run-dir", tmp_path / "run", f"parallel.zero={zero}", folder=tmp_path, world=2)
    assert done.codes == [0, 0], done
    assert_same_losses(tmp_path / "run", recipe.parent / "one")


@pytest.mark.parametrize("form", list(FORMS))
def test_launched_ranks_have_the_losses_of_one(form: str, recipe: Path, tmp_path: Path) -> None:
    done = launch(form, recipe, "--run-dir", tmp_path / "run", "parallel.zero=2", folder=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert_same_losses(tmp_path / "run", recipe.parent / "one")
    chain = tiny.ledger(tmp_path / "run")
    assert chain["machine"]["world"] == 2
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "done"


def test_a_mistake_under_a_launcher_is_said_once(recipe: Path, tmp_path: Path) -> None:
    failed = launch("torchrun", recipe, "--run-dir", tmp_path / "run", "data.batch_size=33", folder=tmp_path)
    assert failed.returncode != 0
    said = [line for line in (failed.stdout + failed.stderr).splitlines() if line.startswith("compt:")]
    assert len(said) == 1, failed.stderr
    assert "batch_size 33" in said[0]
    assert 'File "' + os.fspath(ROOT / "compt_megatron") not in failed.stderr, "no traceback of ours"
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("user_error", 2)
    assert "compt: " + status["message"] == said[0]
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["status.json"], "nothing was started"
