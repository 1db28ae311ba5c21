"""The table at the end of a run: one row a model, the same on the console, in the report and as JSON and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from compt_megatron.observe import numbers
from compt_megatron.observe.family import LOWER_IS_BETTER, Family, Member

# key, heading, what it is
COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("parameters", "Params", "parameters of the whole model"),
    ("samples", "Samples", "seen in training, this model alone"),
    ("macs_total", "MACs", "spent on this model: training and teacher"),
    ("macs_cumulative", "MACs so far", "with all of its predecessors"),
    ("wall_s", "Time", "wall-clock, h:mm:ss"),
    ("alone_ratio", "Speed-up", "modelled: MACs of training it alone for the base's samples, over its MACs here"),
)


@dataclass(frozen=True)
class Row:
    """One model: raw `values` by column key, `cells` of text in the order of the headings."""

    name: str
    control: bool
    last: bool
    values: dict[str, Any]
    cells: tuple[str, ...]


def headings(family: Family) -> tuple[str, ...]:
    """The headings over the cells of `rows`."""
    scores = (_set_heading(family, name) for name in family.eval_sets)
    return ("Model", *(heading for _, heading, _ in COLUMNS), *scores)


def rows(family: Family) -> list[Row]:
    """Links in order, each followed by its controls; controls of no link at the end."""
    ordered: list[Member] = []
    for link in family.links:
        ordered += [link, *family.controls_of(link)]
    ordered += [control for control in family.controls if control not in ordered]
    return [_row(family, member) for member in ordered]


def as_dicts(family: Family) -> list[dict[str, Any]]:
    """The rows with raw numbers (MACs, seconds, fractions), for report.json and report.csv."""
    return [row.values for row in rows(family)]


def as_csv(family: Family) -> str:
    """The rows as CSV with a header line; an unknown number is an empty field."""
    records = as_dicts(family)
    names = list(dict.fromkeys(key for record in records for key in record))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def task_rows(family: Family) -> list[tuple[str, str, str]]:
    """(model, task, results) of every task of lm-eval, models in the order of `rows`."""
    return [
        (member.name, task, ", ".join(task_words(values)))
        for member in family.members
        for task, values in member.tasks.items()
    ]


def task_words(values: Mapping[str, float]) -> list[str]:
    """Each metric that lm-eval gives of a task, such as `acc 0.2512 ± 0.0031`, and of how many documents they are."""
    words = []
    for metric, value in values.items():
        name, _, kind = metric.partition(",")
        if metric in ("samples", "shots") or name.endswith("_stderr"):
            continue
        error = values.get(f"{name}_stderr" + (f",{kind}" if kind else ""))
        words.append(f"{metric} {value:.4f}" + ("" if error is None else f" ± {error:.4f}"))
    if (samples := values.get("samples")) is not None:
        words.append(f"{samples:,.0f} documents")
    return words


def _row(family: Family, member: Member) -> Row:
    last = bool(family.links) and (member is family.links[-1] or member.link == family.links[-1].name)
    values: dict[str, Any] = {
        "name": member.name,
        "model": member.model,
        "kind": "control" if member.control else "link",
        "control_of": member.link,
        "parent": member.parent,
        "state": member.state,
        **{key: getattr(member, key) for key, _, _ in COLUMNS},
        "macs_train": member.macs_train,
        "macs_teacher": member.macs_teacher,
        "steps": member.steps,
        "final_loss": member.final_loss,
        "align_at_step0": member.align_at_step0,
    }
    for name, metrics in (*member.evaluation.items(), *member.tasks.items()):
        values |= {f"{name}/{metric}": value for metric, value in metrics.items()}
    label = f"{member.name} (alone)" if member.control and "alone" not in member.name else member.name
    if not member.done:
        label += f", {member.state}"
    cells = (
        label,
        numbers.human(member.parameters),
        numbers.human(member.samples),
        numbers.human(member.macs_total),
        numbers.human(member.macs_cumulative),
        numbers.duration(member.wall_s),
        numbers.UNKNOWN if member.alone_ratio is None else f"{member.alone_ratio:.2f}x",
        *(_score_cell(family, member, name) for name in family.eval_sets),
    )
    return Row(member.name, member.control, last, values, cells)


# leading metric: the two that a cell shows, and its heading
_CELLS = {
    "top1": (("top1", "top5"), "% top-1 / top-5"),
    "i2t_r1": (("i2t_r1", "t2i_r1"), "% R@1 i>t / t>i"),
    "t2i_r1": (("i2t_r1", "t2i_r1"), "% R@1 i>t / t>i"),
    "perplexity": (("perplexity", "bits_per_byte"), "perplexity / bits per byte"),
}


def _set_heading(family: Family, eval_set: str) -> str:
    return f"{eval_set}, {_CELLS[family.metric_of(eval_set)][1]}"


def _score_cell(family: Family, member: Member, eval_set: str) -> str:
    pair, _ = _CELLS[family.metric_of(eval_set)]
    values = member.evaluation.get(eval_set, {})
    if not any(metric in values for metric in pair):
        return numbers.UNKNOWN
    return "/".join(_value(metric, values.get(metric)) for metric in pair)


def _value(metric: str, value: float | None) -> str:
    if value is None:
        return numbers.UNKNOWN
    return numbers.decimal(value) if metric in LOWER_IS_BETTER else f"{100 * value:.1f}"
