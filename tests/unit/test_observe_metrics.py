"""metrics.jsonl: what is appended, what a resume forgets, what a kill leaves."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch

from compt_megatron.observe.metrics import METRICS_FILE, RunLog, read_metrics


def lines(folder: Path) -> list[dict]:
    return [json.loads(raw) for raw in (folder / METRICS_FILE).read_text().splitlines()]


def test_lines_are_on_disk_before_close_and_carry_tensors_and_parts(tmp_path: Path) -> None:
    log = RunLog(tmp_path, tensorboard=False)
    log.log(
        "small", 20, loss=torch.tensor(2.5), lr=1e-3, mfu=None, parts={"clip": 2.25, "align_image": torch.tensor(0.25)}
    )
    (row,) = lines(tmp_path)
    assert row.pop("time") > 1.6e9
    assert row == {"link": "small", "step": 20, "loss": 2.5, "lr": 1e-3, "loss/clip": 2.25, "loss/align_image": 0.25}
    log.close()


def test_rewind_forgets_later_lines_of_that_link_only(tmp_path: Path) -> None:
    with RunLog(tmp_path, tensorboard=False) as log:
        for step in (10, 20, 30):
            log.log("small", step, loss=float(step))
            log.log("large", step, loss=float(step))
    with RunLog(tmp_path, tensorboard=False) as log:
        log.rewind("large", 20)
        log.log("large", 30, loss=-1.0)
    read = read_metrics(tmp_path)
    assert read["small"]["loss"] == [10.0, 20.0, 30.0]
    assert read["large"]["step"] == [10, 20, 30]
    assert read["large"]["loss"] == [10.0, 20.0, -1.0]


def test_a_curve_has_no_duplicates_even_without_rewind(tmp_path: Path) -> None:
    with RunLog(tmp_path, tensorboard=False) as log:
        for step, loss in ((10, 1.0), (20, 2.0), (30, 3.0), (20, 4.0)):
            log.log("small", step, loss=loss)
    assert read_metrics(tmp_path)["small"]["loss"] == [1.0, 4.0]


def test_a_torn_last_line_does_not_swallow_the_next(tmp_path: Path) -> None:
    with RunLog(tmp_path, tensorboard=False) as log:
        log.log("small", 10, loss=1.0)
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"link": "small", "st')
    assert read_metrics(tmp_path)["small"]["step"] == [10]
    with RunLog(tmp_path, tensorboard=False) as log:
        log.log("small", 20, loss=2.0)
    assert [row["step"] for row in lines(tmp_path)] == [10, 20]


def test_what_is_not_finite_is_null_and_reads_back_as_nan(tmp_path: Path) -> None:
    with RunLog(tmp_path, tensorboard=False) as log:
        log.log("small", 1, loss=float("nan"), grad_norm=float("inf"))
        log.log("small", 2, loss=1.0, lr=0.5)
    assert "NaN" not in (tmp_path / METRICS_FILE).read_text()
    columns = read_metrics(tmp_path)["small"]
    assert math.isnan(columns["loss"][0])
    assert columns["loss"][1] == 1.0
    assert len({len(values) for values in columns.values()}) == 1


def test_other_ranks_touch_nothing(tmp_path: Path) -> None:
    with RunLog(tmp_path / "run", rank=1) as log:
        log.log("small", 1, loss=1.0)
        log.evaluation("small", 1, {"set": {"top1": 0.5}})
        log.rewind("small", 0)
    assert not (tmp_path / "run").exists()
    assert read_metrics(tmp_path / "run") == {}


def test_missing_tensorboard_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    said: list[str] = []
    with RunLog(tmp_path, say=said.append) as log:
        for step in range(3):
            log.log("small", step, loss=1.0)
        log.log("large", 1, loss=1.0)
    assert len(said) == 1
    assert len(lines(tmp_path)) == 4


def test_tensorboard_forgets_what_a_resume_runs_again(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with RunLog(tmp_path) as log:
        for step in (10, 20, 30):
            log.log("small", step, loss=float(step))
    with RunLog(tmp_path) as log:
        log.rewind("small", 10)
        log.log("small", 20, loss=-1.0)
        log.evaluation("small", 20, {"held_out": {"top1": 0.25, "note": "text"}})
    events = accumulator.EventAccumulator(str(tmp_path / "tb" / "small"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(10, 10.0), (20, -1.0)]
    assert [event.value for event in events.Scalars("evaluation/held_out/top1")] == [0.25]
