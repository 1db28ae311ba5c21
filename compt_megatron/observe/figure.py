"""How every plot looks: colours a link keeps on the whole page, direct labels, SVG that follows the page's theme."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from compt_megatron.errors import UserError
from compt_megatron.observe.family import Family

# Told apart under the common colour-vision deficiencies (after Okabe and Ito 2008), darkened until text in them reads
# on white (contrast of at least 4.5) and lightened likewise for a dark page.
LIGHT_SERIES = ("#0a63a8", "#b84a00", "#00755a", "#9a3a7b", "#7d6200", "#2d6e8e", "#5b4fb3", "#5a5a5a")
DARK_SERIES = ("#6cb4f5", "#f79256", "#4fd0a5", "#e795cb", "#e2c553", "#8fd3ee", "#b3a8ff", "#c4c4c4")
LIGHT = {"ink": "#1d2129", "muted": "#5f6672", "grid": "#e3e6ea", "paper": "#ffffff"}
DARK = {"ink": "#e8eaee", "muted": "#a0a8b4", "grid": "#313742", "paper": "#15181d"}

# An SVG is drawn in stand-in colours that are then replaced by the page's CSS variables.
_STAND_INS = {name: f"#0100{index:02x}" for index, name in enumerate(LIGHT)}
_STAND_IN_SERIES = tuple(f"#0200{index:02x}" for index in range(len(LIGHT_SERIES)))

_TEXT_POINTS = 9.5  # size of all text in a plot
_TEXT_ASPECT = 0.6  # mean width of a character over the size, in a wide font


@dataclass(frozen=True)
class Palette:
    """The colours one drawing uses."""

    ink: str
    muted: str
    grid: str
    paper: str
    series: tuple[str, ...]


PRINT = Palette(**LIGHT, series=LIGHT_SERIES)
THEMED = Palette(**_STAND_INS, series=_STAND_IN_SERIES)


@dataclass(frozen=True)
class Label:
    """A direct label: `text` for the curve that ends at (x, y)."""

    x: float
    y: float
    text: str
    color: str


def colour_index(family: Family, name: str) -> int:
    """The place in the series of a link, the same on the whole page; a control has its link's."""
    links = [link.name for link in family.links]
    control = next((control for control in family.controls if control.name == name), None)
    of = control.link if control is not None and control.link else name
    index = links.index(of) if of in links else len(links)
    return index % len(LIGHT_SERIES)


@contextmanager
def drawing() -> Iterator[Any]:
    """matplotlib with the page's settings, without pyplot's global state. Raises UserError where it is missing."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("the report's plots need matplotlib: pip install 'compt-megatron[train]'") from error
    settings = {
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": _TEXT_POINTS,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "axes.titlelocation": "left",
        "axes.titlesize": 10.5,
        "axes.titleweight": "bold",
        "axes.titlepad": 10,
        "grid.linewidth": 0.8,
        "ytick.major.size": 0,
        "lines.linewidth": 1.8,
        "lines.solid_capstyle": "round",
    }
    with matplotlib.rc_context(settings):
        yield Figure


def style(axes: Any, palette: Palette) -> None:
    """The palette on one pair of axes."""
    axes.set_facecolor("none")
    axes.tick_params(colors=palette.muted, labelcolor=palette.muted)
    axes.spines["bottom"].set_color(palette.muted)
    axes.grid(True, axis="y", color=palette.grid)
    axes.xaxis.label.set_color(palette.muted)


def end_labels(axes: Any, labels: Sequence[Label]) -> None:
    """Labels right of the axes at the height of their curves' ends, moved apart until they do not touch.

    Call it when the limits of the axes are final; the figure leaves room at the right.
    """
    scale = 72 / axes.figure.dpi  # pixels to points
    low, high = axes.transData.transform([(0, edge) for edge in axes.get_ylim()])[:, 1] * scale
    wanted = [axes.transData.transform((0, label.y))[1] * scale for label in labels]
    lines = max((label.text.count("\n") + 1 for label in labels), default=1)
    for label, place, own in zip(labels, apart(wanted, 1.25 * _TEXT_POINTS * lines, low, high), wanted):
        axes.annotate(
            label.text,
            (label.x, label.y),
            xycoords="data",
            xytext=(8, place - own),
            textcoords="offset points",
            va="center",
            ha="left",
            color=label.color,
            annotation_clip=False,
        )


def free_labels(axes: Any, labels: Sequence[Label], drawn: Sequence[Sequence[tuple[float, float]]]) -> None:
    """Labels of curves that end inside the axes, each where it covers least of the lines `drawn` and other labels."""
    scale = 72 / axes.figure.dpi
    points = [point for line in drawn for point in _dense(axes.transData.transform(line) * scale)]
    area = axes.get_window_extent()
    left, right, low, high = (edge * scale for edge in (area.x0, area.x1, area.y0, area.y1 + _TEXT_POINTS / scale))
    taken: list[tuple[float, float, float, float]] = []
    for label in labels:
        x, y = axes.transData.transform((label.x, label.y)) * scale
        lines = label.text.split("\n")
        width, height = _TEXT_ASPECT * _TEXT_POINTS * max(map(len, lines)), 1.25 * _TEXT_POINTS * len(lines)
        best: tuple[float, tuple[float, float]] | None = None
        for number, (dx, dy) in enumerate(_offsets(width, height)):
            box = (x + dx, y + dy - height / 2, x + dx + width, y + dy + height / 2)
            cost = sum(box[0] <= px <= box[2] and box[1] <= py <= box[3] for px, py in points)
            cost += 100 * sum(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken)
            cost += 100 * (box[0] < left or box[2] > right or box[1] < low or box[3] > high)
            if best is None or cost + number / 1000 < best[0]:
                best = (cost + number / 1000, (dx, dy))
        assert best is not None
        dx, dy = best[1]
        taken.append((x + dx, y + dy - height / 2, x + dx + width, y + dy + height / 2))
        axes.annotate(
            label.text,
            (label.x, label.y),
            xytext=(dx, dy),
            textcoords="offset points",
            va="center",
            ha="left",
            color=label.color,
        )


def _dense(line: Any, spacing: float = 3.0) -> Iterator[tuple[float, float]]:
    """Points on the line through the points `line`, at most `spacing` apart."""
    for (x0, y0), (x1, y1) in pairwise([*line, line[-1]]):
        count = max(1, math.ceil(math.hypot(x1 - x0, y1 - y0) / spacing))
        for part in range(count):
            yield x0 + (x1 - x0) * part / count, y0 + (y1 - y0) * part / count


def _offsets(width: float, height: float) -> Iterator[tuple[float, float]]:
    """Places of a label's left middle around the end of its curve, best first, in points."""
    for rise in (0.0, -1.0, 1.0, -2.0, 2.0, -3.0, 3.0):
        gap = 7 if rise == 0 else 3
        yield gap, rise * height
        if rise:
            yield -width / 2, rise * height
            yield -width - gap, rise * height


def apart(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """`wanted` moved as little as is simple so that neighbours keep `gap`; within [low, high] where there is room."""
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    places: list[float] = []
    for index in order:
        place = min(max(wanted[index], low), high)
        places.append(max(place, places[-1] + gap) if places else place)
    ceiling = high
    for position in range(len(places) - 1, -1, -1):
        places[position] = min(places[position], ceiling)
        ceiling = places[position] - gap
    moved = [0.0] * len(wanted)
    for index, place in zip(order, places):
        moved[index] = place
    return moved


def png(figure: Any) -> bytes:
    """The figure as PNG on white, for slides and mail."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=170, facecolor=PRINT.paper, metadata={"Software": None})
    return file.getvalue()


def svg(figure: Any, prefix: str) -> str:
    """The figure as inline SVG in the page's colours and font; its ids start with `prefix` (a page has many)."""
    import matplotlib

    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": prefix}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = text.replace('href="#', f'href="#{prefix}-').replace("url(#", f"url(#{prefix}-")
    text = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--sans)", text)
    text = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', text, count=1)
    for stand_in, variable in css_variables(_STAND_INS, _STAND_IN_SERIES):
        text = text.replace(stand_in, f"var(--{variable})")
    return re.sub(r"\n\s*", "\n", text)


def css_variables(colours: Mapping[str, str], series: Sequence[str]) -> list[tuple[str, str]]:
    """(colour, CSS variable name) of a palette."""
    return [(value, name) for name, value in colours.items()] + [(value, f"s{i}") for i, value in enumerate(series)]
