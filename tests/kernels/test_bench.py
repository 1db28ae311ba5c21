"""The benchmark's command: its model without a GPU, and its every path at tiny sizes."""

from __future__ import annotations

import json

import pytest
import torch

from kernels.bench import bench


def test_without_a_gpu_the_model_says_what_it_is_and_meets_every_bar(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main(["--json", str(tmp_path / "found.json")]) == 0
    printed = capsys.readouterr().out
    assert "MODEL, nothing measured" in printed
    assert "NO" not in printed.split("\n", 1)[1]
    found = json.loads((tmp_path / "found.json").read_text())
    assert list(found) == ["model"]
    names = [row["case"].split()[0] for row in found["model"]["rows"]]
    assert {"align_loss", "contrastive_loss", "siglip_loss", "distill_kl"} == set(names)
    assert all(row["source"] == "model" for row in found["model"]["rows"])
    assert not bench.RESULTS.exists() or "model" not in json.loads(bench.RESULTS.read_text())


def test_a_dry_run_runs_what_a_gpu_would(tmp_path, capsys):
    path = tmp_path / "found.json"
    assert bench.main(["--dry-run", "--only", "distill", "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "DRY RUN" in printed
    assert "every operation ran in every dtype" in printed
    (row,) = json.loads(path.read_text())["dry-run"]["rows"]
    assert {"kernels", "eager bf16", "products"} <= set(row["seconds"])
    (products,) = (bar for bar in row["bars"] if bar["of"] == "products")
    assert products["ratio"] == pytest.approx(row["seconds"]["kernels"] / row["seconds"]["products"])
