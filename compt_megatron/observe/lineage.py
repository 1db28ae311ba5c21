"""The family tree of a run as HTML: a node a model, its area by parameters, and what was measured at each growth."""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape
from pathlib import PurePath
from typing import Any

from compt_megatron.observe import numbers
from compt_megatron.observe.family import Family, Member, parity_of
from compt_megatron.observe.figure import colour_index

_SMALLEST, _LARGEST = 6.0, 21.0  # node radius in CSS pixels

_ARROW = '<i aria-hidden="true">↓</i>'


def draw_lineage(family: Family) -> str:
    """An ordered list with one entry a model, every growth between two of them; empty where there is no link."""
    entries: list[str] = []
    for link in family.links:
        if link.parent is not None:
            entries.append(_growth(link))
        entries.append(_node(family, link))
    entries += [_node(family, control) for control in family.controls]
    return f'<ol class="lineage">{"".join(entries)}</ol>' if entries else ""


def exactness(certificate: Mapping[str, Any]) -> str:
    """How many tensors came over exactly, in words: "exact: all 148 tensors"; empty without a record."""
    tensors = certificate.get("tensors")
    if not isinstance(tensors, dict) or not tensors:
        return ""
    kinds = [str(kind.get("kind", kind) if isinstance(kind, dict) else kind) for kind in tensors.values()]
    count = {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}
    if list(count) == ["exact"]:
        return f"exact: all {len(kinds)} tensors"
    return ", ".join(f"{number} {kind}" for kind, number in count.items()) + f" of {len(kinds)} tensors"


def _radius(family: Family, member: Member) -> float:
    most = max((other.parameters or 0.0 for other in family.members), default=0.0)
    if not most or not member.parameters:
        return _SMALLEST
    return max(_SMALLEST, _LARGEST * math.sqrt(member.parameters / most))


def _node(family: Family, member: Member) -> str:
    colour = f"var(--s{colour_index(family, member.name)})"
    radius = _radius(family, member)
    ring = 'stroke-dasharray="4 3" fill="var(--paper)"' if member.control else f'fill="{colour}"'
    circle = f'<circle r="{radius:.1f}" {ring} stroke="{colour}" stroke-width="2"/>'
    picture = f'<svg class="node" viewBox="-24 -24 48 48" aria-hidden="true">{circle}</svg>'
    facts = [f"{numbers.human(member.parameters)} parameters"] if member.parameters else []
    if member.model != member.name:
        facts.insert(0, escape(PurePath(member.model).stem))
    if member.control:
        facts.append(f"trained alone, from scratch, beside {escape(member.link)}" if member.link else "trained alone")
    elif member.parent is None:
        facts.append("the base: " + ("loaded, not trained here" if member.samples == 0 else "trained the ordinary way"))
    if not member.done:
        facts.append(escape(member.state))
    scores = [
        f"<b>{numbers.percent(member.score(name))}</b> {escape(name)}"
        for name in family.eval_sets[:1]
        if member.score(name) is not None
    ]
    kind = "control" if member.control else "link"
    detail = " · ".join([*facts, *scores])
    name = f'<strong style="color:{colour}">{escape(member.name)}</strong>'
    return f'<li class="{kind}">{picture}<div>{name}<span>{detail}</span></div></li>'


def _growth(link: Member) -> str:
    """The edge above a node: operator, exactness, measured parity, alignment before the first step."""
    certificate = link.certificate or {}
    if not certificate and link.state == "pending":
        return f'<li class="growth">{_ARROW}<div><span>not grown yet</span></div></li>'
    words = [f"grown by <b>{escape(str(certificate['operator']))}</b>" if certificate.get("operator") else "grown"]
    if certificate.get("depth"):
        words.append(f"depth {escape(str(certificate['depth']))}")
    if tensors := exactness(certificate):
        words.append(escape(tensors))
    parity = parity_of(certificate)
    words.append("parity not measured" if parity is None else f"measured parity {numbers.scientific(parity)}")
    if link.align_at_step0 is not None:
        words.append(f"alignment before the first step {numbers.scientific(link.align_at_step0)}")
    return f'<li class="growth">{_ARROW}<div><span>{" · ".join(words)}</span></div></li>'
