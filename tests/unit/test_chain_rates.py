"""Factors on the steps of a grown link's tensors: new layers, old parts, and what growth itself says."""

from __future__ import annotations

import pytest

from compt_megatron.chain.member import link_members
from compt_megatron.chain.rates import added_layers, grown_factors
from compt_megatron.growth.certificate import Certificate, certify
from compt_megatron.growth.operators import plan
from compt_megatron.recipe.load import load_recipe
from compt_megatron.spec.families import load_spec

SMALL, LARGE = load_spec("llama-stdlib-s"), load_spec("llama-stdlib-m")  # 2 and 3 layers


def certificate(depth: str | None = None, operator: str = "exact") -> Certificate:
    return certify(plan(SMALL, LARGE, operator, depth=depth), "hash", "path", None)


def factors(overrides: list[str], made: Certificate) -> dict[str, tuple[float, float]]:
    recipe = load_recipe("stdlib-lm", [f"links.m.grow.{override}" for override in overrides])
    return grown_factors(link_members(recipe, None)[1], made.to_dict())


@pytest.mark.parametrize(
    ("depth", "added"), [("identity", {("text", 1)}), ("interleave", {("text", 1)}), ("stack", {("text", 2)})]
)
def test_added_layers_are_those_that_are_not_the_first_of_their_source(depth: str, added: set[tuple[str, int]]) -> None:
    assert added_layers(SMALL, LARGE, depth) == added


def test_new_and_old_rates_are_told_apart_by_layers() -> None:
    made = certificate()
    assert factors([], made) == {}
    found = factors(["new_rate=3", "old_rate=0.5"], made)
    assert found.keys() == LARGE.params.keys()
    for name, pair in found.items():
        assert pair == (3.0 if LARGE.params[name].layer == 1 else 0.5, 1.0), name
    only_new = factors(["new_rate=3"], made)
    assert {LARGE.params[name].layer for name in only_new} == {1}


def test_they_multiply_what_growth_says() -> None:
    made = certificate()
    grown, both = factors(["rates=grown"], made), factors(["rates=grown", "old_rate=0.5"], made)
    assert grown == made.rates != {}
    for name, (rate, decay) in both.items():
        own = grown.get(name, (1.0, 1.0))
        assert (rate, decay) == (own[0] * (1.0 if LARGE.params[name].layer == 1 else 0.5), own[1])


def test_a_link_that_is_not_grown_has_none() -> None:
    base = link_members(load_recipe("stdlib-lm"), None)[0]
    assert grown_factors(base, None) == {}
