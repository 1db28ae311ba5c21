"""The kernels of the distillation, emulated: errors against fp64 beside eager's, masks, edges, schedules."""

from __future__ import annotations

from math import sqrt

import pytest
import torch

from compt_kernels import distill_kl
from compt_kernels.ops import distill_rows as plain
from compt_kernels.ops.distill import MEMORY, distill_loss
from tests.kernels.emulated import schedule
from tests.kernels.loss_cases import DTYPES, doubled, eager_distill, hidden_and_heads, relative, value_and_gradients

ops = torch.ops.compt_kernels
# tokens, columns (a step of a block has 4096), temperature, top_k, misfit, memory
CASES = [
    (3, 4100, 1.0, None, None, MEMORY),
    (9, 515, 2.0, None, 0.3, MEMORY),
    (300, 33, 1.0, 5, None, 1),
    (4, 4099, 0.7, 50, 0.1, MEMORY),
    (7, 8200, 4.0, None, 0.01, MEMORY),
]


@pytest.mark.parametrize("dtype", DTYPES)
def test_errors_are_no_larger_than_eagers(dtype):
    ours, eagers = [], []
    for seed, (n, vocabulary, temperature, top_k, misfit, memory) in enumerate(CASES):
        *leaves, teacher, teacher_head = hidden_and_heads(n, vocabulary, dtype, seed, misfit=misfit)
        weight = torch.rand(n)
        share = weight / weight.sum()

        def kernels(
            h, w, share=share, others=(teacher, teacher_head), options=(temperature, top_k, False, True, "", memory)
        ):
            return distill_loss(h, w, *others, share, *options, False)

        def eager(h, w, weight=weight, others=(teacher, teacher_head), temperature=temperature, top_k=top_k):
            others = [x.to(h.dtype) for x in others]
            return eager_distill(
                h, w, *others, temperature, weight.to(torch.promote_types(h.dtype, weight.dtype)), top_k
            )

        with schedule(seed):
            got = value_and_gradients(kernels, leaves, upstream=1 / 3)
        want = value_and_gradients(eager, doubled(leaves), upstream=1 / 3)
        found = value_and_gradients(eager, leaves, upstream=1 / 3)
        assert [x.dtype for x in got] == [torch.float32, dtype, dtype]
        ours.append([relative(a, b) for a, b in zip(got, want)])
        eagers.append([relative(a, b) for a, b in zip(found, want)])
        if dtype == torch.float32 and misfit is None:
            assert ours[-1][0] < 1e-6
            assert max(ours[-1]) < 2e-5
    for mine, theirs in zip(zip(*ours), zip(*eagers)):
        least = 6e-8 if dtype == torch.float32 else 0
        assert rms(mine) <= 1.1 * rms(theirs) + least, (mine, theirs)


def rms(errors):
    return sqrt(sum(e * e for e in errors) / len(errors))


def test_a_student_near_its_teacher_keeps_its_digits():
    """Logits that differ by 1e-3: the sum of p log(p / q) in fp32 is wrong in its second digit."""
    torch.manual_seed(0)
    student = torch.randn(8, 2000) * 2
    teacher = student + 1e-3 * torch.randn(8, 2000)
    statistics = ops.distill_statistics(student, teacher, None, 1.0)
    losses = ops.distill_gradient_(student.clone(), teacher, statistics, torch.ones(8), None, 1.0, None, True)
    log_p, log_q = (torch.log_softmax(x.double(), 1) for x in (student, teacher))
    want = (log_q.exp() * (log_q - log_p)).sum(1)
    assert 1e-7 < float(want.max()) < 1e-5
    assert relative(losses, want) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_masked_rows_may_hold_anything(dtype, reduction):
    student, head, teacher, teacher_head = hidden_and_heads(6, 517, dtype, 1)
    mask = torch.tensor([True, False, True, True, False, True])
    with torch.no_grad():
        student[1], teacher[4] = torch.nan, torch.inf
    options = {"reduction": reduction, "top_k": 40}
    upstream = torch.randn(6) if reduction == "none" else torch.tensor(2.0)
    loss = distill_kl(student, head, teacher, teacher_head, mask=mask, impl="emulated", **options)
    d_hidden, d_head = torch.autograd.grad(loss, (student, head), upstream)
    kept, weights = doubled([student.detach()[mask].requires_grad_(), head])
    want = distill_kl(kept, weights, teacher[mask].double(), teacher_head.double(), **options)
    upstream = upstream[mask].double() if reduction == "none" else upstream.double()
    w_hidden, w_head = torch.autograd.grad(want, (kept, weights), upstream)
    rounding = 1e-5 if dtype == torch.float32 else 0.02
    got = loss[mask] if reduction == "none" else loss
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=0)
    assert not d_hidden[~mask].any()
    assert relative(d_hidden[mask], w_hidden) < rounding
    assert relative(d_head, w_head) < rounding
    if reduction == "none":
        assert not loss[~mask].any()
    with torch.no_grad():
        assert torch.isnan(distill_kl(student, head, teacher, teacher_head, impl="emulated"))


@pytest.mark.parametrize("n", [0, 1])
@pytest.mark.parametrize("student_dtype", DTYPES)
def test_few_rows_and_mixed_dtypes(n, student_dtype):
    student, head, _, _ = hidden_and_heads(n, 70, student_dtype, 0)
    _, _, teacher, teacher_head = hidden_and_heads(n, 70, torch.bfloat16, 1)
    head = head.detach().float().requires_grad_()
    for mask in (None, torch.zeros(n)):
        got = distill_kl(student, head, teacher, teacher_head, mask=mask, impl="emulated")
        want = distill_kl(*doubled([student, head, teacher, teacher_head]), mask=mask)
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-9)
        for a, x in zip(torch.autograd.grad(got, (student, head)), (student, head)):
            assert a.dtype == x.dtype
            assert torch.isfinite(a).all()
            assert bool(a.any()) == (n > 0 and mask is None)


def test_equal_bits_under_every_schedule():
    student, head, teacher, teacher_head = hidden_and_heads(5, 4200, torch.bfloat16, 2)
    found = []
    for seed in (0, 1, 2):
        with schedule(seed):
            found.append(
                value_and_gradients(
                    lambda h, w: distill_kl(h, w, teacher, teacher_head, top_k=100, impl="emulated"), [student, head]
                )
            )
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))


@pytest.mark.parametrize("columns", [1, 7, 4096, 4101])
@pytest.mark.parametrize("stride", [4104, 4103, (1 << 31) + 4])  # aligned, not aligned, far apart
def test_each_operation_equals_its_plain_form(columns, stride, tmp_path):
    torch.manual_seed(columns)
    rows = 3 if stride < 1 << 20 else 2
    whole = torch.from_file(str(tmp_path / "logits"), shared=True, size=(rows - 1) * stride + columns)
    student = torch.as_strided(whole, (rows, columns), (stride, 1)).copy_(3 * torch.randn(rows, columns))
    teacher, weight = 3 * torch.randn(rows, columns), torch.tensor([0.5, 0.0, 2.0])[:rows]
    for bound in (None, torch.full((rows,), -1.0)):
        if bound is not None:
            bound = torch.minimum(bound, teacher.amax(1))
        statistics = ops.distill_statistics(student, teacher, bound, 1.5)
        want = plain.distill_statistics(student, teacher, bound, 1.5)
        torch.testing.assert_close(statistics, want, rtol=1e-5, atol=1e-6)
        for out_dtype in (None, torch.bfloat16, torch.float16):
            results = []
            for kernels in (ops, plain):
                mine = student.clone() if out_dtype else student.contiguous().clone()
                out = None if out_dtype is None else torch.empty(rows, columns, dtype=out_dtype)
                losses = kernels.distill_gradient_(mine, teacher, want, weight, bound, 1.5, out, True)
                results.append((losses, mine if out is None else out.float()))
            for a, b in zip(*results):
                torch.testing.assert_close(a, b, rtol=1e-2 if out_dtype else 1e-4, atol=1e-5)
        losses = ops.distill_gradient_(student, teacher, want, weight, bound, 1.5, None, False)
        torch.testing.assert_close(losses, results[0][0], rtol=0, atol=0)
    before = ops.distill_gradient_(student.clone(), teacher, want, weight, None, 1.5, None, True)
    after = ops.distill_gradient_(student, teacher, want, weight, None, 1.5, None, True)  # in place, far apart
    assert torch.equal(before, after)


def test_refuses_tensors_that_it_would_misread():
    logits = torch.zeros(3, 6)
    for arguments, message in [
        ((logits, logits[:, :5], None, 1.0), "alike"),
        ((logits.T, logits.T, None, 1.0), "must be adjacent"),
        ((logits.double(), logits, None, 1.0), "must be float32"),
        ((logits, logits, torch.zeros(4), 1.0), "bound must be"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            ops.distill_statistics(*arguments)
