"""The run's curves: one JSON line a log interval in RUN/metrics.jsonl, the same scalars for TensorBoard."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from io import TextIOWrapper
from pathlib import Path
from types import TracebackType
from typing import Any

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tb"
PART = "loss/"  # a part of the loss is the column "loss/<name>"


class RunLog:
    """Appends scalars of a run; a context manager; does nothing on ranks other than 0.

    A line is {"link", "step", "time" (seconds since the epoch), scalars...}, written and flushed at once, so that a
    killed run loses no finished line. `say` gets the one message that TensorBoard is missing.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str],
        rank: int = 0,
        tensorboard: bool = True,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.run_dir = Path(run_dir)
        self._active = rank == 0
        self._tensorboard = tensorboard
        self._say = say or _say_on_stderr
        self._writers: dict[str, Any] = {}
        self._purge: dict[str, int] = {}
        self._file: TextIOWrapper | None = None
        if self._active:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            _drop_torn_line(self._path)
            self._file = self._path.open("a", encoding="utf-8")

    @property
    def _path(self) -> Path:
        return self.run_dir / METRICS_FILE

    def log(self, link: str, step: int, *, parts: Mapping[str, Any] | None = None, **scalars: Any) -> None:
        """Append one line. Numbers or 0-D tensors; `parts` of the loss become columns "loss/<name>".

        A value that is not finite is written as null: JSON has no NaN.
        """
        if self._file is None:
            return
        values = {name: _number(value) for name, value in scalars.items() if value is not None}
        values |= {f"{PART}{name}": _number(value) for name, value in (parts or {}).items()}
        line = {"link": link, "step": int(step), "time": round(time.time(), 3), **values}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        writer = self._writer(link)
        if writer is not None:
            for name, value in values.items():
                if value is not None:
                    writer.add_scalar(name, value, int(step))

    def evaluation(self, link: str, step: int, metrics: Mapping[str, Mapping[str, Any]]) -> None:
        """TensorBoard scalars of an evaluation {set: {metric: value}}; the file of record is the link's own."""
        writer = self._writer(link) if self._active else None
        if writer is not None:
            for name, values in metrics.items():
                for metric, value in values.items():
                    if isinstance(value, (int, float)):
                        writer.add_scalar(f"evaluation/{name}/{metric}", value, int(step))

    def rewind(self, link: str, step: int) -> None:
        """Forget what was logged for `link` after `step`: the link resumes there. Other links keep their lines."""
        if self._file is None:
            return
        self._file.close()
        kept = []
        for raw in self._path.read_text(encoding="utf-8").splitlines():
            row = _parse(raw)
            if row is not None and (row["link"] != link or row["step"] <= step):
                kept.append(raw + "\n")
        beside = self._path.with_suffix(".jsonl.partial")
        with beside.open("w", encoding="utf-8") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(self._path)
        self._file = self._path.open("a", encoding="utf-8")
        self._purge[link] = step + 1
        if (writer := self._writers.pop(link, None)) is not None:
            writer.close()

    def close(self) -> None:
        """Flush and close all files."""
        if self._file is not None:
            self._file.close()
            self._file = None
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _writer(self, link: str) -> Any | None:
        if self._tensorboard and link not in self._writers:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                self._tensorboard = False
                self._say("tensorboard is not installed: the curves are in metrics.jsonl only")
                return None
            folder = str(self.run_dir / TENSORBOARD_FOLDER / link)
            self._writers[link] = SummaryWriter(folder, purge_step=self._purge.get(link))  # type: ignore[no-untyped-call]
        return self._writers.get(link)


def read_metrics(run_dir: str | os.PathLike[str]) -> dict[str, dict[str, list[float]]]:
    """{link: {column: values}} of RUN/metrics.jsonl, every column of a link equally long, NaN where a line lacks it.

    Where a link's step goes back (a run resumed without `rewind`) the later lines count. No file: an empty dict.
    """
    path = Path(run_dir) / METRICS_FILE
    rows: dict[str, list[dict[str, Any]]] = {}
    for raw in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        row = _parse(raw)
        if row is None:
            continue
        of_link = rows.setdefault(row["link"], [])
        while of_link and of_link[-1]["step"] >= row["step"]:
            of_link.pop()
        of_link.append(row)
    return {link: _columns(of_link) for link, of_link in rows.items()}


def _columns(rows: list[dict[str, Any]]) -> dict[str, list[float]]:
    names = dict.fromkeys(name for row in rows for name in row if name != "link")
    return {name: [_as_float(row.get(name)) for row in rows] for name in names}


def _as_float(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else math.nan


def _number(value: Any) -> float | int | None:
    number = value if isinstance(value, int) else float(value)
    return number if math.isfinite(number) else None


def _parse(raw: str) -> dict[str, Any] | None:
    """One line, or None for one that a kill left half-written."""
    try:
        row = json.loads(raw)
    except json.JSONDecodeError:
        return None
    good = isinstance(row, dict) and isinstance(row.get("link"), str) and isinstance(row.get("step"), int)
    return row if good else None


def _drop_torn_line(path: Path) -> None:
    """Cut a last line without its newline, so that the next line does not continue it."""
    if not path.is_file():
        return
    with path.open("r+b") as file:
        content = file.read()
        if content and not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)


def _say_on_stderr(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
