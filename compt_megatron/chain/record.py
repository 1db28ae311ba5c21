"""RUN/<member>/evaluation.jsonl: what was measured of a model at which step. Rank 0 alone reads and writes it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from compt_megatron.chain.progress import Position
from compt_megatron.errors import UserError

FILE = "evaluation.jsonl"


class EvaluationRecord:
    """The rows of one member, one a step: where it stood, `metrics` of its evaluation sets, results of lm-eval's
    `tasks` and what was `asked` for."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE

    def rows(self) -> list[dict[str, Any]]:
        """All rows, in the order of their steps. Raises UserError where the file is damaged."""
        if not self._path.is_file():
            return []
        try:
            return [json.loads(line) for line in self._path.read_text(encoding="utf-8").splitlines()]
        except ValueError as error:
            raise UserError(f"{self._path}: damaged ({error}); remove it, or restore it from a copy") from error

    def latest(self, key: str) -> dict[str, Any]:
        """`metrics` or `tasks` of the last row that has them, empty where none has."""
        return next((row[key] for row in reversed(self.rows()) if row.get(key)), {})

    def add(self, position: Position, **found: Any) -> None:
        """Put what was found into the row of a step. Rows of later steps go: a resumed run makes them again."""
        rows = [row for row in self.rows() if row["step"] <= position.step]
        same = rows.pop() if rows and rows[-1]["step"] == position.step else {}
        self._write([*rows, {**same, **asdict(position), **found}])

    def rewind(self, step: int) -> None:
        """Forget what was measured after `step`: the training goes on from there."""
        rows = self.rows()
        if rows and rows[-1]["step"] > step:
            self._write([row for row in rows if row["step"] <= step])

    def _write(self, rows: list[dict[str, Any]]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        beside = self._path.with_suffix(".jsonl.partial")
        beside.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        beside.replace(self._path)
