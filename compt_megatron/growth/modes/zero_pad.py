"""Mode `zero_pad`: grow the residual axis of an RMSNorm model by any ratio."""

from __future__ import annotations

from compt_megatron.growth.modes.padding import pad_scale
from compt_megatron.growth.segments import FREE, Segment, Site, leading


class ZeroPad:
    """The residual stream x (width n) becomes x' = c [x; 0] (width m), c = sqrt(m / n).

    Its mean square over m entries is c² n/m = 1 times that of x over n, so RMSNorm divides by the same number with the
    same eps and gives c [x̂; 0].

    - writers (weights, biases, embeddings): old rows times c; new rows 0;
    - readers: old columns kept; new columns free, because the norm before them gives 0 there: through them the new rows
      get a gradient;
    - norms: gamma' = [gamma / c, 1]; the norm before a tied head, which reads the grown embedding, gamma / c².

    Exact for RMSNorm at any ratio. Source: this project (docs/growth.md); LEMON (arXiv 2310.07999) pads LayerNorm
    models and changes eps or gamma instead.
    """

    name = "zero_pad"
    axes = frozenset({"embed"})
    exact = True

    def segments(self, site: Site) -> list[Segment]:
        if site.new == site.old:
            return leading(site, None)
        c = pad_scale(site, self.name, "rms")
        if site.role == "write":
            return leading(site, Segment(0, 0, "value", value=0.0), c)
        if site.role == "norm_scale":
            return leading(site, Segment(0, 0, "value", value=1.0), 1 / c**2 if site.tied_norm else 1 / c)
        assert site.role == "read", site
        return leading(site, FREE)
