"""What the person at the terminal sees while a checkpoint is written: a bar, or now and then a line."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from compt_megatron.observe.numbers import human

_EVERY_S = 10.0  # between the lines where there is no terminal


class Transfer:
    """Shows the bytes of one checkpoint being written, on stderr. Call it with what `grow` and `convert` report.

    Used as a context: the clock runs inside. Shows nothing meanwhile if `quiet`.
    """

    def __init__(self, what: str, quiet: bool = False) -> None:
        self.leads = os.environ.get("RANK", "0") == "0"  # under a launcher one process speaks
        self._what, self._enabled = what, self.leads and not quiet
        self._bar: Any = None
        self._done = self._total = self._kept = 0
        self._started = self._said = time.monotonic()
        self._seconds = 0.0

    def __enter__(self) -> Transfer:
        self._started = self._said = time.monotonic()
        if self._enabled and sys.stderr is not None and sys.stderr.isatty():
            self._bar = _bar()
            self._bar.add_task(self._what, total=None)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._seconds = time.monotonic() - self._started
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, done: int, total: int, kept: int) -> None:
        self._done, self._total, self._kept = done, total, kept
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, total=total)
        elif self._enabled and (now := time.monotonic()) - self._said >= _EVERY_S:
            self._said = now
            rate = human((done - kept) / (now - self._started))
            print(f"{self._what}: {human(done)}B of {human(total)}B, {rate}B/s", file=sys.stderr, flush=True)

    def add_up(self, exchange: Callable[[Any], list[Any]]) -> None:
        """Where a launcher's workers saw only their own bytes: all of them call this, and then know all bytes."""
        counts = exchange((self._done, self._total, self._kept))
        self._done, self._total, self._kept = (sum(column) for column in zip(*counts, strict=True))

    def summary(self) -> str:
        """2.07 GB in 1.3 s, 1.59 GB/s."""
        before = f" ({human(self._kept)}B were there from an earlier run)" if self._kept else ""
        written = self._done - self._kept
        rate = f", {human(written / self._seconds)}B/s" if written and self._seconds else ""
        return f"{human(self._done)}B in {self._seconds:.1f} s{before}{rate}"


def _bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
