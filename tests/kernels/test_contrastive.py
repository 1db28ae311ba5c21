"""The losses of CLIP and SigLIP: the reference against its formula, and the walk by tiles against the reference."""

from __future__ import annotations

from functools import partial
from math import exp, log

import pytest
import torch

from compt_kernels import contrastive_loss, siglip_loss
from compt_kernels.build import load_emulated
from compt_kernels.ops import contrastive as clip_ops
from compt_kernels.ops.contrastive import clip_loss
from compt_kernels.ops.pairs import TILE, blocks
from compt_kernels.ops.siglip import sigmoid_loss
from tests.kernels.allocations import peak_bytes
from tests.kernels.loss_cases import eager_clip, eager_siglip, pairs, value_and_gradients

FP64 = torch.float64
VECTORS = 1000  # bytes a row at most that states, and losses in fp64, take
SCALE, BIAS = torch.tensor(9.0, dtype=FP64), torch.tensor(-3.0, dtype=FP64)


def dots(image, text):
    return [[sum(a * b for a, b in zip(x, y)) for y in text.tolist()] for x in image.tolist()]


def clip_by_loops(image, text, scale, labels):
    z = [[float(scale) * dot for dot in row] for row in dots(image, text)]
    labels = list(range(len(z))) if labels is None else labels.tolist()
    total = 0.0
    for matrix in (z, [list(column) for column in zip(*z)]):
        for i, row in enumerate(matrix):
            positive = [value for value, label in zip(row, labels) if label == labels[i]]
            total += log(sum(exp(value) for value in row)) - sum(positive) / len(positive)
    return total / (2 * len(z))


def siglip_by_loops(image, text, scale, bias, labels):
    labels = list(range(len(image))) if labels is None else labels.tolist()
    total = 0.0
    for i, row in enumerate(dots(image, text)):
        for j, dot in enumerate(row):
            sign = 1 if labels[i] == labels[j] else -1
            total += log(1 + exp(-sign * (float(scale) * dot + float(bias))))
    return total / len(image)


@pytest.mark.parametrize("spread", [0, 3])
def test_reference_is_the_formula(spread):
    image, text, labels = pairs(6, 5, FP64, 0, spread=spread)
    want = clip_by_loops(image, text, SCALE, labels)
    assert float(contrastive_loss(image, text, SCALE, labels)) == pytest.approx(want, rel=1e-13)
    assert float(eager_clip(image, text, SCALE, labels)) == pytest.approx(want, rel=1e-13)
    want = siglip_by_loops(image, text, SCALE, BIAS, labels)
    assert float(siglip_loss(image, text, SCALE, BIAS, labels)) == pytest.approx(want, rel=1e-13)
    assert float(eager_siglip(image, text, SCALE, BIAS, labels)) == pytest.approx(want, rel=1e-13)


@pytest.mark.parametrize("tile", [TILE, 20])
@pytest.mark.parametrize("spread", [0, 2])
def test_gradients_are_those_of_the_loss(tile, spread):
    image, text, labels = pairs(5, 3, FP64, 1, spread=spread)
    scale, bias = SCALE.clone().requires_grad_(), BIAS.clone().requires_grad_()
    check = torch.autograd.gradcheck
    assert check(lambda i, t, s: contrastive_loss(i, t, s, labels), (image, text, scale))
    assert check(lambda i, t, s: clip_loss(i, t, s, labels, "", tile, True), (image, text, scale))
    assert check(lambda i, t, s, b: siglip_loss(i, t, s, b, labels), (image, text, scale, bias))
    assert check(lambda i, t, s, b: sigmoid_loss(i, t, s, b, labels, "", tile, True), (image, text, scale, bias))


def both_losses(labels, tile, bias):
    """(by tiles, reference) of CLIP and of SigLIP, as functions of image, text and scale."""
    yield (
        lambda i, t, s: clip_loss(i, t, s, labels, "", tile, True),
        lambda i, t, s: contrastive_loss(i, t, s, labels),
    )
    yield (
        lambda i, t, s: sigmoid_loss(i, t, s, bias, labels, "", tile, True),
        lambda i, t, s: siglip_loss(i, t, s, bias, labels),
    )


@pytest.mark.parametrize("n", [0, 1, 2, 7, 150])
@pytest.mark.parametrize("tile", [TILE, 64 * 150, 64 * 64, 100])  # whole, rows cut, both cut, finer than a row
@pytest.mark.parametrize("spread", [0, 4])
def test_tiles_equal_the_reference(n, tile, spread):
    image, text, labels = pairs(n, 5, FP64, n, spread=spread)
    scale = SCALE.clone().requires_grad_()
    for tiled, reference in both_losses(labels, tile, BIAS):
        got = value_and_gradients(tiled, (image, text, scale), upstream=-2.5)
        want = value_and_gradients(reference, (image, text, scale), upstream=-2.5)
        for a, b in zip(got, want):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-14)


def test_only_the_gradients_that_are_asked_for():
    for tile in (TILE, 40):
        for asked in range(8):
            image, text, _ = pairs(9, 4, FP64, 3)
            leaves = [
                x.detach().requires_grad_(bool(asked >> i & 1)) for i, x in enumerate((image, text, SCALE.clone()))
            ]
            for tiled, reference in both_losses(None, tile, BIAS):
                got, want = value_and_gradients_or_none(tiled, leaves), value_and_gradients_or_none(reference, leaves)
                assert len(got) == len(want) == 1 + asked.bit_count()
                for a, b in zip(got, want):
                    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-14)


def value_and_gradients_or_none(function, leaves):
    if any(x.requires_grad for x in leaves):
        return value_and_gradients(function, leaves)
    loss = function(*leaves)
    assert not loss.requires_grad
    return [loss]


def test_a_loss_without_gradient_computes_none():
    image, text, _ = pairs(64, 16, torch.float32, 0)
    arguments = (image, text, SCALE.float(), None, "", TILE, True)
    with torch.no_grad():
        assert not clip_loss(*arguments).requires_grad
        found = clip_ops._forward(*arguments, False, False, False)
    assert [x.numel() for x in found[-3:]] == [0, 0, 0]


def test_a_broken_model_shows():
    for n in (4, 40):
        image, text, _ = pairs(n, 4, torch.float32, 0)
        broken = image.detach().clone()
        broken[1, 2] = torch.nan
        for tiled, _ in both_losses(None, 100, BIAS.float()):
            assert torch.isnan(tiled(broken, text, SCALE.float()))
        infinite = image.detach().clone()
        infinite[1, 2] = torch.inf
        assert not torch.isfinite(clip_loss(infinite, text, SCALE.float(), None, "", 100, True))


def test_blocks_cover_within_the_limit():
    for rows, columns, tile in [
        (1, 1, 1),
        (131072, 131072, TILE),
        (2048, 131072, TILE),
        (20000, 20000, TILE),
        (7, 999, 64),
    ]:
        high, wide = blocks(rows, columns, tile)
        assert 1 <= high <= rows
        assert 1 <= wide <= columns
        assert high * wide <= tile
    assert blocks(131072, 131072, TILE) == (16384, 16384)
    assert blocks(20000, 20000, TILE) == (10048, 10048)  # two alike rather than 16384 and 3616
    assert blocks(2048, 131072, TILE) == (2048, 131072)


def test_memory_at_the_size_of_the_promise():
    """Extra bytes of forward and backward as the docstring counts them, measured; by that count the promise is kept."""
    load_emulated()  # the plain form of a tile needs temporaries of its size

    def count(n, d, tile, size):
        high, wide = blocks(n, n, tile)
        return 4 * high * wide + (0 if size == 4 else size * high * wide) + 2 * 4 * n * d + VECTORS * n

    n, d, tile = 512, 64, 1 << 14
    for dtype in (torch.float32, torch.bfloat16):
        image, text, _ = pairs(n, d, dtype, 0)
        image, text, scale = image.detach(), text.detach(), torch.tensor(10.0)
        options = ("", tile, False)
        forward = partial(clip_ops._forward, image, text, scale, None, *options, False, False, False)
        loss, rows, columns, *_ = forward()
        backward = partial(
            clip_ops._backward,
            torch.ones_like(loss),
            image,
            text,
            scale,
            rows,
            columns,
            None,
            None,
            *options,
            True,
            True,
        )
        cast = 0 if dtype == torch.float32 else 4 * tile + 4 * 256 * d  # the CPU multiplies 16-bit factors as fp32
        assert count(n, 0, tile, 4) - VECTORS * n <= peak_bytes(forward) <= count(n, 0, tile, 4) + cast
        assert -VECTORS * n <= peak_bytes(backward) - count(n, d, tile, dtype.itemsize) <= cast
    assert count(131072, 768, TILE, 2) + 2 * 2 * 131072 * 768 + 16 * 2**20 < 4e9  # with the results in 16 bits
    assert count(131072, 768, TILE, 4) < 4e9


def test_refuses_what_does_not_fit():
    image, text = torch.zeros(3, 4), torch.zeros(3, 4)
    with pytest.raises(ValueError, match="must be \\[n, d\\] alike"):
        contrastive_loss(image, text[:2], SCALE)
    with pytest.raises(ValueError, match="labels must be int64"):
        contrastive_loss(image, text, SCALE, labels=torch.zeros(3))
    with pytest.raises(ValueError, match="one number each"):
        siglip_loss(image, text, SCALE, torch.zeros(3))
