"""Fresh values: any box has the bytes of the whole tensor's, streams are those of Philox4x64-10, moments are right."""

from __future__ import annotations

from math import cos, log, pi, sin, sqrt

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compt_megatron.spec.random import initial, normal, philox_key, uniform
from compt_megatron.spec.table import Dim, Init, Param

_MASK = (1 << 64) - 1


def philox4x64(counter: int, key: tuple[int, int]) -> list[int]:
    """Philox4x64-10 as the paper writes it."""
    words = [(counter >> shift) & _MASK for shift in (0, 64, 128, 192)]
    k0, k1 = key
    for _ in range(10):
        left, right = 0xD2E7470EE14C6C93 * words[0], 0xCA5A826395121157 * words[2]
        words = [(right >> 64) ^ words[1] ^ k0, right & _MASK, (left >> 64) ^ words[3] ^ k1, left & _MASK]
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & _MASK, (k1 + 0xBB67AE8584CAA73B) & _MASK
    return words


def oracle(seed: int, name: str, index: int) -> tuple[float, float]:
    """The normal and the uniform value of one element, in plain Python."""
    unit = [(word >> 11) * 2.0**-53 for word in philox4x64(index // 4, philox_key(seed, name))]
    pair = index % 4 // 2 * 2
    radius = sqrt(-2 * log(unit[pair] + 2.0**-53))
    angle = 2 * pi * unit[pair + 1]
    return radius * (cos(angle) if index % 2 == 0 else sin(angle)), unit[index % 4]


@pytest.mark.parametrize("seed", [0, 7, 2**63 + 5])
def test_values_are_philox_and_box_muller(seed: int) -> None:
    drawn, flat = normal(seed, "visual.proj", (37,)), uniform(seed, "visual.proj", (37,))
    for index in range(37):
        z, u = oracle(seed, "visual.proj", index)
        assert drawn[index].item() == pytest.approx(z, rel=1e-6, abs=1e-7)
        assert flat[index].item() == pytest.approx(u, rel=1e-7)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_box_has_the_bytes_of_the_whole(data: st.DataObject) -> None:
    dims = data.draw(st.integers(0, 4))
    shape = tuple(data.draw(st.integers(1, 4000 if dims == 1 else (90 if dims == 2 else 17))) for _ in range(dims))
    starts = [data.draw(st.integers(0, size - 1)) for size in shape]
    region = tuple(slice(a, data.draw(st.integers(a, size))) for a, size in zip(starts, shape, strict=True))
    whole = normal(3, "w", shape)
    assert torch.equal(normal(3, "w", shape, region), whole[region])


def test_boxes_of_large_tensors() -> None:
    """Long rows (cut into chunks), far runs (the generator is moved) and a 3-D box with uneven gaps."""
    cases: dict[tuple[int, ...], list[tuple[slice, ...]]] = {
        (5, 100_001): [
            (slice(1, 4), slice(0, 100_001)),
            (slice(1, 5), slice(99_000, 99_003)),
            (slice(2, 3), slice(7, 70_007)),
        ],
        (40, 50, 60): [(slice(3, 38), slice(10, 13), slice(1, 59)), (slice(0, 40), slice(49, 50), slice(59, 60))],
    }
    for shape, regions in cases.items():
        whole = normal(0, "w", shape)
        for region in regions:
            assert torch.equal(normal(0, "w", shape, region), whole[region])


def test_moments() -> None:
    z = normal(11, "w", (1000, 1000)).double()
    assert abs(z.mean()) < 4e-3
    assert abs(z.var() - 1) < 6e-3
    assert abs((z**3).mean()) < 1.6e-2
    assert abs((z**4).mean() - 3) < 4e-2
    assert 4.4 < z.abs().max() < 6.2
    u = uniform(11, "w", (1000, 1000), low=-2.0, high=2.0).double()
    assert abs(u.mean()) < 5e-3
    assert abs(u.var() - 16 / 12) < 5e-3
    assert u.min() >= -2
    assert u.max() <= 2


def test_streams_are_independent() -> None:
    count = 100_000
    base = normal(1, "a", (count,)).double()
    others = [normal(2, "a", (count,)), normal(1, "b", (count,)), normal(1, "a.", (count,))]
    for other in [*(o.double() for o in others), base.roll(1), base.roll(2), base.roll(4)]:
        assert abs((base * other).mean()) < 5 / sqrt(count)
    assert not torch.equal(base[::2].abs(), base[1::2].abs())


def test_initial_follows_the_table() -> None:
    dims = (Dim("embed", "write", 300), Dim("mlp", "read", 400))

    def param(kind: str, scale: float) -> Param:
        return Param("w", dims, "text", "layer", 0, Init(kind, scale))  # type: ignore[arg-type]

    drawn = initial(param("normal", 0.02), 5)
    assert drawn.dtype == torch.float32
    assert drawn.std().item() == pytest.approx(0.02, rel=0.02)
    spread = initial(param("uniform", 0.3), 5)
    assert 0.299 < spread.abs().max() <= 0.3
    assert spread.std().item() == pytest.approx(0.3 / sqrt(3), rel=0.02)
    assert torch.equal(initial(param("constant", 1.5), 5), torch.full((300, 400), 1.5))
    box = (slice(10, 20), slice(3, 300))
    assert torch.equal(initial(param("normal", 0.02), 5, box, torch.bfloat16), drawn[box].to(torch.bfloat16))
    assert initial(param("constant", 1.0), 5, box).shape == (10, 297)
