"""evaluation.jsonl: one row a step, whoever measured what; a run that goes on forgets what came after its step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compt_megatron.chain.progress import Position
from compt_megatron.chain.record import FILE, EvaluationRecord
from compt_megatron.errors import UserError


def at(step: int) -> Position:
    return Position(step, step / 10, 8 * step, 1e6 * step)


def test_a_step_has_one_row_and_later_ones_go(tmp_path: Path) -> None:
    record = EvaluationRecord(tmp_path / "s")
    assert (record.rows(), record.latest("tasks")) == ([], {})
    for step in (2, 4, 6):
        record.add(at(step), metrics={"text": {"loss": 1 / step}})
    record.add(at(4), tasks={"arc": {"acc": 0.5}}, asked={"limit": None})
    rows = record.rows()
    assert [row["step"] for row in rows] == [2, 4]
    assert rows[1] == {
        "step": 4, "epoch": 0.4, "samples": 32, "macs": 4e6, "metrics": {"text": {"loss": 0.25}},
        "tasks": {"arc": {"acc": 0.5}}, "asked": {"limit": None},
    }  # fmt: skip
    record.add(at(5), metrics={"text": {"loss": 0.2}})
    assert record.latest("tasks") == {"arc": {"acc": 0.5}}
    assert record.latest("metrics") == {"text": {"loss": 0.2}}
    record.rewind(4)
    assert record.rows() == rows
    record.rewind(0)
    assert record.rows() == []
    assert [path.name for path in (tmp_path / "s").iterdir()] == [FILE]


def test_a_damaged_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(json.dumps({"step": 1}) + '\n{"step": 2, "met')
    with pytest.raises(UserError, match=r"evaluation\.jsonl: damaged .* remove it, or restore it from a copy"):
        EvaluationRecord(tmp_path).rows()
