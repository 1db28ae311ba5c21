"""Mode `joint_pad`: grow the shared image-text embedding by any ratio, approximately."""

from __future__ import annotations

from math import sqrt

from compt_megatron.growth.segments import FREE, ZERO, Segment, Site, leading


class JointPad:
    """The first d entries of both towers' features stay; the new ones are 0 for texts and tiny for images.

    The image tower's new projection columns are fresh values times 2.5e-4 min(1, sqrt(d / (d' - d))), which for a
    projection of about its initial size keeps the new entries below 1e-3 of the feature's length. Dot products do not
    change; cosines do by the square of that. (New entries that are 0 in both towers would be a saddle point: neither
    tower would ever get a gradient there.) Approximate. Source: this project (docs/growth.md).
    """

    name = "joint_pad"
    axes = frozenset({"joint"})
    exact = False
    relative = 2.5e-4

    def segments(self, site: Site) -> list[Segment]:
        if site.param.tower != "vision" or site.new == site.old:
            return leading(site, ZERO)
        scale = self.relative * min(1.0, sqrt(site.old / (site.new - site.old)))
        return leading(site, Segment(0, 0, FREE.what, scale=scale))
