"""Factors on the learning rate and weight decay of a grown link's tensors: what its growth says, and its recipe."""

from __future__ import annotations

from typing import Any

from compt_megatron.chain.member import Member
from compt_megatron.growth.certificate import Certificate
from compt_megatron.growth.depth import layer_uses
from compt_megatron.spec.table import ModelSpec

Factors = dict[str, tuple[float, float]]  # canonical name -> on learning rate, on weight decay


def grown_factors(member: Member, certificate: dict[str, Any] | None) -> Factors:
    """The factors of a link's tensors; those that are 1 are left out. `certificate`: of its growth."""
    grow = member.grow
    if grow is None or certificate is None:
        return {}
    made = Certificate.from_dict(certificate)
    factors: Factors = dict(made.rates) if grow.rates == "grown" else {}
    if grow.new_rate == grow.old_rate == 1.0:
        return factors
    new = added_layers(made.source_spec(), member.spec, made.depth)
    for name, param in member.spec.params.items():
        rate, decay = factors.get(name, (1.0, 1.0))
        own = grow.new_rate if (param.tower, param.layer) in new else grow.old_rate
        factors[name] = rate * own, decay
    return {name: pair for name, pair in factors.items() if pair != (1.0, 1.0)}


def added_layers(source: ModelSpec, target: ModelSpec, depth: str) -> set[tuple[str | None, int | None]]:
    """(tower, layer) of the layers that growth added: all but the first that was made from each layer of the source."""
    added: set[tuple[str | None, int | None]] = set()
    for name, tower in target.towers.items():
        uses = layer_uses(depth, source.towers[name].layers, tower.layers)
        added |= {(name, layer) for layer, use in enumerate(uses) if use.repeated}
    return added
