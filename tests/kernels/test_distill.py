"""KL of vocabulary distributions: the reference against its formula, the chunks against the reference."""

from __future__ import annotations

from math import exp, log

import pytest
import torch

from compt_kernels import distill_kl
from compt_kernels.build import load_emulated
from compt_kernels.ops import distill as ops
from compt_kernels.ops.distill import MEMORY, Plan, distill_loss, plan
from tests.kernels.allocations import peak_bytes
from tests.kernels.loss_cases import eager_distill, hidden_and_heads, value_and_gradients

FP64 = torch.float64


def by_loops(student, head, teacher, teacher_head, temperature, weight, top_k):
    def softmax(hidden, weights, best=None):
        z = [sum(a * b for a, b in zip(hidden, column)) / temperature for column in weights]
        bound = sorted(z)[-best] if best else min(z)
        total = sum(exp(v) for v in z if v >= bound)
        return [exp(v) / total if v >= bound else 0.0 for v in z]

    total = 0.0
    for i, count in enumerate(weight.tolist()):
        p = softmax(teacher[i].tolist(), teacher_head.tolist(), top_k)
        q = softmax(student[i].tolist(), head.tolist())
        total += count * sum(a * (log(a) - log(b)) for a, b in zip(p, q) if a)
    return total / float(weight.sum())


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("top_k", [None, 3, 11, 40])
def test_reference_is_the_formula(temperature, top_k):
    tensors = [x.detach() for x in hidden_and_heads(5, 11, FP64, 0)]
    weight = torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0], dtype=FP64)
    want = by_loops(*tensors, temperature, weight, top_k if top_k != 40 else None)
    got = distill_kl(*tensors, temperature=temperature, mask=weight, top_k=top_k)
    assert float(got) == pytest.approx(want, rel=1e-12)
    eager = eager_distill(*tensors, temperature, weight, min(top_k, 11) if top_k else None)
    assert float(eager) == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("top_k", [None, 4])
def test_gradients_are_those_of_the_loss(top_k):
    student, head, teacher, teacher_head = hidden_and_heads(5, 9, FP64, 1, width=3, teacher_width=4)
    mask = torch.tensor([True, True, False, True, True])
    check = torch.autograd.gradcheck
    for reduction in ("mean", "none"):
        options = {"temperature": 1.7, "mask": mask, "top_k": top_k, "reduction": reduction}
        assert check(lambda h, w, o=options: distill_kl(h, w, teacher, teacher_head, **o), (student, head))
    weight = mask.double() / 4
    for reduce in (True, False):
        assert check(
            lambda h, w, r=reduce: distill_loss(h, w, teacher, teacher_head, weight, 1.7, top_k, True, r, "", 1, True),
            (student, head),
        )


@pytest.mark.parametrize("n", [0, 1, 5, 300])
@pytest.mark.parametrize("memory", [MEMORY, 1])  # one chunk, and as many as there can be
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("masked", [False, True])
def test_chunks_equal_the_reference(n, memory, reduction, masked):
    tensors = hidden_and_heads(n, 13, FP64, n)
    mask = (torch.rand(n, dtype=FP64) * (torch.rand(n) > 0.3)) if masked else None
    weight = torch.ones(n, dtype=FP64) if mask is None else mask
    if reduction == "mean":
        weight = weight / max(float(weight.sum()), 1e-30)
    upstream = torch.randn(n, dtype=FP64) if reduction == "none" else torch.tensor(-2.0, dtype=FP64)
    for top_k in (None, 4):
        got = distill_loss(*tensors, weight, 1.5, top_k, masked, reduction != "none", "", memory, True)
        want = distill_kl(*tensors, temperature=1.5, mask=mask, top_k=top_k, reduction=reduction)
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-14)
        for a, b in zip(*(torch.autograd.grad(loss, tensors[:2], upstream) for loss in (got, want))):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_rows_that_do_not_count_may_hold_anything(broken):
    mask = torch.tensor([True, False, True, False, True])
    student, head, teacher, teacher_head = hidden_and_heads(5, 17, FP64, 2)
    with torch.no_grad():
        student[1], teacher[3] = broken, broken
    kept, others = student.detach()[mask].requires_grad_(), (teacher[mask], teacher_head)
    want = value_and_gradients(lambda h, w: distill_kl(h, w, *others), [kept, head])

    def reference(student, head):
        return distill_kl(student, head, teacher, teacher_head, mask=mask)

    def chunks(student, head):
        options = (mask.double() / 3, 1.0, None, True, True, "", 1, True)
        return distill_loss(student, head, teacher, teacher_head, *options)

    for function in (reference, chunks):
        loss, d_hidden, d_head = value_and_gradients(function, [student, head])
        torch.testing.assert_close(loss, want[0])
        torch.testing.assert_close(d_hidden[mask], want[1])
        assert not d_hidden[~mask].any()
        torch.testing.assert_close(d_head, want[2])


@pytest.mark.parametrize("top_k", [None, 3])
def test_a_broken_model_shows(top_k):
    for who in (0, 2):
        tensors = [x.detach() for x in hidden_and_heads(5, 17, FP64, 2)]
        tensors[who][1] = torch.nan
        assert torch.isnan(distill_kl(*tensors, top_k=top_k))
        assert torch.isnan(distill_loss(*tensors, torch.ones(5, dtype=FP64), 1.0, top_k, False, True, "", 1, True))


def test_only_the_gradients_that_are_asked_for():
    student, head, teacher, teacher_head = (x.detach() for x in hidden_and_heads(9, 13, FP64, 3))
    for hidden_gradient in (False, True):
        for head_gradient in (False, True):
            leaves = [student.clone().requires_grad_(hidden_gradient), head.clone().requires_grad_(head_gradient)]
            weight = torch.full((9,), 1 / 9, dtype=FP64)
            loss = distill_loss(*leaves, teacher, teacher_head, weight, 1.0, None, False, True, "", 1, True)
            want = distill_kl(*leaves, teacher, teacher_head)
            asked = [x for x in leaves if x.requires_grad]
            assert loss.requires_grad == want.requires_grad == bool(asked)
            if asked:
                for a, b in zip(torch.autograd.grad(loss, asked), torch.autograd.grad(want, asked)):
                    torch.testing.assert_close(a, b)


def test_leading_dimensions():
    student, head, teacher, teacher_head = (x.detach() for x in hidden_and_heads(6, 13, FP64, 4))
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]], dtype=torch.bool)
    shaped = (student.view(2, 3, -1), head, teacher.view(2, 3, -1), teacher_head)
    assert distill_kl(*shaped, mask=mask, reduction="none").shape == (2, 3)
    flat = distill_kl(student, head, teacher, teacher_head, mask=mask.flatten())
    assert torch.equal(distill_kl(*shaped, mask=mask), flat)


def logit_bytes(found: Plan, vocabulary, hidden, tokens, dtype):
    """As `plan` counts them, for a gradient of the head."""
    if dtype == torch.float32:
        return 4 * vocabulary * (found.chunk + found.kept)
    weights = 4 * vocabulary * hidden if dtype == torch.float16 or found.kept < tokens else 0
    return vocabulary * (8 * found.chunk + 2 * found.kept) + weights


def test_plans():
    for vocabulary in (128_000, 128_256, 131_072):
        found = plan(8192, vocabulary, 4096, torch.bfloat16, True, MEMORY)
        assert found.kept == 8192
        assert found.chunk >= 256
        mask_copy = 2 * 8192 * 4096
        assert logit_bytes(found, vocabulary, 4096, 8192, torch.bfloat16) + mask_copy <= 2.5e9
        found = plan(8192, vocabulary, 4096, torch.float32, True, MEMORY)
        assert logit_bytes(found, vocabulary, 4096, 8192, torch.float32) <= 2.5e9
    for dtype in (torch.float32, torch.bfloat16, torch.float16, FP64):
        for tokens in (1, 3, 127, 5000, 40000):
            for head_gradient in (False, True):
                found = plan(tokens, 50257, 768, dtype, head_gradient, MEMORY)
                assert 1 <= found.chunk <= found.kept <= tokens


def test_memory_is_as_planned():
    """What is there at once is what the plan says."""
    load_emulated()
    student, head, teacher, teacher_head = (x.detach() for x in hidden_and_heads(512, 304, torch.float32, 5))
    weight, memory = torch.full((512,), 1 / 512), 4 * 304 * (256 + 512)
    found = plan(512, 304, 16, torch.float32, True, memory)
    assert found == Plan(256, 512)
    results = 4 * (student.numel() + head.numel())
    arguments = (student, head, teacher, teacher_head, weight, 1.0, None, False, "", memory)
    peak = peak_bytes(lambda: ops._distill(*arguments, False, True, True))
    assert 0 <= peak - results - logit_bytes(found, 304, 16, 512, torch.float32) <= 40 * 512


def test_refuses_what_does_not_fit():
    tensors = [x.detach() for x in hidden_and_heads(4, 7, torch.float32, 6)]
    for options, message in [
        ({"temperature": 0.0}, "temperature=0.0 must be above 0"),
        ({"top_k": 0}, "top_k=0 at least 1"),
        ({"reduction": "batchmean"}, "expected one of mean, sum, none"),
        ({"mask": torch.ones(5)}, "the same tokens"),
    ]:
        with pytest.raises(ValueError, match=message):
            distill_kl(*tensors, **options)
    with pytest.raises(ValueError, match="heads of 7 and 6 columns"):
        distill_kl(*tensors[:3], tensors[3][:6])
