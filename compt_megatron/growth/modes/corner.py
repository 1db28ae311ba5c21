"""Mode `corner`: old values in the leading corner, everything new fresh. Not exact."""

from __future__ import annotations

from compt_megatron.growth.heads import appended, head_segments, units
from compt_megatron.growth.segments import FREE, Segment, Site, leading


class Corner:
    """target[:n] = source, target[n:] = a fresh model's values, on any axis and for every role.

    Heads stay aligned: q, k and v are grown apart, heads keep their query group, and where the head size grows each
    head fills the leading part of its own target head. Not exact: new units speak at once, and norms see another mean
    and variance. Source: inverse weight initialisation as the text of CoM-PT (arXiv 2604.12391) has it; what its
    published code does instead is operator `reference`.
    """

    name = "corner"
    axes = frozenset({"embed", "heads", "kv_heads", "head_dim", "mlp", "joint"})
    exact = False

    def segments(self, site: Site) -> list[Segment]:
        if site.axis not in ("heads", "kv_heads"):
            return leading(site, FREE)
        assert site.source is not None
        assert site.target is not None
        sources = units(site, appended(site.source, site.target, site.param.name))
        return head_segments(site, sources, FREE, FREE, Segment(0, 0, "old"))
