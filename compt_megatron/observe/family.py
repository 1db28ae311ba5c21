"""A run folder as the report sees it: links and controls, their curves and compute, any of it possibly unfinished."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compt_megatron.errors import UserError
from compt_megatron.recipe.files import read_json

LEDGER_FILE = "chain.json"
EVALUATION_FILE = "evaluation.jsonl"
DONE_STATES = ("trained", "done")
LEADING_METRICS = ("top1", "i2t_r1", "t2i_r1", "perplexity")  # what a set is judged by: the first of these that it has
LOWER_IS_BETTER = ("perplexity", "bits_per_byte")  # of a language model; the others are fractions

Evaluation = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Point:
    """One evaluation of a model while it trains; `macs` is cumulative over the chain, predecessors included."""

    step: int
    macs: float
    metrics: Evaluation


@dataclass
class Member:
    """One model of the run: a link of the chain, or a control (the same model trained alone)."""

    name: str
    model: str
    control: bool
    link: str | None  # of a control: the link it is compared with
    parent: str | None
    state: str
    parameters: float | None
    steps: float | None
    samples: float | None
    macs_train: float | None
    macs_teacher: float | None
    macs_total: float | None  # this member alone
    macs_cumulative: float | None  # with all of its predecessors
    wall_s: float | None
    final_loss: float | None
    align_at_step0: float | None
    alone_ratio: float | None  # modelled: MACs of training it alone for the base's samples / MACs it took here
    certificate: dict[str, Any] | None
    evaluation: Evaluation = field(default_factory=dict)
    tasks: Evaluation = field(default_factory=dict)  # of lm-eval, at the end
    curve: list[Point] = field(default_factory=list)

    @property
    def done(self) -> bool:
        return self.state in DONE_STATES

    def score(self, eval_set: str) -> float | None:
        """The leading metric on `eval_set` at the end; None where it was not measured."""
        metric = leading_metric(self.evaluation.get(eval_set, {}))
        return self.evaluation[eval_set][metric] if metric else None


@dataclass
class Family:
    """The whole run."""

    name: str
    links: list[Member]
    controls: list[Member]
    ledger: dict[str, Any]

    @property
    def members(self) -> list[Member]:
        return [*self.links, *self.controls]

    @property
    def eval_sets(self) -> list[str]:
        """The evaluation sets of the run that have a leading metric, in the order in which they were first recorded."""
        seen: dict[str, None] = {}
        for member in self.members:
            for metrics in (member.evaluation, *(point.metrics for point in member.curve)):
                seen |= {name: None for name, values in metrics.items() if leading_metric(values)}
        return list(seen)

    @property
    def speed_up(self) -> float | None:
        """Modelled, of the family: MACs of training every link alone for the base's samples, over MACs here."""
        if not self.links or any(link.alone_ratio is None or link.macs_total is None for link in self.links):
            return None
        alone = sum((link.alone_ratio or 0.0) * (link.macs_total or 0.0) for link in self.links)
        return alone / sum(link.macs_total or 0.0 for link in self.links)

    def controls_of(self, link: Member) -> list[Member]:
        """The controls to compare `link` with."""
        return [control for control in self.controls if control.link == link.name]

    def metric_of(self, eval_set: str) -> str:
        """The metric that `eval_set` is judged by in this run."""
        for member in self.members:
            for metrics in (member.evaluation, *(point.metrics for point in member.curve)):
                if (metric := leading_metric(metrics.get(eval_set, {}))) is not None:
                    return metric
        return LEADING_METRICS[0]


def leading_metric(values: Mapping[str, float]) -> str | None:
    """What an evaluation set is judged by: zero-shot top-1, else retrieval recall at 1; of text, perplexity."""
    return next((metric for metric in LEADING_METRICS if metric in values), None)


def gain(metric: str, ours: float, theirs: float) -> float:
    """By how much `ours` is better than `theirs`: above 0 where it is."""
    return theirs - ours if metric in LOWER_IS_BETTER else ours - theirs


def parity_of(certificate: Mapping[str, Any]) -> float | None:
    """The largest measured relative difference of features that a certificate records; None where none was measured.

    The record is a number, or a mapping with a number for each of "image", "text", "vision", "logits" or under names
    with "relative" in them; its other fields (row counts, tolerances) are not differences.
    """
    found: list[float] = []

    def collect(value: Any, named: bool) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                name = str(key)
                difference = "relative" in name or name in ("image", "text", "vision", "logits")
                collect(inner, difference and "tolerance" not in name)
        elif named and (number := _number(value)) is not None:
            found.append(number)

    collect(certificate.get("parity"), True)
    return max(found, default=None)


def read_family(run_dir: Path) -> Family:
    """The run in `run_dir`. Raises UserError where there is none; missing keys of an unfinished run are None."""
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such run folder; give the folder that `compt train --run-dir` wrote")
    path = run_dir / LEDGER_FILE
    if not path.is_file():
        raise UserError(f"{run_dir}: no {LEDGER_FILE} in it; give the run folder that `compt train` wrote")
    return family_of(read_json(path), run_dir)


def family_of(ledger: Mapping[str, Any], run_dir: Path | None = None) -> Family:
    """The run of a ledger, with the curves that lie in `run_dir`."""
    raw_links = _entries(ledger, "links")
    links: list[Member] = []
    by_name: dict[str, Member] = {}
    for index, raw in enumerate(raw_links):
        name = _name(raw, f"link {index}")
        parent = _parent(raw, links)
        before = _before(raw, by_name, parent)
        member = _member(raw, name, False, None, parent, before, run_dir)
        member.alone_ratio = _alone_ratio(member, links[0] if links else member)
        links.append(member)
        by_name[name] = member
    controls = []
    for index, raw in enumerate(_entries(ledger, "controls")):
        name = _name(raw, f"control {index}")
        controls.append(_member(raw, name, True, _controlled(raw, links), None, 0.0, run_dir))
    return Family(str(ledger.get("name") or "chain"), links, controls, dict(ledger))


def _entries(ledger: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    value = ledger.get(key) or []
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def _name(raw: Mapping[str, Any], default: str) -> str:
    return str(raw.get("name") or default)


def _parent(raw: Mapping[str, Any], earlier: Sequence[Member]) -> str | None:
    """The link that this one grew from: the one it names, none if it says null, else the one before it."""
    named = raw.get("parent", "")
    if not earlier or named is None:
        return None
    return str(named) if named in {link.name for link in earlier} else earlier[-1].name


def _before(raw: Mapping[str, Any], by_name: Mapping[str, Member], parent: str | None) -> float | None:
    """MACs spent before a link starts, as it recorded them or by its predecessors; None where those are not known."""
    if (recorded := _number(raw.get("chain_macs_before"))) is not None and raw.get("macs"):
        return recorded
    return by_name[parent].macs_cumulative if parent else 0.0


def _controlled(raw: Mapping[str, Any], links: Sequence[Member]) -> str | None:
    """The link a control stands beside: the one it names, by field or in its own name, else the last of its model."""
    names = {link.name for link in links}
    for named in (raw.get("link"), str(raw.get("name")).removesuffix("-alone")):
        if named in names:
            return str(named)
    same = [link.name for link in links if link.model == raw.get("model")]
    return same[-1] if same else None


def _member(
    raw: Mapping[str, Any],
    name: str,
    control: bool,
    link: str | None,
    parent: str | None,
    before: float | None,
    run_dir: Path | None,
) -> Member:
    cost = raw.get("macs")
    cost = cost if isinstance(cost, dict) else {"total": cost}
    train, teacher, total = (_number(cost.get(key)) for key in ("train", "teacher", "total"))
    if total is None and train is not None:
        total = train + (teacher or 0.0) + (_number(cost.get("grow")) or 0.0)
    certificate = raw.get("certificate")
    member = Member(
        name=name,
        model=str(raw.get("model") or name),
        control=control,
        link=link,
        parent=parent,
        state=str(raw.get("state") or "pending"),
        parameters=_number(raw.get("parameters")) or None,  # 0: not known yet
        steps=_number(raw.get("steps")),
        samples=_number(raw.get("samples")),
        macs_train=train,
        macs_teacher=teacher,
        macs_total=total,
        macs_cumulative=None if before is None or total is None else before + total,
        wall_s=_number(raw.get("wall_s")),
        final_loss=_number(raw.get("final_loss")),
        align_at_step0=_total(raw.get("align_at_step0")),
        alone_ratio=None,
        certificate=certificate if isinstance(certificate, dict) else None,
        evaluation=_evaluation(raw.get("evaluation")),
        tasks=_evaluation(raw.get("tasks")),
    )
    if run_dir is not None:
        member.curve = _curve(run_dir / name / EVALUATION_FILE, member, before)
    if not member.evaluation and member.done and member.curve:
        member.evaluation = member.curve[-1].metrics
    return member


def _curve(path: Path, member: Member, before: float | None) -> list[Point]:
    """The evaluations of one member; a point without "macs" is placed by its share of the member's steps."""
    points: list[Point] = []
    for raw in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            row = json.loads(raw)
        except json.JSONDecodeError:
            continue  # a line that a kill left half-written
        step = _number(row.get("step")) if isinstance(row, dict) else None
        if step is None:
            continue
        spent = _number(row.get("macs"))
        if spent is None and member.steps and member.macs_total is not None and before is not None:
            spent = before + member.macs_total * step / member.steps
        metrics = _evaluation(row.get("metrics"))
        if spent is None or not metrics:
            continue
        while points and points[-1].step >= step:  # resumed: the later line counts
            points.pop()
        points.append(Point(int(step), spent, metrics))
    return points


def _evaluation(raw: Any) -> Evaluation:
    """{set: {metric: number}} without anything else that a record may hold."""
    found: Evaluation = {}
    for name, values in raw.items() if isinstance(raw, dict) else ():
        if isinstance(values, dict):
            numbers = {str(key): number for key, value in values.items() if (number := _number(value)) is not None}
            if numbers:
                found[str(name)] = numbers
    return found


def _alone_ratio(member: Member, base: Member) -> float | None:
    """How much dearer the ordinary way is: this model trained alone for as many samples as the base was."""
    if not (member.done and base.done):
        return None
    if not (member.samples and base.samples and member.macs_train and member.macs_total):
        return None
    return member.macs_train / member.samples * base.samples / member.macs_total


def _total(value: Any) -> float | None:
    """A number, or the sum of a mapping's numbers (one a tower)."""
    if not isinstance(value, Mapping):
        return _number(value)
    known = [number for inner in value.values() if (number := _number(inner)) is not None]
    return sum(known) if known else None


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)
