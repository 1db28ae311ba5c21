"""A run that is killed, again and again and at the worst moments, ends with the weights of one that was left alone."""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.end_to_end import tiny
from tests.end_to_end.commands import Job, compt

Moment = Callable[[Path], bool]


def writing(folder: str) -> Moment:
    """While something is written into `folder` (or, where that was too quick to be seen, right after)."""
    return lambda run: (run / f"{folder}.partial").exists() or (run / folder).exists()


def logged(link: str, step: int) -> Moment:
    return lambda run: f'"link": "{link}", "step": {step},' in _text(run / "metrics.jsonl")


def state(link: str, *states: str) -> Moment:
    return lambda run: (
        bool(text := _text(run / "chain.json"))
        and any(entry["name"] == link and entry["state"] in states for entry in json.loads(text)["links"])
    )


def latest(link: str, step: int) -> Moment:
    """The last checkpoint is there, its evaluation and the ledger are not."""
    return lambda run: f"step_{step:08d}" in _text(run / link / "checkpoints" / "latest")


def _text(path: Path) -> str:
    return path.read_text() if path.is_file() else ""


MOMENTS: dict[str, Moment] = {
    "first weights": writing("s/initial"),
    "a step": logged("s", 3),
    "a checkpoint": writing("s/checkpoints/step_00000006"),
    "an evaluation": latest("s", 7),
    "an export": writing("s/export"),
    "growth": writing("m/initial"),
    "before any step": state("m", "started", "training"),
    "the ledger before the export": state("m", "trained", "done"),
}


@pytest.mark.parametrize("world", [1, 2])
def test_killed_at_every_moment_it_ends_with_the_same_weights(
    world: int, recipe: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    reference = request.getfixturevalue("reference" if world == 1 else "reference_of_two")
    run_dir = tmp_path / "run"
    chance = random.Random()  # another step every time the tests run; the message below says which
    step = chance.randint(1, tiny.STEPS["l"])
    moments = {**MOMENTS, f"step {step} of l": logged("l", step)}
    if world == 2:
        moments = {name: moments[name] for name in ("a step", "a checkpoint", "growth", f"step {step} of l")}
    killed = 0
    for name, moment in moments.items():
        job = Job(["train", recipe, "--run-dir", run_dir], tmp_path, world)
        job.wait_for(lambda: moment(run_dir))  # noqa: B023 - it is called at once
        time.sleep(chance.uniform(0, 0.01))
        job.kill()
        ended = job.finish()
        assert ended.codes in ([-signal.SIGKILL] * world, [0] * world), (name, ended)
        killed += ended.codes[0] != 0
    last = compt("train", recipe, "--run-dir", run_dir, folder=tmp_path, world=world)
    assert last.codes == [0] * world, last
    assert killed >= len(moments) - 1, "it was killed, not waited for"
    assert tiny.hashes(run_dir) == tiny.hashes(reference), list(moments)
    for link in tiny.STEPS:
        assert tiny.losses(run_dir, link) == tiny.losses(reference, link)
        assert _evaluations(run_dir, link) == _evaluations(reference, link)
    left = [path for path in run_dir.rglob("*.partial") if path.parent.name == "checkpoints"]
    assert not left, "what was being written is cleared away"


def _evaluations(run_dir: Path, link: str) -> list[tuple[int, dict[str, dict[str, float]]]]:
    rows = [json.loads(line) for line in (run_dir / link / "evaluation.jsonl").read_text().splitlines()]
    return [(row["step"], row["metrics"]) for row in rows]


@pytest.mark.parametrize("world", [1, 2])
def test_a_signal_stops_all_ranks_after_a_checkpoint(
    world: int, recipe: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    reference = request.getfixturevalue("reference" if world == 1 else "reference_of_two")
    run_dir, seldom = tmp_path / "run", "checkpoint.every_steps=100"
    job = Job(["train", recipe, "--run-dir", run_dir, "--link", "s", seldom], tmp_path, world)
    job.wait_for(lambda: logged("s", 2)(run_dir))
    job.kill_one(world - 1, signal.SIGTERM)  # one rank hears it, all stop
    stopped = job.finish()
    assert stopped.codes == [3] * world, stopped
    assert "stopped at step" in stopped.stderr
    status = json.loads((run_dir / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("stopped", 3)
    steps = len(tiny.losses(run_dir, "s"))
    assert (run_dir / "s" / "checkpoints" / "latest").read_text().strip() == f"step_{steps:08d}"
    again = compt("train", recipe, "--run-dir", run_dir, "--link", "s", folder=tmp_path, world=world)
    assert again.codes == [0] * world, again
    assert tiny.hashes(run_dir)["s"] == tiny.hashes(reference)["s"]
    assert tiny.losses(run_dir, "s") == tiny.losses(reference, "s")
