"""The family report: one HTML page with pictures, the same pictures as PNG, the table as JSON and CSV."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compt_megatron.checkpoint.out_file import no_room
from compt_megatron.observe import table
from compt_megatron.observe.family import LOWER_IS_BETTER, Family, read_family
from compt_megatron.observe.figure import PRINT, THEMED, Palette, png, svg
from compt_megatron.observe.metrics import read_metrics
from compt_megatron.observe.page import Picture, render
from compt_megatron.observe.plots import NARROW, WIDE, Shape, draw_accuracy, draw_losses, draw_rates
from compt_megatron.observe.verdict import Verdict, curve_of, judge

Draw = Callable[[Palette, Shape], Any]


def write_report(run_dir: str | os.PathLike[str], out: str | os.PathLike[str] | None = None) -> Path:
    """Write report.html, report.json, report.csv and one PNG a plot into `out` (default RUN/report); the page's path.

    Works on an unfinished run: what is not there yet is left out. Raises UserError where `run_dir` is no run folder or
    matplotlib is missing.
    """
    run_dir = Path(run_dir)
    family = read_family(run_dir)
    verdict = judge(family)
    folder = Path(out) if out is not None else run_dir / "report"
    pictures = _pictures(family, run_dir)
    files: dict[str, bytes] = {}
    for name, _, _, draw in pictures:
        if (figure := draw(PRINT, WIDE)) is not None:
            files[f"{name}.png"] = png(figure)
    files["report.json"] = (json.dumps(as_json(family, verdict), indent=1) + "\n").encode()
    files["report.csv"] = table.as_csv(family).encode()
    recipe = run_dir / "recipe.yaml"
    text = recipe.read_text(encoding="utf-8") if recipe.is_file() else None
    files["report.html"] = render(family, verdict, _drawn(pictures), text, _command(family, run_dir)).encode()
    _write(folder, files)
    return folder / "report.html"


def _write(folder: Path, files: dict[str, bytes]) -> None:
    """All files or none: each is written beside its name first. Raises UserError where the disk is full."""
    made = not folder.exists()
    try:
        with no_room(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for name, content in files.items():
                (folder / f"{name}.new").write_bytes(content)
    except BaseException:
        for name in files:
            (folder / f"{name}.new").unlink(missing_ok=True)
        if made and folder.is_dir():
            folder.rmdir()
        raise
    for name in files:
        os.replace(folder / f"{name}.new", folder / name)


def as_json(family: Family, verdict: Verdict) -> dict[str, Any]:
    """The report for programs: verdict, rows with raw numbers (MACs, seconds, fractions), accuracy curves."""
    return {
        "format_version": 1,
        "name": family.name,
        "verdict": {"outcome": verdict.outcome, "headline": verdict.headline, "details": list(verdict.details)},
        "eval_sets": {name: family.metric_of(name) for name in family.eval_sets},
        "rows": table.as_dicts(family),
        "curves": {
            member.name: {name: curve_of(member, name) for name in family.eval_sets} for member in family.members
        },
    }


def _pictures(family: Family, run_dir: Path) -> list[tuple[str, str, str, Draw]]:
    """(file stem, heading, caption, how to draw it) of every plot."""
    metrics, sets = read_metrics(run_dir), family.eval_sets
    text = bool(sets) and family.metric_of(sets[0]) in LOWER_IS_BETTER
    dashed = " Dashed: the same model trained alone." if family.controls else ""
    found: list[tuple[str, str, str, Draw]] = [
        (
            "accuracy",
            f"{'Perplexity' if text else 'Accuracy'} over compute",
            "Each curve starts where its predecessor's compute ends, so height at the right edge is what all of the "
            f"chain's compute bought{'; lower is better' if text else ''}.{dashed}",
            lambda palette, shape: draw_accuracy(family, sets[:1], palette, shape),
        ),
        (
            "accuracy_other_sets",
            "The other evaluation sets",
            f"The same curves on the sets that the headline does not use.{dashed}",
            lambda palette, shape: draw_accuracy(family, sets[1:], palette, shape),
        ),
        (
            "loss",
            "Losses",
            "Task loss of every model over its own steps; a grown model starts low because it starts from its "
            "predecessor's function. Alignment: distance to the predecessor's features; it starts at zero after exact "
            f"growth.{dashed}",
            lambda palette, shape: draw_losses(family, metrics, palette, shape),
        ),
        (
            "rates",
            "Learning rate and throughput",
            "The schedule as it was run, and the samples of the global batch that went through in a second.",
            lambda palette, shape: draw_rates(family, metrics, palette, shape),
        ),
    ]
    return found


def _drawn(pictures: list[tuple[str, str, str, Draw]]) -> list[Picture]:
    drawn = []
    for name, heading, caption, draw in pictures:
        wide, narrow = draw(THEMED, WIDE), draw(THEMED, NARROW)
        if wide is not None and narrow is not None:
            drawn.append(Picture(heading, caption, svg(wide, f"{name}-w"), svg(narrow, f"{name}-n")))
    return drawn


def _command(family: Family, run_dir: Path) -> str:
    command = family.ledger.get("command")
    if isinstance(command, list):
        return shlex.join(str(word) for word in command)
    if isinstance(command, str) and command:
        return command
    return f"compt train {shlex.quote(f'{run_dir.name}/recipe.yaml')} --run-dir NEW_RUN"
