"""Mode `tile`: repeat an axis a whole number of times."""

from __future__ import annotations

from compt_megatron.errors import UserError
from compt_megatron.growth.segments import Segment, Site, repeated


class Tile:
    """x' = [x; x; ...] (k copies, m = k n): writers repeat, readers repeat and divide by k, norms repeat.

    - residual axis: LayerNorm's statistics do not change, so it is exact, `ln_pre` included;
    - hidden axes (heads with the same head_dim, MLP units): duplicated units whose output columns are divided by k;
    - joint embedding: the projection's columns repeat, cosines do not change.

    Exact for integer ratios. Copies of a unit that also receive the same gradient never part: on its own, on a hidden
    axis, `tile` wants symmetry breaking. Source: Net2Net (arXiv 1511.05641) for hidden units, HyperCloning (arXiv
    2409.12903) for the residual axis.
    """

    name = "tile"
    axes = frozenset({"embed", "heads", "mlp", "joint"})
    exact = True

    def segments(self, site: Site) -> list[Segment]:
        times, rest = divmod(site.new, site.old)
        if rest:
            raise UserError(
                f"{site.param.name}: mode 'tile' needs a whole ratio on axis {site.axis!r}, not {site.old} -> "
                f"{site.new}; choose another mode for this axis or another target size"
            )
        if site.axis == "heads" and site.source and site.target and site.source.head_dim != site.target.head_dim:
            raise UserError(
                f"{site.param.name}: mode 'tile' keeps the head size, which changes from {site.source.head_dim} to "
                f"{site.target.head_dim}; use mode 'append' for the heads"
            )
        return repeated(site, times, 1 / times if site.role == "read" else 1.0)
