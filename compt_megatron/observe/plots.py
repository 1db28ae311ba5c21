"""The pictures of the report: accuracy over compute, losses, learning rate and throughput."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from compt_megatron.observe.family import LOWER_IS_BETTER, Family, Member
from compt_megatron.observe.figure import Label, Palette, colour_index, drawing, end_labels, free_labels, style
from compt_megatron.observe.numbers import scale_of
from compt_megatron.observe.verdict import METRIC_NAMES, curve_of, shown

Metrics = dict[str, dict[str, list[float]]]
_MANY = 40  # logged points from which a curve is smoothed, with its raw values faint behind it
_MOST = 500  # points of a curve in the page


@dataclass(frozen=True)
class Shape:
    """Where a plot goes: on a wide page panels lie side by side, on a phone one below the other."""

    name: str
    width: float  # inches
    panel_height: float
    side_by_side: bool
    label_room: float  # inches at the right for direct labels


WIDE = Shape("wide", 9.4, 4.2, True, 1.45)
NARROW = Shape("narrow", 4.0, 3.2, False, 1.0)


@dataclass(frozen=True)
class Curve:
    """One line of a plot with its direct label."""

    name: str
    xs: list[float]
    ys: list[float]
    control: bool
    label: str
    value: str = ""  # stands after the label, on a narrow plot under it
    smoothed: bool = True


def draw_accuracy(family: Family, eval_sets: Sequence[str], palette: Palette, shape: Shape) -> Any | None:
    """Leading metric over cumulative MACs for every link and control, one panel a set; None where no curve is known."""
    panels = [(name, curves) for name in eval_sets if (curves := _accuracy_curves(family, name))]
    if not panels:
        return None
    if len(panels) > 1:
        shape = replace(shape, panel_height=0.8 * shape.panel_height)
    with drawing() as figure_class:
        figure, all_axes = _panels(figure_class, len(panels), shape)
        for axes, (name, curves) in zip(all_axes, panels):
            most = max(x for curve in curves for x in curve.xs)
            factor, letter = scale_of(most)
            _draw_curves(axes, family, curves, palette, factor, markers=True)
            axes.set_xlabel(f"compute so far, predecessors included ({letter}MACs)")
            axes.set_xlim(0, most / factor * 1.02)
            metric = family.metric_of(name)
            if metric in LOWER_IS_BETTER:
                _lower_limits(axes, curves)
            else:
                axes.set_ylim(bottom=0)
                axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
            axes.set_title(f"{METRIC_NAMES[metric]}, {name}", color=palette.ink)
            style(axes, palette)
            _label_curves(axes, family, curves, palette, factor, shape)
    return figure


def _lower_limits(axes: Any, curves: Sequence[Curve]) -> None:
    """A metric whose best values are what matters, on a logarithmic axis: not up to an untrained model's."""
    low, ends = min(min(curve.ys) for curve in curves), max(curve.ys[-1] for curve in curves)
    top = max(2 * ends, 4 * low)
    axes.set_yscale("log")
    axes.set_ylim(low / 1.1, min(top, 1.1 * max(max(curve.ys) for curve in curves)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.3g}")
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:,.3g}")


def draw_losses(family: Family, metrics: Metrics, palette: Palette, shape: Shape) -> Any | None:
    """The task loss of every model over its steps and, in a second panel, the alignment parts; None without any."""
    task, align = [], []
    for member, columns in _logged(family, metrics):
        steps, parts = columns.get("step", []), [name for name in columns if name.startswith("loss/")]
        aligned = [name for name in parts if name.startswith("loss/align")]
        others = [name for name in parts if name not in aligned]
        towers = [name for name in aligned if name != "loss/align"]  # "loss/align" is their weighted sum
        task_name = others[0] if len(others) == 1 else "loss"
        task.append(_logged_curve(member, steps, columns.get(task_name), member.name))
        for name in towers or aligned:
            of = name.removeprefix("loss/align").strip("/_-. ")
            align.append(_logged_curve(member, steps, columns.get(name), f"{member.name} {of}".strip()))
    panels = [("task loss", _present(task)), ("alignment loss", _present(align))]
    return _over_steps(family, [panel for panel in panels if panel[1]], palette, shape)


def draw_rates(family: Family, metrics: Metrics, palette: Palette, shape: Shape) -> Any | None:
    """Learning rate and samples per second of every model over its steps; None where neither was logged."""
    panels = []
    for column, title in (("lr", "learning rate"), ("samples_per_s", "samples per second")):
        curves = [
            _logged_curve(member, columns.get("step", []), columns.get(column), member.name)
            for member, columns in _logged(family, metrics)
        ]
        panels.append((title, [replace(curve, smoothed=column != "lr") for curve in _present(curves)]))
    return _over_steps(family, [panel for panel in panels if panel[1]], palette, shape)


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Centred running median, narrower towards the ends: it keeps levels, edges, both ends, and drops outliers."""
    result = []
    for index in range(len(values)):
        half = min(window // 2, index, len(values) - 1 - index)
        near = sorted(values[max(0, index - half) : index + half + 1])
        result.append(near[len(near) // 2])
    return result


def thin(xs: Sequence[float], ys: Sequence[float], most: int = _MOST) -> tuple[list[float], list[float]]:
    """At most `most` points: the median of each run of neighbours, placed at the run's end."""
    run = -(-len(xs) // most)
    if run <= 1:
        return list(xs), list(ys)
    starts = range(0, len(xs), run)
    middles = [sorted(ys[start : start + run])[len(ys[start : start + run]) // 2] for start in starts]
    places = [xs[min(start + run, len(xs)) - 1] for start in starts]
    return places, middles


def _accuracy_curves(family: Family, eval_set: str) -> list[Curve]:
    curves = []
    for member in family.members:
        points = curve_of(member, eval_set)
        score, spent = member.score(eval_set), member.macs_cumulative
        if score is not None and spent is not None and (not points or points[-1][0] < spent * 0.999):
            points = [*points, (spent, score)]  # evaluated only at the end, into the ledger
        if points:
            xs, ys = [x for x, _ in points], [y for _, y in points]
            name = f"{member.link or member.name} alone" if member.control else member.name
            value = shown(family.metric_of(eval_set), ys[-1])
            curves.append(Curve(member.name, xs, ys, member.control, name, value))
    return curves


def _logged(family: Family, metrics: Metrics) -> Iterable[tuple[Member, dict[str, list[float]]]]:
    return ((member, metrics[member.name]) for member in family.members if member.name in metrics)


def _logged_curve(member: Member, steps: list[float], values: list[float] | None, label: str) -> Curve | None:
    points = [(x, y) for x, y in zip(steps, values or []) if math.isfinite(x) and math.isfinite(y)]
    return Curve(member.name, [x for x, _ in points], [y for _, y in points], member.control, label) if points else None


def _present(curves: Iterable[Curve | None]) -> list[Curve]:
    return [curve for curve in curves if curve is not None]


def _over_steps(
    family: Family, panels: Sequence[tuple[str, list[Curve]]], palette: Palette, shape: Shape
) -> Any | None:
    if not panels:
        return None
    with drawing() as figure_class:
        figure, all_axes = _panels(figure_class, len(panels), shape)
        for axes, (title, curves) in zip(all_axes, panels):
            most = max(curve.xs[-1] for curve in curves)
            _draw_curves(axes, family, curves, palette, 1.0, markers=False)
            axes.set_xlim(0, most * 1.02)
            _limits(axes, curves)
            axes.set_xlabel("step of this model")
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
            axes.locator_params(axis="x", nbins=6)
            if title == "learning rate":
                axes.yaxis.set_major_formatter(lambda value, _: f"{value:.1e}" if value else "0")
            axes.set_title(title, color=palette.ink)
            style(axes, palette)
            _label_curves(axes, family, curves, palette, 1.0, shape)
    return figure


def _limits(axes: Any, curves: Sequence[Curve]) -> None:
    """From zero, and not up to a spike of the first steps that would flatten all the rest."""
    values = sorted(y for curve in curves for y in _shown(curve)[1])
    top = values[min(len(values) - 1, int(0.995 * len(values)))]
    axes.set_ylim(0, 1.08 * top if top > 0 else 1.0)


def _shown(curve: Curve) -> tuple[list[float], list[float]]:
    """The points of a curve as drawn: thinned out where there are more than a screen has pixels, and smoothed."""
    xs, ys = thin(curve.xs, curve.ys)
    return xs, smooth(ys, max(3, len(ys) // 40) | 1) if curve.smoothed and len(ys) >= _MANY else ys


def _draw_curves(
    axes: Any, family: Family, curves: Sequence[Curve], palette: Palette, factor: float, markers: bool
) -> None:
    for curve in curves:
        colour = palette.series[colour_index(family, curve.name)]
        xs, ys = _shown(curve)
        xs = [x / factor for x in xs]
        if curve.smoothed and len(ys) >= _MANY:
            axes.plot(xs, thin(curve.xs, curve.ys)[1], color=colour, linewidth=0.7, alpha=0.28)
        marker = {"marker": "o", "markersize": 4.2 if len(xs) <= 20 else 2.6} if markers or len(xs) == 1 else {}
        hollow = {"markerfacecolor": palette.paper} if marker and curve.control else {}
        line = {"linestyle": (0, (4, 2.2)), "linewidth": 1.5} if curve.control else {}
        axes.plot(xs, ys, color=colour, zorder=2 if curve.control else 3, **marker, **hollow, **line)


def _label_curves(
    axes: Any, family: Family, curves: Sequence[Curve], palette: Palette, factor: float, shape: Shape
) -> None:
    """Labels at the ends of the curves: beside the axes where those reach the right edge, else where there is room."""
    right = axes.get_xlim()[1]
    beside: list[Label] = []
    inside: list[Label] = []
    between = " " if shape.side_by_side else "\n"
    for curve in curves:
        colour = palette.series[colour_index(family, curve.name)]
        xs, ys = _shown(curve)
        label = Label(xs[-1] / factor, ys[-1], f"{curve.label}{between}{curve.value}".strip(), colour)
        (beside if label.x >= 0.9 * right else inside).append(label)
    end_labels(axes, beside)
    drawn = [[(x / factor, y) for x, y in zip(*_shown(curve))] for curve in curves]
    free_labels(axes, inside, drawn)


def _panels(figure_class: Any, count: int, shape: Shape) -> tuple[Any, list[Any]]:
    """A figure with `count` panels, room for labels at the right of each."""
    columns = min(count, 2) if shape.side_by_side else 1
    lines = -(-count // columns)
    height = shape.panel_height * lines
    figure = figure_class(figsize=(shape.width, height))
    left, bottom, top = 0.6, 0.55, 0.45
    room = shape.label_room if columns == 1 else shape.label_room * 0.85
    width = (shape.width - columns * (left + room)) / columns
    panel = (height - lines * (bottom + top)) / lines
    axes = []
    for index in range(count):
        line, column = divmod(index, columns)
        x = column * (left + width + room) + left
        y = height - (line + 1) * (top + panel + bottom) + bottom
        axes.append(figure.add_axes((x / shape.width, y / height, width / shape.width, panel / height)))
    return figure, axes
