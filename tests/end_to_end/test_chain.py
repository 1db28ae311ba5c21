"""The tiny chain from the command line: what it leaves behind is whole, loads in open_clip, and is not made twice."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.end_to_end import tiny
from tests.end_to_end.commands import compt, launcher_environment

MEMBERS = list(tiny.STEPS)


def test_every_link_is_grown_trained_evaluated_and_exported(reference: Path) -> None:
    entries = tiny.entries(reference)
    assert list(entries) == MEMBERS
    for name, entry in entries.items():
        assert entry["state"] == "done"
        assert entry["steps"] == tiny.STEPS[name]
        assert entry["samples"] == tiny.STEPS[name] * 32
        assert len(tiny.losses(reference, name)) == tiny.STEPS[name]
        assert (reference / entry["checkpoint"] / "compt.json").is_file()
        rows = [json.loads(line) for line in (reference / name / "evaluation.jsonl").read_text().splitlines()]
        assert rows[-1]["step"] == tiny.STEPS[name]
        assert rows[-1]["metrics"] == entry["evaluation"]
        assert 0 <= next(iter(entry["evaluation"].values()))["top1"] <= 1
    assert [row["step"] for row in _rows(reference / "s")] == [3, 6, 7], "every epoch and at the end"
    assert entries["m"]["parent"] == "s"
    assert entries["m"]["certificate"]["operator"] == "exact"
    for link in ("m", "l"):
        assert max(entries[link]["align_at_step0"].values()) < 1e-9, "grown exactly: aligned from the start"
    assert entries["l"]["macs"]["teacher"] == pytest.approx(entries["m"]["macs"]["train"] / 3 / 5 * 2), (
        "two steps of it"
    )
    assert json.loads((reference / "status.json").read_text())["state"] == "done"
    assert not list(reference.rglob("*.partial"))


def _rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "evaluation.jsonl").read_text().splitlines()]


def test_exports_load_strictly_in_open_clip_and_score_the_same(reference: Path, tmp_path: Path) -> None:
    from compt_megatron.torchvision_mend import ensure_torchvision

    ensure_torchvision()
    import open_clip

    for name in MEMBERS:
        export = reference / name / "export"
        model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{export}")
        tokenizer = open_clip.get_tokenizer(f"local-dir:{export}")
        state = open_clip.factory.load_state_dict(str(next(export.glob("*.safetensors"))))
        model.load_state_dict(state, strict=True)
        images, texts = _probe(reference.parent / "emoji.tar", preprocess, tokenizer)
        ours_image, ours_text = _our_features(reference / tiny.entries(reference)[name]["checkpoint"], images, texts)
        model.eval()
        with torch.no_grad():
            torch.testing.assert_close(model.encode_image(images), ours_image, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(model.encode_text(texts), ours_text, atol=1e-5, rtol=1e-5)


def _probe(shard: Path, preprocess: Any, tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    import io
    import tarfile

    from PIL import Image

    images, captions = [], []
    with tarfile.open(shard) as tar:
        for member in tar:
            content = tar.extractfile(member).read()  # type: ignore[union-attr]
            if member.name.endswith(".json"):
                captions.append(json.loads(content)["captions"][0])
            elif member.name.endswith(".webp"):
                images.append(preprocess(Image.open(io.BytesIO(content)).convert("RGB")))
    return torch.stack(images[:8]), tokenizer(captions[:8])


def _our_features(checkpoint: Path, images: torch.Tensor, texts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    from compt_megatron.checkpoint.formats import open_reader
    from compt_megatron.models.build import build_model
    from compt_megatron.models.groups import ensure_groups
    from compt_megatron.models.state import load_canonical

    ensure_groups()
    reader = open_reader(checkpoint)
    assert reader.spec is not None
    model = build_model(reader.spec)
    load_canonical(model, reader.spec, lambda name: reader.read(f"weight/{name}"))
    reader.close()
    model.eval()
    with torch.no_grad():
        return model.encode_image(images), model.encode_text(texts)


def test_the_other_commands_understand_the_run(reference: Path, tmp_path: Path) -> None:
    entry = tiny.entries(reference)["l"]
    for path in (reference / entry["checkpoint"], reference / entry["export"], reference / entry["initial"]):
        found = compt("inspect", path, "--json", folder=tmp_path)
        assert found.code == 0, found
        assert json.loads(found.stdout)["model"]["parameters"] == entry["parameters"]
    verified = compt("verify", reference, "--json", folder=tmp_path)
    assert verified.code == 0, verified
    records = json.loads(verified.stdout)
    assert len(records) == 3 * len(MEMBERS)
    assert sum(record["growth"] is not None for record in records) == 2
    data = ["--data", str(reference.parent / "emoji.tar")]
    scores = []
    for path in (entry["checkpoint"], entry["export"]):
        scored = compt("eval", reference / path, *data, "--json", folder=tmp_path)
        assert scored.code == 0, scored
        scores.append(next(iter(json.loads(scored.stdout).values())))
    assert scores[0] == pytest.approx(scores[1]), "the export scores as the checkpoint"
    assert scores[0]["top1"] == pytest.approx(next(iter(entry["evaluation"].values()))["top1"]), "and as recorded"
    report = compt("report", reference, "--out", tmp_path / "report", folder=tmp_path)
    assert report.code == 0, report
    assert {"report.html", "report.json", "report.csv"} <= {path.name for path in (tmp_path / "report").iterdir()}


def test_a_finished_run_is_not_made_again(recipe: Path, reference: Path) -> None:
    before, started = tiny.hashes(reference), time.monotonic()
    stamps = {path: path.stat().st_mtime_ns for path in reference.rglob("*.distcp")}
    again = compt("train", recipe, "--run-dir", reference, folder=recipe.parent)
    assert again.code == 0
    assert time.monotonic() - started < 10
    assert [f"{name}: done already" in again.stdout for name in MEMBERS] == [True] * 4
    assert tiny.hashes(reference) == before
    assert {path: path.stat().st_mtime_ns for path in reference.rglob("*.distcp")} == stamps


def test_link_by_link_is_the_same_chain(recipe: Path, reference: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    early = compt("train", recipe, "--run-dir", run_dir, "--link", "m", folder=tmp_path)
    assert early.code == 2
    assert "'s'" in early.stderr
    assert "not trained yet" in early.stderr
    for name in ("s", "m"):
        assert compt("train", recipe, "--run-dir", run_dir, "--link", name, folder=tmp_path).code == 0
    found, expected = tiny.hashes(run_dir), tiny.hashes(reference)
    assert [found[name] for name in MEMBERS] == [expected["s"], expected["m"], None, None]


def test_the_installed_command_is_the_module(recipe: Path, reference: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "compt_megatron", "train", str(recipe), "--run-dir", str(tmp_path / "run")]
    done = subprocess.run(
        [*command, "--link", "s"], env=launcher_environment(), cwd=tmp_path, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert tiny.hashes(tmp_path / "run")["s"] == tiny.hashes(reference)["s"], "and it trains the same weights"
    assert done.stderr == "", "nothing but results is said"


# -- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["optimizer.lr=2e-3"], "other settings"),
        (["links.1.grow.operator=corner"], "other settings"),
        (["links.0.name=t"], "was started here"),
    ],
)
def test_a_run_folder_of_another_recipe_is_refused(
    recipe: Path, reference: Path, tmp_path: Path, overrides: list[str], said: str
) -> None:
    before = (reference / "chain.json").read_bytes()
    if overrides == ["links.0.name=t"]:
        overrides.append("controls=[]")
    refused = compt("train", recipe, "--run-dir", reference, *overrides, folder=tmp_path)
    assert (refused.code, refused.stderr.count("\n")) == (2, 1), refused
    assert said in refused.stderr
    assert (reference / "chain.json").read_bytes() == before


def test_mistakes_end_two_ranks_with_one_line(recipe: Path, reference: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("precious")
    cases = {
        "batch": (["--run-dir", tmp_path / "a", "data.batch_size=33", "data.streams=null"], "batch_size 33"),
        "folder": (["--run-dir", foreign], "thesis.tex"),
        "anew": (["--run-dir", reference, "--resume", "none"], "already holds a run"),
        "nothing left": (["--run-dir", reference, "--resume", reference / "s" / "initial"], "nothing was left"),
        "no such": (["--run-dir", tmp_path / "b", "--resume", tmp_path / "none"], "no such checkpoint"),
    }
    for name, (arguments, said) in cases.items():
        ended = compt("train", recipe, *arguments, folder=tmp_path, world=2)
        assert ended.codes == [2, 2], (name, ended)
        assert ended.stderr.count("\n") == 1, (name, ended)
        assert said in ended.stderr, (name, ended)
    assert [path.name for path in foreign.iterdir() if path.name != "status.json"] == ["thesis.tex"]


def test_resuming_from_a_named_checkpoint_forgets_what_came_after(
    recipe: Path, reference: Path, tmp_path: Path
) -> None:
    run_dir, keep = tmp_path / "run", "checkpoint.keep=9"
    shutil.copytree(reference, run_dir)
    assert compt("train", recipe, "--run-dir", run_dir, keep, folder=tmp_path).code == 0
    chain = tiny.ledger(run_dir)
    chain["links"][0].update(state="training", weight_hash=None, evaluation={})
    chain["links"][1:], chain["controls"] = [], []
    (run_dir / "chain.json").write_text(json.dumps(chain))
    early = run_dir / "s" / "checkpoints" / "step_00000006"
    again = compt("train", recipe, "--run-dir", run_dir, "--link", "s", "--resume", early, folder=tmp_path)
    assert again.code == 0, again
    assert "step 7/7" in again.stdout
    assert "step 6/7" not in again.stdout
    assert tiny.hashes(run_dir)["s"] == tiny.hashes(reference)["s"]
    other = ["--run-dir", tmp_path / "other", "--resume", reference / "m" / "initial"]
    wrong = compt("train", recipe, *other, folder=tmp_path)
    assert (wrong.code, wrong.stderr.count("\n")) == (2, 1), wrong
    assert "checkpoint of another model: it holds 'm'" in wrong.stderr
