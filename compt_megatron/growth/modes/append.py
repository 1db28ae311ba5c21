"""Mode `append`: add attention heads, query groups or MLP units that are silent at first."""

from __future__ import annotations

from math import sqrt

from compt_megatron.errors import UserError
from compt_megatron.growth.heads import appended, head_segments, units
from compt_megatron.growth.segments import FREE, ZERO, Segment, Site, leading

# scalings whose frequencies depend on the index within the head relative to its size alone
_ROTARY_KEPT = ("default", "linear", "llama3")


class Append:
    """New units get fresh input weights and biases; their columns in the output projection are 0.

    Exact for any ratio: a new unit contributes nothing until its output column has learned, and the gradient of that
    column is not zero.

    Heads keep their query group: with r -> r' heads a group head h becomes (h // r) r' + h % r, new groups are added
    whole; where r' < r (MQA to GQA), a group becomes several with the same key and value (`heads.appended`).

    Where the head size grows (hd -> hd'), q times sqrt(hd' / hd) makes up for attention's 1 / sqrt(hd'), new key rows
    and biases are 0 so that new query entries meet nothing, new query and value rows are free and the output columns of
    the latter 0. Without rotary positions any ratio will do. With them, query and key entry i turns with frequency
    theta^(-2i/hd), so k = hd' / hd must be whole and entry i goes to k i in the first half, to hd'/2 + k (i - hd/2) in
    the second; exact for the default, linear and llama3 scalings.

    Source: LEMON (arXiv 2310.07999) and Staged Training (arXiv 2203.06211) zero the outputs of new units; the head size
    rules follow from softmax(q kᵀ / sqrt(hd)) and RoPE (arXiv 2104.09864).
    """

    name = "append"
    axes = frozenset({"heads", "kv_heads", "mlp"})
    exact = True

    def segments(self, site: Site) -> list[Segment]:
        if site.axis == "mlp":
            return leading(site, ZERO if site.role == "read" else FREE)
        assert site.source is not None
        assert site.target is not None
        found = appended(site.source, site.target, site.param.name)
        sources, part = units(site, found), site.param.part
        if site.role == "read":
            return head_segments(site, sources, ZERO, ZERO, OLD)
        if part == "v":
            return head_segments(site, sources, FREE, FREE, _shared(found.spread))
        places = _rotary_places(site) if site.target.rope is not None else None
        if part == "k":
            return head_segments(site, sources, ZERO, FREE, _shared(found.spread), places)
        scale = sqrt(site.target.head_dim / site.source.head_dim)
        return head_segments(site, sources, FREE, FREE, Segment(0, 0, "old", scale=scale), places)


OLD = Segment(0, 0, "old")


def _shared(spread: int) -> Segment:
    """Keys and values that several groups have copies of: the gradient is the sum of what the copies get."""
    return Segment(0, 0, "old", gradient=1 / spread)


def _rotary_places(site: Site) -> list[int] | None:
    """Where each entry of a query or key head goes so that it turns as before; None: it stays."""
    assert site.source is not None
    assert site.target is not None
    rope = site.target.rope
    assert rope is not None
    old, new = site.source.head_dim, site.target.head_dim
    if old == new:
        return None
    if rope.kind not in _ROTARY_KEPT:
        raise UserError(
            f"{site.param.name}: the head size grows from {old} to {new}, but the frequencies of rotary scaling "
            f"{rope.kind!r} depend on it; keep head_dim at {old} (kept by scaling {', '.join(_ROTARY_KEPT)})"
        )
    times, rest = divmod(new, old)
    if rest:
        raise UserError(
            f"{site.param.name}: with rotary positions the head size grows by a whole number of times only, not from "
            f"{old} to {new}; set head_dim to {old} or {2 * old}"
        )
    half = old // 2
    return [times * i if i < half else new // 2 + times * (i - half) for i in range(old)]
