"""The tiny chain of language models from the command line: grown, aligned, evaluated, exported for transformers; and
killed, it ends with the same weights."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from compt_megatron.chain.evaluation import language_model
from compt_megatron.data.text.loader import HeldOutLoader
from compt_megatron.data.text.source import TextSource
from compt_megatron.engine.runtime import Runtime
from compt_megatron.torchvision_mend import ensure_torchvision
from tests.end_to_end import tiny, tiny_text
from tests.end_to_end.commands import Job, compt

MEMBERS = list(tiny_text.STEPS)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_text.write_recipe(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def reference(recipe: Path) -> Path:
    """The run folder of the recipe, run to its end in one process. Not to be changed."""
    run_dir = recipe.parent / "reference"
    result = compt("train", recipe, "--run-dir", run_dir, folder=recipe.parent)
    assert result.codes == [0], result
    assert "perplexity" in result.stdout
    assert "The chain" in result.stdout
    return run_dir


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _held_out(entry: dict[str, Any]) -> dict[str, Any]:
    (metrics,) = entry["evaluation"].values()
    return metrics


def test_every_link_is_grown_trained_and_evaluated(recipe: Path, reference: Path) -> None:
    entries = tiny.entries(reference)
    assert list(entries) == MEMBERS
    record = json.loads((recipe.parent / "text" / "text.json").read_text())["splits"]["held_out"]
    for name, entry in entries.items():
        assert entry["state"] == "done"
        assert entry["samples"] == tiny_text.STEPS[name] * 8
        assert len(tiny.losses(reference, name)) == tiny_text.STEPS[name]
        found = _held_out(entry)
        assert (found["tokens"], found["bytes"]) == (record["tokens"] - 1, record["bytes"])
        assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
        bits = found["loss"] * found["tokens"] / math.log(2) / record["bytes"]
        assert found["bits_per_byte"] == pytest.approx(bits)
        assert _rows(reference / name / "evaluation.jsonl")[-1]["metrics"] == entry["evaluation"]
    assert len(_rows(reference / "s" / "evaluation.jsonl")) > 1, "in training too"
    assert _held_out(entries["l"])["perplexity"] < _held_out(entries["s"])["perplexity"] < tiny_text.VOCABULARY
    first = {row["link"]: row for row in reversed(_rows(reference / "metrics.jsonl"))}
    for link in ("m", "l"):
        assert entries[link]["certificate"]["operator"] == "exact"
        assert max(entries[link]["certificate"]["parity"].values()) < 1e-5
        assert first[link]["loss/align/hidden"] < 1e-9, "grown exactly: aligned from the start"
    assert first["m"]["loss/align/layer_0"] < 1e-9
    assert entries["m"]["align_at_step0"].keys() == {"hidden", "layer_0"}
    assert first["l"]["loss/distill/kl"] < 1e-6, "and predicts alike"
    forward = entries["m"]["macs"]["train"] / tiny_text.STEPS["m"] / 3
    logits = 8 * tiny_text.LENGTH * tiny_text.VOCABULARY
    assert entries["l"]["macs"]["teacher"] == pytest.approx(2 * (forward + 3 * logits * 32)), "two steps"
    forward = entries["s"]["macs"]["train"] / tiny_text.STEPS["s"] / 3
    assert entries["m"]["macs"]["teacher"] == pytest.approx(tiny_text.STEPS["m"] * (forward - logits * 16))


def test_exports_give_the_same_logits_and_perplexity_in_transformers(recipe: Path, reference: Path) -> None:
    ensure_torchvision()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = TextSource.open(str(recipe.parent / "text" / "held_out"))
    for name in ("s", "l"):
        entry = tiny.entries(reference)[name]
        export = reference / entry["export"]
        theirs = AutoModelForCausalLM.from_pretrained(export).eval()
        ours = language_model(reference / entry["checkpoint"], Runtime.start())
        nats = tokens = 0.0
        for batch in HeldOutLoader(text, length=tiny_text.LENGTH, batch_size=64):
            with torch.no_grad():
                logits, own = theirs(batch.tokens).logits, ours.logits(ours(batch.tokens)["hidden"])
            assert (own - logits).abs().max() < 1e-5 * logits.abs().max()
            losses = torch.nn.functional.cross_entropy(logits.mT, batch.targets, reduction="none")
            nats, tokens = nats + float(losses[batch.mask].sum()), tokens + float(batch.mask.sum())
        assert _held_out(entry)["loss"] == pytest.approx(nats / tokens, rel=1e-5)
        tokenizer = AutoTokenizer.from_pretrained(export)
        assert len(tokenizer) == tiny_text.VOCABULARY
        assert tokenizer.decode(tokenizer("chain of models").input_ids) == "chain of models"


def test_an_export_evaluates_from_the_command_line(recipe: Path, reference: Path) -> None:
    entry = tiny.entries(reference)["m"]
    data = ("--data", "text/held_out", "--length", str(tiny_text.LENGTH), "--json")
    result = compt("eval", reference / entry["export"], *data, folder=recipe.parent)
    assert result.codes == [0], result
    assert json.loads(result.stdout)["text/held_out"] == pytest.approx(_held_out(entry), rel=1e-5)


def test_a_checkpoint_of_the_run_is_exported_with_the_tokenizer_of_the_data(
    recipe: Path, reference: Path, tmp_path: Path
) -> None:
    entry, text = tiny.entries(reference)["m"], recipe.parent / "text"
    assert entry["tokenizer"] == str((text / "tokenizer.json").resolve())
    result = compt("export", reference / entry["checkpoint"], tmp_path / "hf", folder=tmp_path)
    assert result.codes == [0], result
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (text / name).read_bytes()
    weights = "model.safetensors"
    assert (tmp_path / "hf" / weights).read_bytes() == (reference / entry["export"] / weights).read_bytes()


def test_a_report_says_that_lower_is_better(recipe: Path, reference: Path) -> None:
    result = compt("report", reference, "--out", recipe.parent / "report", folder=recipe.parent)
    assert result.codes == [0], result
    report = json.loads((recipe.parent / "report" / "report.json").read_text())
    entries = tiny.entries(reference)
    better = _held_out(entries["l"])["perplexity"] < _held_out(entries["l-alone"])["perplexity"]
    assert report["verdict"]["outcome"] == ("won" if better else "lost")
    assert "Perplexity over compute" in (recipe.parent / "report" / "report.html").read_text()


def test_a_folder_of_transformers_is_the_base_of_a_chain(recipe: Path, tmp_path: Path) -> None:
    """Imported as it is, then grown and aligned to."""
    ensure_torchvision()
    from transformers import LlamaConfig, LlamaForCausalLM

    fields = tiny_text.model(16, 2, 1)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**fields)).save_pretrained(tmp_path / "llama")
    content = yaml.safe_load(recipe.read_text())
    content["data"] |= {"tokenizer": "text/tokenizer.json", "eval": []}
    content["links"] = [
        {"model": str(tmp_path / "llama"), "name": "base", "init": str(tmp_path / "llama"), "train": False},
        {"model": "m.json", "steps": 2, "grow": {"operator": "exact"}, "align": {}},
    ]
    other = recipe.with_name("init.yaml")
    other.write_text(yaml.safe_dump({**content, "controls": []}))
    run_dir = tmp_path / "run"
    result = compt("train", other, "--run-dir", run_dir, folder=tmp_path)
    assert result.codes == [0], result
    entries = tiny.entries(run_dir)
    assert max(entries["m"]["certificate"]["parity"].values()) < 1e-5
    first = _rows(run_dir / "metrics.jsonl")[0]
    assert (first["link"], first["loss/align/hidden"] < 1e-9) == ("m", True)


LAYOUTS = {
    "s": {"zero": 3},  # two copies
    "m": {"engine": "megatron", "pipeline": 2, "micro_batches": 2},  # with an aligned layer on the first stage
    "l": {"tensor": 2, "sequence": True},
}


def test_links_on_different_layouts_train_as_one_process(recipe: Path, reference: Path, tmp_path: Path) -> None:
    content = yaml.safe_load(recipe.read_text())
    for link in content["links"]:
        link["parallel"] = LAYOUTS[link["model"].removesuffix(".json")]
    content["links"][2]["align"]["tensor"] = content["links"][2]["distill"]["tensor"] = 2
    mixed = recipe.with_name("mixed.yaml")
    mixed.write_text(yaml.safe_dump({**content, "controls": []}))
    run_dir = tmp_path / "run"
    done = compt("train", mixed, "--run-dir", run_dir, folder=tmp_path, world=2)
    assert done.codes == [0, 0], done
    for name in LAYOUTS:
        assert tiny.losses(run_dir, name) == pytest.approx(tiny.losses(reference, name), rel=1e-3)
        entry, expected = tiny.entries(run_dir)[name], tiny.entries(reference)[name]
        assert (entry["samples"], entry["macs"]) == (expected["samples"], expected["macs"])
        assert _held_out(entry) == pytest.approx(_held_out(expected), rel=1e-3)
        assert entry["align_at_step0"].keys() == expected["align_at_step0"].keys()
        assert max(entry["align_at_step0"].values(), default=0) < 1e-9


def test_killed_it_ends_with_the_same_weights(recipe: Path, reference: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    for link, step in (("s", 3), ("m", 4)):
        job = Job(["train", recipe, "--run-dir", run_dir], tmp_path)
        job.wait_for(lambda: f'"link": "{link}", "step": {step},' in _text(run_dir / "metrics.jsonl"))  # noqa: B023
        job.kill()
        assert job.finish().codes == [-signal.SIGKILL]
    last = compt("train", recipe, "--run-dir", run_dir, folder=tmp_path)
    assert last.codes == [0], last
    assert tiny.hashes(run_dir) == tiny.hashes(reference)
    for name in MEMBERS:
        assert tiny.losses(run_dir, name) == tiny.losses(reference, name)
        evaluated = [_rows(folder / name / "evaluation.jsonl") for folder in (run_dir, reference)]
        assert evaluated[0] == evaluated[1]


def _text(path: Path) -> str:
    return path.read_text() if path.is_file() else ""
