"""Mode `mean_pad`: grow the residual axis of a LayerNorm model by any ratio."""

from __future__ import annotations

from dataclasses import replace
from math import sqrt

from compt_megatron.errors import UserError
from compt_megatron.growth.modes.padding import pad_scale
from compt_megatron.growth.plan import Contrast
from compt_megatron.growth.segments import FREE, Segment, Site, leading


class MeanPad:
    """The residual stream x (width n) becomes x' = c [x; mean(x), ..., mean(x)] (width m), c = sqrt(m / n).

    x' - mean(x') = c [x - mean(x); 0], and its mean square over m entries is c² n/m = 1 times that of x - mean(x) over
    n: LayerNorm's statistics come out the same with the same eps.

    - writers (weights, biases, embeddings): old rows times c; new rows c times the mean of the old rows;
    - readers: old columns kept; new columns free, because the norm before them gives 0 there;
    - writers behind a layer scale, gamma (W h + b): new rows c times the mean of gamma_i / g times row i, with g the
      root mean square of gamma, and gamma' = [gamma, g, ..., g]. Their product is c times the mean of what is written,
      and new rows move the stream as much as old ones do (if g is 0, the plain mean);
    - norms: gamma' = [gamma / c, 1], beta' = [beta, 0]; the norm before a tied head, which reads the grown embedding:
      [gamma / c², 1], [beta / c, 0].

    A norm before the first block (`ln_pre`) must put c [y; mean(y)] *into* the stream. Its output mean is
    mean(gamma x̂) + mean(beta) = wᵀ x̂ + mean(beta) with w = (gamma - mean(gamma)) / n, as x̂ has mean zero. So the new
    rows of the writers before it are c (mean row + s_j kappa wᵀ rows), with signs s that sum to zero, and then
    gamma' = [gamma, 1 / (s kappa)], beta' = c [beta, mean(beta)].

    Exact for pre-LN models at any ratio. After an `ln_pre` the variance is off by (m - n) / n kappa² (wᵀ x̂)² and no
    more: features agree to about 1e-6, the noise of fp32. kappa is a compromise: the updates of the new rows reach the
    stream times 1 / kappa, so that a small one trains badly. As |wᵀ x̂| <= std(gamma), the choice
    kappa = 0.01 sqrt(n / (m - n)) / std(gamma), at most 0.2, bounds the error alike for every model and ratio.

    Source: LEMON (arXiv 2310.07999) pads with averages; the factor c that lets eps stay, and the `ln_pre` rule, are
    this project's (docs/growth.md).
    """

    name = "mean_pad"
    axes = frozenset({"embed"})
    exact = True
    spread = 0.01
    ceiling = 0.2

    def segments(self, site: Site) -> list[Segment]:
        if site.new == site.old:
            return leading(site, None)
        c = pad_scale(site, self.name, "layer")
        before_norm = site.pre_gamma is not None and site.param.stage == "pre"
        mean = Segment(0, 0, "mean", scale=c, weights=site.scaled_by)
        contrast = self._contrast(site) if before_norm else None
        if before_norm and site.new - site.old < 2:
            raise UserError(
                f"{site.param.name}: width {site.old} -> {site.new} grows by one entry, and a tower with ln_pre needs "
                "at least two; choose a target that is wider by two or more"
            )
        if site.role == "write":
            return leading(site, replace(mean, contrast=contrast), c)
        if site.role == "write_scale":
            return leading(site, Segment(0, 0, "level"))
        if site.role == "norm_scale":
            if before_norm:
                return leading(site, Segment(0, 0, "value", value=1.0, contrast=contrast))
            return leading(site, Segment(0, 0, "value", value=1.0), 1 / c**2 if site.tied_norm else 1 / c)
        if site.role == "norm_bias":
            if before_norm:
                return leading(site, mean, c)
            return leading(site, Segment(0, 0, "value", value=0.0), 1 / c if site.tied_norm else 1.0)
        assert site.role == "read", site
        return leading(site, FREE)

    def _contrast(self, site: Site) -> Contrast:
        assert site.pre_gamma is not None
        ratio = self.spread * sqrt(site.old / (site.new - site.old))
        return Contrast(site.pre_gamma, site.old, ratio, self.ceiling)
