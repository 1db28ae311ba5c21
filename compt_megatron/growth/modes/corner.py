"""Mode `corner`: old values in the leading corner, everything new fresh. Not exact."""

from __future__ import annotations

from compt_megatron.growth.segments import FREE, Segment, Site, leading, per_head


class Corner:
    """target[:n] = source, target[n:] = a fresh model's values, on any axis and for every role.

    Heads stay aligned: q, k and v are grown apart, and where the head size grows each head fills the leading part of
    its own target head. Not exact: new units speak at once, and LayerNorm sees another mean and variance. Source:
    inverse weight initialisation as the text of CoM-PT (arXiv 2604.12391) has it; what its published code does
    instead is operator `reference`.
    """

    name = "corner"
    axes = frozenset({"embed", "heads", "mlp", "joint"})
    exact = False

    def segments(self, site: Site) -> list[Segment]:
        if site.axis == "heads":
            return per_head(site, FREE, FREE)
        return leading(site, FREE)
