"""What the modes that pad the residual stream share."""

from __future__ import annotations

from math import sqrt

from compt_megatron.errors import UserError
from compt_megatron.growth.segments import Site

_NORMS = {"layer": ("LayerNorm", "mean_pad"), "rms": ("RMSNorm", "zero_pad")}


def pad_scale(site: Site, mode: str, norm: str) -> float:
    """c = sqrt(m / n). Raises UserError if the tower's norms are not those that the mode is exact for."""
    assert site.target is not None
    if site.target.norm != norm:
        has, fitting = _NORMS[site.target.norm]
        raise UserError(
            f"{site.param.name}: mode {mode!r} is for {_NORMS[norm][0]} and this model has {has}; "
            f"use mode {fitting!r} for axis 'embed'"
        )
    return sqrt(site.new / site.old)
