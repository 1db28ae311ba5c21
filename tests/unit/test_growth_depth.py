"""Depth modes: the layer each target layer comes from, at any ratio."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compt_megatron.errors import UserError
from compt_megatron.growth.depth import DEPTH_MODES, layer_uses


@pytest.mark.parametrize(
    ("mode", "old", "new", "sources"),
    [
        ("interleave", 3, 6, [0, 0, 1, 1, 2, 2]),
        ("interleave", 4, 6, [0, 0, 1, 2, 2, 3]),
        ("identity", 2, 3, [0, 0, 1]),
        ("stack", 3, 6, [0, 1, 2, 0, 1, 2]),
        ("stack", 2, 5, [0, 1, 0, 1, 0]),
        ("middle", 4, 8, [0, 1, 2, 1, 2, 1, 2, 3]),
        ("middle", 12, 18, [0, 1, 2, 3, 4, 5, 6, 7, 8, 3, 4, 5, 6, 7, 8, 9, 10, 11]),
        ("middle", 1, 3, [0, 0, 0]),
    ],
)
def test_source_layers(mode: str, old: int, new: int, sources: list[int]) -> None:
    assert [use.source for use in layer_uses(mode, old, new)] == sources


@given(st.sampled_from(sorted(DEPTH_MODES)), st.integers(1, 30), st.integers(0, 40))
def test_every_mode_at_every_ratio(mode: str, old: int, more: int) -> None:
    uses = layer_uses(mode, old, old + more)
    assert len(uses) == old + more
    assert {use.source for use in uses} == set(range(old))
    if more == 0:
        assert [use.source for use in uses] == list(range(old))
    plain = [use for use in uses if not use.repeated]
    assert sorted(use.source for use in plain) == list(range(old))
    assert all(use.silent == (use.repeated and mode == "identity") for use in uses)
    if mode in ("identity", "interleave"):
        assert [use.source for use in uses] == sorted(use.source for use in uses)
        assert [use.source for use in plain] == list(range(old))


def test_unknown_mode() -> None:
    with pytest.raises(UserError, match="identity, interleave, stack, middle"):
        layer_uses("twice", 2, 4)
