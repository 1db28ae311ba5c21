"""The kernels of the contrastive losses, emulated: errors against fp64 beside eager's, edges, schedules."""

from __future__ import annotations

from math import sqrt

import pytest
import torch

from compt_kernels import contrastive_loss, siglip_loss
from compt_kernels.ops import tiles
from compt_kernels.ops.contrastive import clip_loss
from compt_kernels.ops.siglip import sigmoid_loss
from tests.kernels.emulated import schedule
from tests.kernels.loss_cases import (
    DTYPES,
    doubled,
    eager_clip,
    eager_siglip,
    pairs,
    relative,
    value_and_gradients,
)

ops = torch.ops.compt_kernels
SCALE, BIAS = 50.0, -8.0
# rows (2 of them beyond a block of 32), width, how easy, labels, elements of a tile
CASES = [
    (34, 24, 0.0, 0, 1 << 20),
    (34, 24, 0.5, 0, 400),
    (129, 40, 0.0, 0, 1 << 20),
    (129, 40, 0.3, 9, 5000),
    (300, 64, 0.2, 0, 1 << 20),
    (300, 64, 1.0, 40, 40000),
    (70, 7, 2.0, 0, 1 << 20),
]


def losses(labels, tile):
    """name -> (by the kernels, eager PyTorch, number of scalars)."""
    return {
        "clip": (
            lambda i, t, s: clip_loss(i, t, s, labels, "", tile, False),
            lambda i, t, s: eager_clip(i, t, s, labels),
        ),
        "siglip": (
            lambda i, t, s, b: sigmoid_loss(i, t, s, b, labels, "", tile, False),
            lambda i, t, s, b: eager_siglip(i, t, s, b, labels),
        ),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_errors_are_no_larger_than_eagers(name, dtype):
    ours, eagers = [], []
    for seed, (n, d, easy, spread, tile) in enumerate(CASES):
        image, text, labels = pairs(n, d, dtype, seed, easy, spread)
        kernels, eager = losses(labels, tile)[name]
        scalars = [torch.tensor(SCALE), torch.tensor(BIAS)][: 1 if name == "clip" else 2]
        tensors = [image, text, *(x.requires_grad_() for x in scalars)]
        with schedule(seed):
            got = value_and_gradients(kernels, tensors, upstream=1 / 3)
        want = value_and_gradients(eager, doubled(tensors), upstream=1 / 3)
        plain = value_and_gradients(eager, tensors, upstream=1 / 3)
        ours.append([relative(a, b) for a, b in zip(got, want)])
        eagers.append([relative(a, b) for a, b in zip(plain, want)])
        assert [x.dtype for x in got] == [torch.float32, *(x.dtype for x in tensors)]
        if dtype == torch.float32:
            assert ours[-1][0] < 1e-6
            assert max(ours[-1]) < 2e-5
    for mine, theirs in zip(zip(*ours), zip(*eagers)):
        least = 6e-8 if dtype == torch.float32 else 0  # half a unit of the result's last place
        assert rms(mine) <= 1.1 * rms(theirs) + least, (mine, theirs)


def rms(errors):
    return sqrt(sum(e * e for e in errors) / len(errors))


@pytest.mark.parametrize("image_dtype", DTYPES)
@pytest.mark.parametrize("text_dtype", DTYPES)
@pytest.mark.parametrize("n", [0, 1, 3])
def test_mixed_dtypes_and_few_rows(image_dtype, text_dtype, n):
    image, _, _ = pairs(n, 8, image_dtype, 0)
    _, text, _ = pairs(n, 8, text_dtype, 1)
    scale, bias = torch.tensor(10.0, requires_grad=True), torch.tensor([-2.0], requires_grad=True)
    coarse = torch.promote_types(image_dtype, text_dtype) != torch.float32
    for function, tensors in ((contrastive_loss, [image, text, scale]), (siglip_loss, [image, text, scale, bias])):
        got = value_and_gradients(lambda *x, f=function: f(*x, impl="emulated"), tensors)
        want = value_and_gradients(function, doubled(tensors))
        for a, b, x in zip(got[1:], want[1:], tensors):
            assert a.dtype == x.dtype
            assert a.shape == x.shape
            rounding = 0.02 if coarse or x.dtype != torch.float32 else 1e-5
            torch.testing.assert_close(a.double(), b, rtol=rounding, atol=rounding * float(b.abs().max()) if n else 0)
        torch.testing.assert_close(got[0].double(), want[0], rtol=1e-6, atol=1e-12)


def test_strides():
    """Every second caption of a slotted batch, columns of a wider matrix, rows that repeat."""
    wide, _, _ = pairs(40, 50, torch.float32, 0)
    texts, _, _ = pairs(120, 25, torch.float32, 1)
    scale, bias = torch.tensor(20.0), torch.tensor(-5.0)
    image, text = wide.detach()[:, 10:35], texts.detach()[1::3]
    repeated = image[:1].expand(40, 25)
    transposed = text.T.contiguous().T
    for x, y in ((image, text), (repeated, text), (image, transposed)):
        x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
        for function, scalars in ((contrastive_loss, [scale]), (siglip_loss, [scale, bias])):
            got = value_and_gradients(lambda *z, f=function: f(*z, impl="emulated"), [x, y, *scalars])
            want = value_and_gradients(function, doubled([x, y, *scalars]))
            for a, b in zip(got, want):
                torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-6)


def test_labels_of_one_slot_of_several():
    image, text, _ = pairs(9, 6, torch.float32, 0)
    hashes, scale, bias = torch.randint(0, 3, (9, 4)), torch.tensor(4.0), torch.tensor(-1.0)
    for slot in (0, 2):
        got = contrastive_loss(image, text, scale, hashes[:, slot], impl="emulated")
        torch.testing.assert_close(got, eager_clip(image, text, scale, hashes[:, slot]))
        got = siglip_loss(image, text, scale, bias, hashes[:, slot], impl="emulated")
        torch.testing.assert_close(got, eager_siglip(image, text, scale, bias, hashes[:, slot]))


@pytest.mark.parametrize("spread", [0, 5])
def test_equal_bits_under_every_schedule(spread):
    image, text, labels = pairs(75, 16, torch.bfloat16, 0, spread=spread)
    scale, bias = torch.tensor(SCALE, requires_grad=True), torch.tensor(BIAS, requires_grad=True)
    found = []
    for seed in (0, 1, 2, 3):
        with schedule(seed):
            results = [
                value_and_gradients(lambda *x: clip_loss(*x, labels, "", 3000, False), [image, text, scale]),
                value_and_gradients(lambda *x: sigmoid_loss(*x, labels, "", 3000, False), [image, text, scale, bias]),
            ]
        found.append([x for result in results for x in result])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))


def test_an_easy_batch_keeps_its_digits():
    """A loss of 1e-4: in fp32, log-sum-exp minus the own logit leaves none of its digits beyond the third."""
    image, text, _ = pairs(64, 256, torch.bfloat16, 0, easy=6.0)
    scale = torch.tensor(12.0)
    want = eager_clip(*doubled([image, text, scale]))
    assert 1e-5 < float(want) < 1e-3
    assert relative(contrastive_loss(image, text, scale, impl="emulated"), want) < 1e-6


def far_apart(folder, rows, columns, stride, dtype=torch.float32):
    """A matrix whose rows lie `stride` elements apart, in a file that takes room only where it is written."""
    size = (rows - 1) * stride + columns
    whole = torch.from_file(str(folder / f"{dtype}_{stride}"), shared=True, size=size, dtype=dtype)
    return torch.as_strided(whole, (rows, columns), (stride, 1))


@pytest.mark.parametrize("columns", [1, 5, 259])
@pytest.mark.parametrize("stride", [264, 261, (1 << 30) + 3])  # aligned, not aligned, offsets beyond 2^31
@pytest.mark.parametrize("with_labels", [False, True])
def test_each_operation_equals_its_plain_form(columns, stride, with_labels, tmp_path):
    torch.manual_seed(columns)
    rows, diagonal = 4, -1
    dots = far_apart(tmp_path, rows, columns, stride).copy_(torch.randn(rows, columns))
    labels = (torch.randint(0, 4, (rows,)), torch.randint(0, 4, (columns,))) if with_labels else (None, None)
    scale, bias = torch.tensor(3.0), torch.tensor(-1.0)
    states = [
        torch.zeros(rows_of, width).index_fill_(0, torch.tensor(0), tiles.NOTHING)
        for rows_of, width in ((5, rows), (4, columns))
    ]
    again = [x.clone() for x in states]
    for _ in range(2):  # the second time they join what is there
        ops.nce_statistics_(dots, scale, *states, diagonal, *labels)
        tiles.nce_statistics_(dots, scale, *again, diagonal, *labels)
    log_sum = [[x[0] + x[1].log() for x in found] for found in (states, again)]
    for a, b in zip([*log_sum[0], states[0][2:], states[1][2:]], [*log_sum[1], again[0][2:], again[1][2:]]):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)

    vectors = torch.rand(4, rows), torch.rand(3, columns)
    for out_dtype in (None, torch.bfloat16, torch.float16):
        for name in ("nce", "sigmoid"):
            results = []
            for kernels in (ops, tiles):
                mine = torch.as_strided(torch.empty(rows * 264), (rows, columns), (264, 1)).copy_(dots)
                out = None if out_dtype is None else torch.empty(rows, columns, dtype=out_dtype)
                if name == "nce":
                    sums = kernels.nce_gradient_(mine, scale, *vectors, diagonal, *labels, out, 2.0)
                else:
                    sums = kernels.sigmoid_tile_(mine, scale, bias, diagonal, *labels, out, 2.0, True)
                results.append((sums, mine if out is None else out.float()))
            (sums, slopes), (want_sums, want_slopes) = results
            torch.testing.assert_close(sums, want_sums, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(slopes, want_slopes, rtol=1e-2 if out_dtype else 1e-4, atol=1e-4)
    loss = ops.sigmoid_tile_(dots, scale, bias, diagonal, *labels, None, 1.0, False)
    torch.testing.assert_close(loss, tiles.sigmoid_tile_(dots, scale, bias, diagonal, *labels, None, 1.0, False))


def test_gradients_written_far_away(tmp_path):
    """Where the gradient of a tile goes has strides of its own."""
    torch.manual_seed(0)
    dots = torch.randn(3, 9)
    out = far_apart(tmp_path, 3, 9, (1 << 30) + 8, torch.bfloat16)
    vectors = torch.rand(4, 3), torch.rand(3, 9)
    want = torch.empty(3, 9, dtype=torch.bfloat16)
    ops.nce_gradient_(dots, torch.tensor(1.0), *vectors, 0, None, None, out, 1.0)
    ops.nce_gradient_(dots, torch.tensor(1.0), *vectors, 0, None, None, want, 1.0)
    assert torch.equal(out, want)


def test_refuses_tensors_that_it_would_misread():
    dots, scale, rows, columns = torch.zeros(4, 6), torch.tensor(1.0), torch.zeros(5, 4), torch.zeros(4, 6)
    cases = [
        ((dots.T, scale, rows, columns, 0, None, None), "adjacent columns"),
        ((dots.double(), scale, rows, columns, 0, None, None), "must be float32"),
        ((dots, torch.zeros(2), rows, columns, 0, None, None), "one number"),
        ((dots, scale, rows[:4], columns, 0, None, None), "rows must be"),
        ((dots, scale, rows, columns[:, ::2], 0, None, None), "columns must be"),
        ((dots, scale, rows, columns, 0, torch.zeros(4, dtype=torch.int64), None), "both sides or none"),
        ((dots, scale, rows, columns, 0, torch.zeros(4), torch.zeros(6)), "must be int64"),
    ]
    for arguments, message in cases:
        with pytest.raises(RuntimeError, match=message):
            ops.nce_statistics_(*arguments)
