"""lm-eval through the export: its numbers are transformers' own, whatever format the checkpoint has, and what cannot be
run is one line. Without lm-eval (extra `eval`) only the latter is tested."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest

from compt_megatron import cli
from compt_megatron.checkpoint.api import convert
from compt_megatron.errors import UserError
from compt_megatron.evaluate.harness import Results, Tasks
from tests.end_to_end import tiny_text
from tests.unit.task_samples import CHOICES, TEXTS, WORDS, log_likelihood, require_lm_eval, write_model, write_tasks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `tasks`, `text` and the model `llama`."""
    folder = tmp_path_factory.mktemp("harness")
    tiny_text.write_text(folder)
    write_tasks(folder / "tasks")
    write_model(folder / "llama", folder / "text")
    return folder


@pytest.fixture(scope="module")
def tasks(folder: Path) -> Tasks:
    require_lm_eval()
    return Tasks(["tiny_choice", "tiny_text", "tiny_word"], folder / "tasks")


@pytest.fixture(scope="module")
def results(folder: Path, tasks: Tasks) -> Results:
    return tasks.run(folder / "llama", batch_size=2)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    """transformers' model and tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder / "llama").eval(), AutoTokenizer.from_pretrained(
        folder / "llama"
    )


def test_a_continuation_has_transformers_likelihood(results: Results, theirs: Any) -> None:
    found = [log_likelihood(*theirs, row["start"], row["end"]) for row in WORDS]
    mean = sum(value for value, _ in found) / len(found)
    assert math.log(results["tiny_word"]["perplexity"]) == pytest.approx(-mean, abs=1e-4)
    assert results["tiny_word"]["acc"] == sum(greedy for _, greedy in found) / len(found)
    assert (results["tiny_word"]["samples"], results["tiny_word"]["shots"]) == (3, 0)
    assert results["tiny_word"]["perplexity_stderr"] > 0


def test_the_likeliest_choice_is_the_answer(results: Results, theirs: Any) -> None:
    right = 0
    for row in CHOICES:
        scores = [log_likelihood(*theirs, row["question"], choice)[0] for choice in row["choices"]]
        right += scores.index(max(scores)) == row["answer"]
    found = results["tiny_choice"]
    assert found["acc"] == right / len(CHOICES)
    assert found["acc_stderr"] == pytest.approx(math.sqrt(found["acc"] * (1 - found["acc"]) / (len(CHOICES) - 1)))


def test_bits_per_byte_are_those_of_whole_texts(results: Results, theirs: Any) -> None:
    model, tokenizer = theirs
    nats = [-log_likelihood(model, tokenizer, tokenizer.eos_token, row["text"])[0] for row in TEXTS]
    size = sum(len(row["text"].encode()) for row in TEXTS)
    assert results["tiny_text"]["bits_per_byte"] == pytest.approx(sum(nats) / math.log(2) / size, abs=1e-4)


def test_tasks_run_again_give_the_same_and_shots_are_of_each_run(folder: Path, tasks: Tasks, results: Results) -> None:
    few = tasks.run(folder / "llama", limit=2, shots=1)
    assert {name: (values["samples"], values["shots"]) for name, values in few.items()} == dict.fromkeys(
        results, (2, 1)
    )
    assert tasks.run(folder / "llama", batch_size=3) == {
        name: pytest.approx(values, rel=1e-5) for name, values in results.items()
    }


def test_any_format_is_evaluated_from_the_command_line(
    folder: Path, tmp_path: Path, results: Results, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(folder / "llama", tmp_path / "megatron", "megatron")
    command = ["eval", str(tmp_path / "megatron"), "--tasks", "tiny_word", "--include-path", str(folder / "tasks")]
    assert cli.main([*command, "--json"]) == 2
    assert "has no tokenizer beside it, and none is recorded; name one with --tokenizer" in capsys.readouterr().err
    assert cli.main([*command, "--json", "--tokenizer", str(folder / "text")]) == 0
    assert json.loads(capsys.readouterr().out) == {"tiny_word": pytest.approx(results["tiny_word"], rel=1e-5)}


def test_what_cannot_be_run_is_one_line(folder: Path, tmp_path: Path) -> None:
    require_lm_eval()
    broken = folder / "tasks" / "tiny_choice.yaml"
    (tmp_path / "tasks").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "tasks" / "lost.yaml").write_text(
        broken.read_text().replace("tiny_choice.jsonl", "lost.jsonl").replace("task: tiny_choice", "task: lost")
    )
    for names, include, message in (
        (["lost"], tmp_path / "tasks", "task 'lost': cannot be set up ("),
        (["lost"], tmp_path / "empty", "empty: holds no task; name a folder of lm-eval's YAML files"),
        (["lost"], tmp_path / "none", "none: no such folder of tasks; name one that holds lm-eval's YAML files"),
        (["tiny_chioce"], folder / "tasks", "task 'tiny_chioce': lm-eval has none of that name; did you mean 'tiny_"),
    ):
        with pytest.raises(UserError) as caught:
            Tasks(names, include)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_model_without_a_tokenizer_is_one_line(folder: Path, tasks: Tasks, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / "llama" / name).read_bytes())
    with pytest.raises(UserError, match=r"transformers finds no tokenizer there .*; put tokenizer\.json beside"):
        tasks.run(tmp_path)


def test_without_lm_eval_it_says_what_to_install(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find(name))
    assert cli.main(["eval", str(folder / "llama"), "--tasks", "arc_easy"]) == 2
    said = capsys.readouterr().err
    assert said == "compt: lm-eval is not installed, which tasks need; pip install 'compt-megatron[eval]'\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give --data, or --tasks for a language model"),
        (["--data", "x", "--limit", "3"], "--limit is for --tasks, which is not given; leave it out"),
        (["--data", "x", "--include-path", "x"], "--include-path is for --tasks, which is not given"),
        (["--tasks", "x", "--length", "8"], "--length is for --data, which is not given"),
        (["--tasks", "x,,y"], "'x,,y' is not a list of names, such as arc_easy,hellaswag"),
        (["--tasks", "x", "--shots", "-1"], "'-1' is not a whole number"),
    ],
)
def test_options_that_do_not_go_together(
    options: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["eval", str(folder / "llama"), *options]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
