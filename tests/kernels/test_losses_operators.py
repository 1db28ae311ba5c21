"""The losses as torch operators: opcheck, torch.compile in one graph, checkpoints, retained graphs."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from compt_kernels import contrastive_loss, distill_kl, siglip_loss
from compt_kernels.build import load_emulated
from tests.kernels.loss_cases import hidden_and_heads, pairs, value_and_gradients

ops = torch.ops.compt_kernels
load = pytest.fixture(scope="module", autouse=True)(lambda: load_emulated())


def losses():
    """name -> (function of its leaves, leaves)."""
    image, text, labels = pairs(9, 8, torch.bfloat16, 0, spread=4)
    scale, bias = torch.tensor(10.0, requires_grad=True), torch.tensor(-3.0, requires_grad=True)
    student, head, teacher, teacher_head = hidden_and_heads(5, 40, torch.bfloat16, 1)
    mask = torch.tensor([1.0, 0, 2, 1, 1])
    return {
        "clip": (lambda i, t, s: contrastive_loss(i, t, s, impl="emulated"), [image, text, scale]),
        "clip labels": (lambda i, t, s: contrastive_loss(i, t, s, labels, impl="emulated"), [image, text, scale]),
        "siglip": (lambda i, t, s, b: siglip_loss(i, t, s, b, impl="emulated"), [image, text, scale, bias]),
        "distill": (
            lambda h, w: distill_kl(h, w, teacher, teacher_head, 2.0, mask, 7, impl="emulated"),
            [student, head],
        ),
        "distill rows": (
            lambda h, w: distill_kl(h, w, teacher, teacher_head, mask=mask, reduction="none", impl="emulated").sum(),
            [student, head],
        ),
    }


NAMES = ("clip", "clip labels", "siglip", "distill", "distill rows")


@pytest.mark.parametrize("name", NAMES)
def test_compiles_to_one_graph(name):
    function, leaves = losses()[name]

    def step(*leaves):
        return function(*(x * 1 for x in leaves)) * 2

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for a, b in zip(value_and_gradients(compiled, leaves), value_and_gradients(step, leaves)):
        torch.testing.assert_close(a, b, rtol=1e-2 if a.dtype == torch.bfloat16 else 1e-6, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_under_a_checkpoint_and_with_a_retained_graph(name):
    function, leaves = losses()[name]
    want = value_and_gradients(function, leaves)
    again = value_and_gradients(lambda *x: checkpoint(function, *x, use_reentrant=False), leaves)
    assert all(torch.equal(a, b) for a, b in zip(again, want))
    loss = function(*leaves)
    for _ in range(2):
        for a, b in zip(torch.autograd.grad(loss, leaves, torch.tensor(1.0), retain_graph=True), want[1:]):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_a_second_derivative_is_refused(name):
    function, leaves = losses()[name]
    with pytest.raises(RuntimeError, match="cannot be differentiated"):
        torch.autograd.grad(function(*leaves), leaves, create_graph=True)


@pytest.mark.parametrize("name", NAMES)
def test_autocast_changes_nothing(name):
    function, leaves = losses()[name]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = value_and_gradients(function, [x.detach().float().requires_grad_() for x in leaves])
    want = value_and_gradients(function, [x.detach().float().requires_grad_() for x in leaves])
    assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_opcheck():
    image, text, labels = (x.detach() for x in pairs(6, 4, torch.float32, 0, spread=3))
    scale, bias, tile = torch.tensor(5.0), torch.tensor(-1.0), 1 << 20
    student, head, teacher, teacher_head = (x.detach() for x in hidden_and_heads(4, 10, torch.bfloat16, 1))
    state = torch.zeros(5, 6), torch.zeros(4, 6)
    vectors = torch.rand(4, 6), torch.rand(3, 6)
    loss, rows, columns, *_ = ops.contrastive_forward(image, text, scale, None, "", tile, False, False, False, False)
    calls = [
        (ops.nce_statistics_, (image @ text.T, scale, *state, 0, labels, labels)),
        (ops.nce_gradient_, (image @ text.T, scale, *vectors, 1, None, None, None, 1.0)),
        (ops.nce_gradient_, (image @ text.T, scale, *vectors, 1, labels, labels, torch.empty(6, 6).half(), 2.0)),
        (ops.sigmoid_tile_, (image @ text.T, scale, bias, 0, None, None, None, 1.0, True)),
        (ops.contrastive_forward, (image, text, scale, labels, "", tile, False, True, True, False)),
        (ops.contrastive_backward, (loss, image, text, scale, rows, columns, None, None, "", tile, False, True, True)),
        (ops.siglip_forward, (image, text, scale, bias, None, "", tile, False, True, True, True)),
        (ops.distill_statistics, (student.float(), student.float() + 1, None, 1.0)),
        (
            ops.distill_gradient_,
            (student.float(), student.float() + 1, torch.ones(4, 4), torch.ones(4), None, 1.0, None, True),
        ),
        (
            ops.distill,
            (student, head, teacher, teacher_head, torch.ones(4), 1.0, 3, True, "", 1, False, True, True),
        ),
    ]
    for op, arguments in calls:
        torch.library.opcheck(op, arguments)
