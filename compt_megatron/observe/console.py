"""What the person at the terminal sees: a progress bar and a line a log interval, and the table at the end."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from rich import box
from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from compt_megatron.observe import numbers
from compt_megatron.observe import table as summary
from compt_megatron.observe.family import family_of, leading_metric, parity_of
from compt_megatron.observe.verdict import METRIC_NAMES, judge, shown

_PLAIN_WIDTH = 200  # off a terminal nobody's width is known: tables keep their rows on one line


class Console:
    """Progress for people; silent where `enabled` is false (every rank but 0, or under --json).

    On a terminal a bar for the link at hand stays below the lines; elsewhere (files, schedulers) plain lines only.
    """

    def __init__(self, enabled: bool = True, total_links: int = 1, stream: IO[str] | None = None) -> None:
        self.enabled = enabled
        self.total_links = total_links
        stream = stream or sys.stdout
        terminal = bool(getattr(stream, "isatty", lambda: False)())
        self._rich = RichConsole(file=stream, highlight=False, markup=False, width=None if terminal else _PLAIN_WIDTH)
        self._bars = enabled and self._rich.is_terminal
        self._progress: Progress | None = None
        self._started = 0
        self._link, self._total = "", 0

    def begin_link(self, link: str, total_steps: int, start_step: int = 0, position: int | None = None) -> None:
        """A link (or control) starts or resumes training; `position` counts from 1 among `total_links`."""
        self.end_link()
        self._started = position if position is not None else self._started + 1
        self._link, self._total = link, total_steps
        place = f" ({self._started} of {self.total_links})" if self._started <= self.total_links else ""
        resumed = f", resumed at step {start_step:,}" if start_step else ""
        self.message(f"{link}{place}: training {total_steps:,} steps{resumed}")
        if self._bars:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._progress = Progress(*columns, console=self._rich, transient=True)
            self._progress.add_task(link, total=total_steps, completed=start_step)
            self._progress.start()

    def advance(self, step: int) -> None:
        """`step` steps of the link are done."""
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=step)

    def line(self, step: int, scalars: Mapping[str, Any], parts: Mapping[str, Any] | None = None) -> None:
        """The line of a log interval, from the scalars that metrics.jsonl gets (parts also as "loss/<name>" keys)."""
        self.advance(step)
        self.message(log_line(self._link, step, self._total, scalars, parts))

    def end_link(self) -> None:
        """The bar goes away; the lines stay."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def message(self, text: str) -> None:
        """One plain line."""
        if self.enabled:
            self._rich.print(text, soft_wrap=True)

    def grow(self, link: str, parent: str, certificate: Mapping[str, Any] | None = None) -> None:
        """`link` was grown from `parent`."""
        self.message(f"{link}: grown from {parent}{_certificate_words(certificate or {})}")

    def align_at_start(self, link: str, value: float) -> None:
        """The alignment loss before the first step: zero to rounding after exact growth."""
        self.message(f"{link}: alignment loss before the first step {numbers.scientific(value)}")

    def evaluate(self, link: str, step: int, metrics: Mapping[str, Mapping[str, Any]]) -> None:
        """An evaluation {set: {metric: value}} at `step`."""
        for name, values in metrics.items():
            wanted = [metric for metric in METRIC_NAMES if metric in values]
            text = ", ".join(f"{METRIC_NAMES[metric]} {shown(metric, values[metric])}" for metric in wanted)
            if leading_metric(values) is not None:
                self.message(f"{link}: step {step:,} on {name}: {text}")

    def tasks(self, link: str, step: int, results: Mapping[str, Mapping[str, float]]) -> None:
        """Results of lm-eval {task: {metric: value}} at `step`."""
        for name, values in results.items():
            self.message(f"{link}: step {step:,} on {name}: {', '.join(summary.task_words(values))}")

    def export(self, link: str, path: str | Path) -> None:
        """`link` was exported to `path`."""
        self.message(f"{link}: exported to {path}")

    def table(self, ledger: Mapping[str, Any]) -> None:
        """The run's table and its verdict in words, from the content of chain.json."""
        if not self.enabled:
            return
        self.end_link()
        family = family_of(ledger)
        rows = summary.rows(family)
        drawn = Table(box=box.SIMPLE_HEAD, title=family.name, title_justify="left", show_edge=False)
        drawn.padding = (0, 1 if self._rich.width >= 100 else 0, 0, 0)
        for index, heading in enumerate(_short(heading) for heading in summary.headings(family)):
            texts = [*(row.cells[index] for row in rows), *heading.split()]  # a heading may wrap, a number may not
            drawn.add_column(heading, justify="right" if index else "left", width=max(map(len, texts)))
        for row in rows:
            drawn.add_row(*row.cells, style="italic" if row.control else None)
        self._rich.print(drawn)
        self.message(judge(family).words)

    def __enter__(self) -> Console:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end_link()


def _short(heading: str) -> str:
    """A heading of the table that can wrap at blanks: "held out artist, % top-1/5"."""
    name, comma, metrics = heading.partition(", % ") if ", % " in heading else heading.partition(", ")
    return (
        (name.rsplit("/", 1)[-1] + comma + metrics)
        .replace("_", " ")
        .replace("Speed-up", "Speed up")
        .replace("top-1 / top-5", "top-1/5")
    )


def log_line(
    link: str, step: int, total: int, scalars: Mapping[str, Any], parts: Mapping[str, Any] | None = None
) -> str:
    """One interval in one line: link, step, loss and its parts, learning rate, samples/s, MFU or MACs/s, time left."""
    fields = [f"{link}  step {step:>{len(f'{total:,}')},}/{total:,}"]
    parts = {name.removeprefix("loss/"): value for name, value in scalars.items() if name.startswith("loss/")} | dict(
        parts or {}
    )
    for name, value in (("loss", scalars.get("loss")), *parts.items()):
        if value is not None:
            fields.append(f"{name} {_loss(float(value))}")
    if scalars.get("lr") is not None:
        fields.append(f"lr {numbers.scientific(float(scalars['lr']))}")
    if scalars.get("samples_per_s") is not None:
        fields.append(f"{numbers.human(float(scalars['samples_per_s']))} samples/s")
    if scalars.get("mfu") is not None:
        fields.append(f"MFU {numbers.percent(float(scalars['mfu']))}")
    elif scalars.get("macs_per_s") is not None:
        fields.append(f"{numbers.macs(float(scalars['macs_per_s']))}/s")
    if scalars.get("eta_s") is not None:
        fields.append(f"ETA {numbers.duration(float(scalars['eta_s']))}")
    return "  ".join(fields)


def _loss(value: float) -> str:
    """Four decimals; an alignment loss that is zero to rounding keeps its exponent."""
    return f"{value:.4f}" if value == 0 or not abs(value) < 5e-4 else f"{value:.1e}"


def _certificate_words(certificate: Mapping[str, Any]) -> str:
    """What the certificate says, as far as it says it: operator, depth, measured parity."""
    words = [f"operator {certificate['operator']}"] if certificate.get("operator") else []
    if certificate.get("depth"):
        words.append(f"depth {certificate['depth']}")
    if (parity := parity_of(certificate)) is not None:
        words.append(f"measured parity {numbers.scientific(parity)}")
    return "".join(f", {word}" for word in words)
