"""The alignment loss against fp64 loops, its gradient, and the rows that must not count."""

from __future__ import annotations

from math import sqrt

import pytest
import torch

from compt_kernels.align import align_loss

DISTANCES = ("mse", "cosine", "smooth_l1")


def by_loops(student, teacher, distance, norm, weights, reduction, beta=1.0):
    """The formulas of docs/alignment.md in Python floats."""
    rows = student.double().flatten(0, -2).tolist()
    others = teacher.double().flatten(0, -2).tolist()
    counts = [1.0] * len(rows) if weights is None else weights.double().flatten().tolist()
    summed = 0.0
    for s, t, count in zip(rows, others, counts):
        if count == 0:
            continue
        if norm == "l2" or distance == "cosine":
            s_norm, t_norm = sqrt(sum(v * v for v in s)), sqrt(sum(v * v for v in t))
            if s_norm == 0 or t_norm == 0:
                continue
            s, t = [v / s_norm for v in s], [v / t_norm for v in t]
        if distance == "cosine":
            value = 1 - sum(a * b for a, b in zip(s, t))
        elif distance == "mse":
            value = sum((a - b) ** 2 for a, b in zip(s, t)) / len(s)
        else:
            errors = [abs(a - b) for a, b in zip(s, t)]
            value = sum(e * e / (2 * beta) if e < beta else e - beta / 2 for e in errors) / len(s)
        summed += count * value
    whole = sum(counts)
    return summed if reduction == "sum" else summed / whole if whole else 0.0


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("norm", ["l2", "none"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 7)])  # plain rows, and dense features [b, tokens, d]
@pytest.mark.parametrize("weighted", [False, True])
def test_equals_the_formula(distance, norm, reduction, shape, weighted):
    torch.manual_seed(0)
    student, teacher = torch.randn(shape) * 3, torch.randn(shape)
    weights = torch.rand(shape[:-1]) if weighted else None
    if weighted:
        weights.view(-1)[1] = 0
    student.view(-1, 7)[2] = 0
    teacher.view(-1, 7)[3] = 0
    want = by_loops(student, teacher, distance, norm, weights, reduction)
    options = {"distance": distance, "norm": norm, "row_weight": weights, "reduction": reduction}
    assert float(align_loss(student, teacher, **options)) == pytest.approx(want, rel=2e-6)
    double = align_loss(student.double(), teacher.double(), **options)
    assert double.dtype == torch.float64
    assert float(double) == pytest.approx(want, rel=1e-13)


def test_smooth_l1_turns_linear_at_beta():
    student, teacher = torch.tensor([[3.0, 0.1]]), torch.zeros(1, 2)
    got = align_loss(student, teacher, distance="smooth_l1", norm="none", beta=0.5)
    assert float(got) == pytest.approx(((3 - 0.25) + 0.01) / 2, rel=1e-6)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("norm", ["l2", "none"])
def test_gradient(distance, norm):
    torch.manual_seed(1)
    student = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    teacher, weights = torch.randn(4, 6, dtype=torch.float64), torch.tensor([1.0, 0.5, 0.0, 2.0], dtype=torch.float64)
    for reduction in ("mean", "sum"):
        assert torch.autograd.gradcheck(
            lambda s, r=reduction: align_loss(
                s, teacher, distance=distance, norm=norm, row_weight=weights, reduction=r, beta=0.3
            ),
            student,
        )


@pytest.mark.parametrize("misfit", [1e-1, 1e-2, 1e-3])
@pytest.mark.parametrize("distance", ["mse", "cosine"])
def test_keeps_its_digits_at_a_small_misfit(misfit, distance):
    """2 - 2 s.t in fp32 is 13 % wrong at a misfit of 1e-3; the difference of unit vectors is not."""
    torch.manual_seed(2)
    teacher = torch.nn.functional.normalize(torch.randn(64, 512), dim=-1)
    student = teacher + misfit / sqrt(512) * torch.randn(64, 512)
    want = align_loss(student.double(), teacher.double(), distance=distance)
    got = align_loss(student, teacher, distance=distance)
    assert float((got - want).abs() / want) < 1e-4
    if distance == "mse" and misfit == 1e-3:
        x = torch.nn.functional.normalize(student, dim=-1)
        shortcut = (2 - 2 * (x * teacher).sum(-1)).mean() / 512
        assert float((shortcut - want).abs() / want) > 1e-3  # the case does tell the two apart


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_do_not_count(distance, dtype):
    """Zero and almost zero rows, and masked rows of NaN and infinity: no value, no gradient, nothing non-finite."""
    torch.manual_seed(3)
    student, teacher = torch.randn(7, 8).to(dtype), torch.randn(7, 8).to(dtype)
    mask = torch.tensor([1, 1, 1, 1, 0, 0, 1]).bool()
    student[0], teacher[1], student[2] = 0, 0, 1e-20
    student[4], student[5], teacher[5] = float("nan"), float("inf"), float("nan")
    student.requires_grad_()
    loss = align_loss(student, teacher, distance=distance, row_weight=mask, reduction="sum")
    loss.backward()
    good = [3, 6]
    alone = student.detach()[good].requires_grad_()
    want = align_loss(alone, teacher[good], distance=distance, reduction="sum")
    want.backward()
    assert float(loss.detach()) == pytest.approx(float(want.detach()), rel=1e-6)
    assert torch.equal(student.grad[good], alone.grad)
    rest = [0, 1, 2, 4, 5]
    assert torch.equal(student.grad[rest], torch.zeros(5, 8, dtype=dtype))


def test_a_live_row_of_nan_is_not_hidden():
    student = torch.randn(3, 4)
    student[1, 2] = float("nan")
    assert not torch.isfinite(align_loss(student, torch.randn(3, 4)))


def test_no_rows_and_no_weight_are_zero():
    empty = torch.zeros(0, 4, requires_grad=True)
    loss = align_loss(empty, torch.zeros(0, 4))
    loss.backward()
    assert float(loss.detach()) == 0
    student = torch.randn(3, 4, requires_grad=True)
    loss = align_loss(student, torch.randn(3, 4), row_weight=torch.zeros(3))
    loss.backward()
    assert float(loss.detach()) == 0
    assert torch.equal(student.grad, torch.zeros(3, 4))


def test_low_precision_features_are_computed_in_fp32():
    torch.manual_seed(4)
    student, teacher = torch.randn(16, 64).bfloat16(), torch.randn(16, 64).bfloat16()
    want = align_loss(student.double(), teacher.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = align_loss(student, teacher)
    assert got.dtype == torch.float32
    assert float(got) == pytest.approx(float(want), rel=1e-6)


def test_the_teacher_gets_no_gradient():
    teacher = torch.randn(3, 4, requires_grad=True)
    align_loss(torch.randn(3, 4, requires_grad=True), teacher).backward()
    assert teacher.grad is None
