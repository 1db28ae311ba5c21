"""Mode `tile`: repeat an axis a whole number of times."""

from __future__ import annotations

from dataclasses import replace

from compt_megatron.errors import UserError
from compt_megatron.growth.heads import head_segments, tiled, units
from compt_megatron.growth.plan import pair_signs
from compt_megatron.growth.segments import Segment, Site


class Tile:
    """x' = [x; x; ...] (k copies, m = k n): writers (and their layer scale) repeat, readers repeat and divide by k,
    norms repeat.

    - residual axis: the statistics of LayerNorm and RMSNorm do not change, so it is exact, `ln_pre` included; a tied
      head reads the repeated embedding, so the norm before it is divided by k instead;
    - hidden axes (heads with the same head_dim, MLP units): duplicated units whose output columns are divided by k.
      Heads repeat inside their query group, with it, or both, as the target's groups demand (`heads.tiled`);
    - joint embedding: the projection's columns repeat, cosines do not change.

    Exact for integer ratios. Gradients: a repeated row gets 1/k of its source's, a divided column all of it.

    Copies of a unit that also receive the same gradient never part. `noise` parts them: the k columns that read the
    copies get s_j noise f, f the fresh value at the first copy's place and s signs that sum to zero (+1, -1, ...; an
    odd number ends in +1, +1, -2): what they add to the output cancels, so it stays exact.

    Source: Net2Net (arXiv 1511.05641) for hidden units, bert2BERT (arXiv 2110.07143) for transformers, HyperCloning
    (arXiv 2409.12903) for the residual axis and antisymmetric noise.
    """

    name = "tile"
    axes = frozenset({"embed", "heads", "kv_heads", "mlp", "joint"})
    exact = True

    def segments(self, site: Site) -> list[Segment]:
        if site.axis in ("heads", "kv_heads"):
            return self._heads(site)
        times, rest = divmod(site.new, site.old)
        if rest:
            raise UserError(
                f"{site.param.name}: mode 'tile' needs a whole ratio on axis {site.axis!r}, not {site.old} -> "
                f"{site.new}; choose another mode for this axis or another target size"
            )
        divided = site.role == "read" or (site.tied_norm and site.role in ("norm_scale", "norm_bias"))
        noise = _noise(site, times)
        return [
            Segment(
                k * site.old,
                (k + 1) * site.old,
                "old",
                scale=1 / times if divided else 1.0,
                gradient=1.0 if divided else 1 / times,
                copy=k,
                noise=noise[k],
            )
            for k in range(times)
        ]

    def _heads(self, site: Site) -> list[Segment]:
        assert site.source is not None
        assert site.target is not None
        if site.source.head_dim != site.target.head_dim:
            raise UserError(
                f"{site.param.name}: mode 'tile' keeps the head size, which changes from {site.source.head_dim} to "
                f"{site.target.head_dim}; use mode 'append' for the heads"
            )
        found = tiled(site.source, site.target, site.param.name)
        times = site.target.heads // site.source.heads
        sources = units(site, found)
        if site.role == "read":
            return self._parted(site, sources, times)
        copies = len(sources) / len({*sources})
        free = Segment(0, 0, "free")
        return head_segments(site, sources, free, free, Segment(0, 0, "old", gradient=1 / copies))

    def _parted(self, site: Site, sources: tuple[int | None, ...], times: int) -> list[Segment]:
        """The output columns: divided, and each copy with its own sign of the noise."""
        noise = _noise(site, times)
        plain = Segment(0, 0, "old", scale=1 / times, gradient=1.0)
        if not any(noise):
            return head_segments(site, sources, plain, plain, plain)
        segments = head_segments(site, sources, plain, plain, replace(plain, noise=1.0))
        return [replace(segment, noise=noise[segment.copy]) for segment in segments]


def _noise(site: Site, times: int) -> list[float]:
    """The noise of each copy: only columns that read copies have some."""
    if site.role != "read" or times < 2 or not site.noise:
        return [0.0] * times
    return [sign * site.noise for sign in pair_signs(times)]
