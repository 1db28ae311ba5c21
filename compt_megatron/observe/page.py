"""The report as one HTML file that asks for nothing from anywhere."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from compt_megatron.observe import numbers, table
from compt_megatron.observe.family import Family
from compt_megatron.observe.figure import DARK, DARK_SERIES, LIGHT, LIGHT_SERIES, colour_index, css_variables
from compt_megatron.observe.lineage import draw_lineage
from compt_megatron.observe.verdict import Verdict


@dataclass(frozen=True)
class Picture:
    """A plot of the page: its heading, one sentence on how to read it, and its SVG for wide pages and for phones."""

    heading: str
    caption: str
    wide: str
    narrow: str


def render(family: Family, verdict: Verdict, pictures: Sequence[Picture], recipe: str | None, command: str) -> str:
    """The HTML document. `pictures`: the first is shown before the lineage, the others after the table."""
    sections = [
        _header(family, verdict),
        *(_figure(picture) for picture in pictures[:1]),
        _lineage(family),
        _table(family),
        _tasks(family),
        *(_figure(picture) for picture in pictures[1:]),
        _measured(family),
        _reproduce(family, recipe, command),
    ]
    title = escape(f"{family.name}: what the chain bought")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>\n{_css()}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main>\n</body>\n</html>\n"
    )


def _css() -> str:
    sheet = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
    for mark, colours, series in (("/*light*/", LIGHT, LIGHT_SERIES), ("/*dark*/", DARK, DARK_SERIES)):
        sheet = sheet.replace(mark, " ".join(f"--{name}: {value};" for value, name in css_variables(colours, series)))
    return sheet


def _header(family: Family, verdict: Verdict) -> str:
    done = [link for link in family.links if link.done]
    last = done[-1] if done else None
    spent = [link.wall_s for link in family.links if link.wall_s is not None]
    facts = [
        ("links trained", f"{len(done)} of {len(family.links)}"),
        ("largest model", numbers.human(last.parameters) if last else numbers.UNKNOWN),
        ("chain's compute", numbers.macs(last.macs_cumulative) if last else numbers.UNKNOWN),
        ("family speed-up, modelled", f"{ratio:.2f}x" if (ratio := family.speed_up) else numbers.UNKNOWN),
        ("chain's time", numbers.duration(sum(spent)) if spent else numbers.UNKNOWN),
    ]
    items = "".join(f"<div><dt>{name}</dt><dd>{escape(value)}</dd></div>" for name, value in facts)
    details = f'<p class="details">{_unbroken(" ".join(verdict.details))}</p>' if verdict.details else ""
    return (
        f'<header><h1>{escape(family.name)}</h1><p class="headline">{_unbroken(verdict.headline)}</p>{details}'
        f'<dl class="facts">{items}</dl></header>'
    )


def _unbroken(text: str) -> str:
    """Escaped, with numbers kept on one line with their units."""
    text = re.sub(r"(?<=\d) (?=%|points|times|[kMGTPE]? ?MACs)|(?<=[kMGTPE]) (?=MACs)", "\u00a0", text)
    return escape(re.sub(r"(top|Speed)-(?=1|5|up)", "\\1\u2011", text))


def _figure(picture: Picture) -> str:
    return (
        f'<section><h2>{escape(picture.heading)}</h2><p>{escape(picture.caption)}</p><figure role="img" '
        f'aria-label="{escape(picture.heading)}"><div class="wide">{picture.wide}</div>'
        f'<div class="narrow">{picture.narrow}</div></figure></section>'
    )


def _lineage(family: Family) -> str:
    tree = draw_lineage(family)
    caption = "Each model is grown from the one above it. The area of a disc is the model's number of parameters."
    return f"<section><h2>Lineage</h2><p>{caption}</p>{tree}</section>" if tree else ""


def _table(family: Family) -> str:
    rows = []
    for row in table.rows(family):
        colour = f"var(--s{colour_index(family, row.name)})"
        fill = "transparent" if row.control else colour
        swatch = f'<i class="swatch" style="border-color:{colour};background:{fill}"></i>'
        kind = " ".join(name for name, on in (("control", row.control), ("last", row.last)) if on)
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in row.cells[1:])
        rows.append(f'<tr class="{kind}"><td>{swatch}{escape(row.cells[0])}</td>{cells}</tr>')
    if not rows:
        return ""
    heads = "".join(f"<th>{_unbroken(heading)}</th>" for heading in table.headings(family))
    notes = "; ".join(f"{heading}: {meaning}" for _, heading, meaning in table.COLUMNS)
    return (
        f'<section><h2>Table</h2><div class="scroll"><table><thead><tr>{heads}</tr></thead>'
        f'<tbody>{"".join(rows)}</tbody></table></div><p class="note">{escape(notes)}.</p></section>'
    )


def _tasks(family: Family) -> str:
    """What lm-eval found of each model at its end."""
    cells = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in table.task_rows(family))
    body = "".join(f"<tr>{row}</tr>" for row in cells)
    if not body:
        return ""
    return (
        "<section><h2>Tasks</h2><p>By EleutherAI's lm-eval, on the exported models; ± is one standard error over the "
        f'documents.</p><div class="scroll"><table class="tasks"><thead><tr><th>Model</th><th>Task</th><th>Results</th>'
        f"</tr></thead><tbody>{body}</tbody></table></div></section>"
    )


def _measured(family: Family) -> str:
    """Every number of the final evaluations, for who wants more than the leading ones."""
    rows = []
    for member in family.members:
        for eval_set, values in member.evaluation.items():
            shown = ", ".join(f"{name} {_plain(value)}" for name, value in values.items())
            rows.append(f"<tr><td>{escape(member.name)}</td><td>{escape(eval_set)}</td><td>{escape(shown)}</td></tr>")
    if not rows:
        return ""
    body = f'<div class="scroll"><table><tbody>{"".join(rows)}</tbody></table></div>'
    return f"<section><details><summary>All final evaluation numbers</summary>{body}</details></section>"


def _reproduce(family: Family, recipe: str | None, command: str) -> str:
    ledger = family.ledger
    facts: dict[str, Any] = {"recipe hash": ledger.get("recipe_hash") or ledger.get("recipe_digest")}
    for group in ("environment", "versions", "machine"):
        facts |= ledger[group] if isinstance(ledger.get(group), dict) else {}
    items = "".join(
        f"<dt>{escape(str(name))}</dt><dd>{escape(_plain(value))}</dd>"
        for name, value in facts.items()
        if value is not None
    )
    text = f"<details><summary>The recipe</summary><pre>{escape(recipe)}</pre></details>" if recipe else ""
    listing = f'<dl class="plain">{items}</dl>' if items else ""
    return f"<section><h2>Run it again</h2><pre>{escape(command)}</pre>{text}{listing}</section>"


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_plain(inner)}" for name, inner in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_plain(inner) for inner in value)
    return (
        f"{value:.4g}"
        if isinstance(value, float) and not value.is_integer()
        else f"{value:.0f}"
        if isinstance(value, float)
        else str(value)
    )
