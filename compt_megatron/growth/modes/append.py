"""Mode `append`: add attention heads or MLP units that are silent at first."""

from __future__ import annotations

from math import sqrt

from compt_megatron.growth.segments import FREE, ZERO, Segment, Site, leading, per_head


class Append:
    """New units get fresh input weights and biases; their columns in the output projection are 0.

    Exact for any ratio: a new unit contributes nothing until its output column has learned, and the gradient of that
    column is not zero. Where the head size grows too (no rotary positions here), head h keeps its place as head h:
    q times sqrt(hd' / hd) makes up for attention's 1 / sqrt(hd'), new key rows and biases are 0 so that new query
    entries meet nothing, new value rows are free and their output columns 0.

    Source: LEMON (arXiv 2310.07999) and Staged Training (arXiv 2203.06211) zero the outputs of new units; the head size
    rule follows from softmax(q kᵀ / sqrt(hd)).
    """

    name = "append"
    axes = frozenset({"heads", "mlp"})
    exact = True

    def segments(self, site: Site) -> list[Segment]:
        if site.axis != "heads":
            return leading(site, ZERO if site.role == "read" else FREE)
        assert site.source is not None
        assert site.target is not None
        if site.role == "read":
            return per_head(site, ZERO, ZERO)
        if ".attn.q_proj." in site.param.name:
            return per_head(site, FREE, FREE, sqrt(site.target.head_dim / site.source.head_dim))
        return per_head(site, ZERO if ".attn.k_proj." in site.param.name else FREE, FREE)
