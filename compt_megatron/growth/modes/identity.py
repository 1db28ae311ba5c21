"""Mode `identity`: the axis keeps its size."""

from __future__ import annotations

from compt_megatron.errors import UserError
from compt_megatron.growth.segments import Segment, Site, leading


class Identity:
    """target = source. Exact; only where both models have the same size."""

    name = "identity"
    axes = frozenset({"embed", "heads", "kv_heads", "head_dim", "mlp", "joint", "channels", "patch", "tokens", "vocab"})
    exact = True

    def segments(self, site: Site) -> list[Segment]:
        if site.new != site.old and site.axis == "head_dim":
            raise UserError(
                f"{site.param.name}: a norm inside each head of {site.old} entries; no exact rule grows it to "
                f"{site.new}: set head_dim to {site.old}"
            )
        if site.new != site.old:
            raise UserError(
                f"{site.param.name}: axis {site.axis!r} has {site.old} entries in the source and {site.new} in the "
                "target; mode 'identity' needs equal sizes, choose another mode for this axis"
            )
        return leading(site, None)
