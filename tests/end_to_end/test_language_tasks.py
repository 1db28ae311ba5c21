"""lm-eval in a run: in training and at the end of a link, through kills and requests to stop, on one rank and on two.

Without lm-eval (extra `eval`) only what it then says is tested.
"""

from __future__ import annotations

import importlib.util
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.end_to_end import tiny, tiny_text
from tests.end_to_end.commands import Job, compt
from tests.unit.task_samples import WITHOUT, write_tasks

INSTALLED = importlib.util.find_spec("lm_eval") is not None
needs_lm_eval = pytest.mark.skipif(not INSTALLED, reason=WITHOUT)
TASKS = ("tiny_choice", "tiny_word")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two links: tasks every third step of the first, at the end of both."""
    folder = tmp_path_factory.mktemp("tasks")
    path = tiny_text.write_recipe(folder)
    write_tasks(folder / "tasks")
    content = yaml.safe_load(path.read_text())
    harness = {"tasks": list(TASKS), "include": "tasks", "limit": 2}
    content["links"][0]["evaluate"] |= {"harness": {"every_steps": 3}}
    content |= {"evaluate": {"harness": harness}, "links": content["links"][:2], "controls": []}
    content["report"]["tensorboard"] = True
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module")
def reference(recipe: Path) -> Path:
    """The run folder of the recipe, run to its end in one process. Not to be changed."""
    run_dir = recipe.parent / "reference"
    result = compt("train", recipe, "--run-dir", run_dir, folder=recipe.parent)
    assert result.codes == [0], result
    assert "s: step 6 on tiny_choice: acc " in result.stdout
    return run_dir


def _rows(run_dir: Path, name: str) -> list[dict[str, Any]]:
    path = run_dir / name / "evaluation.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _evaluated(run_dir: Path, name: str) -> list[int]:
    """The steps of which results are recorded."""
    return [row["step"] for row in _rows(run_dir, name) if "tasks" in row]


@needs_lm_eval
def test_results_are_recorded_shown_and_reported(recipe: Path, reference: Path) -> None:
    entries = tiny.entries(reference)
    assert _evaluated(reference, "s") == [3, 6, 7]
    assert _evaluated(reference, "m") == [5]
    for name, entry in entries.items():
        last = _rows(reference, name)[-1]
        assert entry["tasks"] == last["tasks"]
        assert set(entry["tasks"]) == set(TASKS)
        assert entry["tasks"]["tiny_word"].keys() >= {"perplexity", "perplexity_stderr", "acc", "acc_stderr", "samples"}
        assert last["metrics"] == entry["evaluation"], "beside the perplexity of the same step"
        assert last["epoch"] > 0
        assert not (reference / name / "harness").exists()
    words = [row["tasks"]["tiny_word"]["perplexity"] for row in _rows(reference, "s") if "tasks" in row]
    assert len(set(words)) == 3, "each of its own weights"
    assert any(b"evaluation/tiny_choice/acc_stderr" in file.read_bytes() for file in (reference / "tb" / "s").iterdir())
    result = compt("report", reference, "--out", recipe.parent / "report", folder=recipe.parent)
    assert result.codes == [0], result
    page = (recipe.parent / "report" / "report.html").read_text()
    assert f"<td>tiny_choice</td><td>acc {entries['m']['tasks']['tiny_choice']['acc']:.4f} ± " in page
    assert "tiny_word/perplexity_stderr" in (recipe.parent / "report" / "report.csv").read_text().splitlines()[0]


@needs_lm_eval
def test_a_checkpoint_of_the_run_gives_the_same(recipe: Path, reference: Path) -> None:
    """Exported to a temporary folder, with the tokenizer that the run records."""
    entry = tiny.entries(reference)["m"]
    tasks = ("--tasks", ",".join(TASKS), "--include-path", "tasks", "--limit", "2", "--json")
    result = compt("eval", reference / entry["checkpoint"], *tasks, folder=recipe.parent)
    assert result.codes == [0], result
    assert json.loads(result.stdout) == entry["tasks"]


@needs_lm_eval
def test_stopped_and_killed_while_lm_eval_is_at_work(recipe: Path, reference: Path, tmp_path: Path) -> None:
    """It goes on at the step that is being evaluated, and evaluates nothing twice."""
    run_dir = tmp_path / "run"
    scratch = run_dir / "s" / "harness"
    for number, done, code in ((signal.SIGTERM, [], 3), (signal.SIGKILL, [3], -signal.SIGKILL)):
        job = Job(["train", recipe, "--run-dir", run_dir], tmp_path)
        job.wait_for(lambda: scratch.exists() and _evaluated(run_dir, "s") == done)  # noqa: B023
        job.kill(number)
        result = job.finish()
        assert result.codes == [code], result
        assert scratch.exists() == (number == signal.SIGKILL)
        assert _evaluated(run_dir, "s") == done
    last = compt("train", recipe, "--run-dir", run_dir, folder=tmp_path)
    assert last.codes == [0], last
    assert [line for line in last.stdout.splitlines() if "lm-eval on" in line] == [
        f"{where}: lm-eval on {', '.join(TASKS)}" for where in ("s: step 6", "s: step 7", "m: step 5")
    ]
    assert not scratch.exists()
    assert tiny.hashes(run_dir) == tiny.hashes(reference)
    assert [_rows(run_dir, name) for name in "sm"] == [_rows(reference, name) for name in "sm"]
    assert tiny.losses(run_dir, "s") == tiny.losses(reference, "s")


@needs_lm_eval
def test_two_ranks_wait_for_the_one(recipe: Path, tmp_path: Path) -> None:
    short = ("links.s.steps=2", "links.m.steps=1", "links.s.evaluate.harness.every_steps=1")
    result = compt("train", recipe, *short, "--run-dir", tmp_path / "run", folder=tmp_path, world=2)
    assert result.codes == [0, 0], result
    assert [_evaluated(tmp_path / "run", name) for name in "sm"] == [[1, 2], [1]]


@needs_lm_eval
def test_a_task_that_cannot_be_had_is_one_line_before_anything_starts(recipe: Path, tmp_path: Path) -> None:
    write_tasks(tmp_path / "tasks")
    (tmp_path / "tasks" / "tiny_word.jsonl").unlink()
    given = f"links.m.evaluate.harness.include={tmp_path / 'tasks'}"
    result = compt("train", recipe, given, "--run-dir", tmp_path / "run", folder=tmp_path, world=2)
    assert result.codes == [2, 2], result
    assert result.stderr.startswith("compt: m: evaluate.harness: task 'tiny_word': cannot be set up (")
    assert result.stderr.count("\n") == 1
    assert [entry.name for entry in (tmp_path / "run").iterdir()] == ["status.json"]


@pytest.mark.skipif(INSTALLED, reason="lm-eval is installed")
def test_without_lm_eval_it_says_what_to_install(recipe: Path, tmp_path: Path) -> None:
    result = compt("train", recipe, "--run-dir", tmp_path / "run", folder=tmp_path)
    assert result.codes == [2], result
    wanted = "s: evaluate.harness: lm-eval is not installed, which tasks need; pip install 'compt-megatron[eval]'"
    assert result.stderr == f"compt: {wanted}\n"
    assert not (tmp_path / "run").exists()
    assert compt("plan", recipe, folder=tmp_path).codes == [0], "a plan does not look"
