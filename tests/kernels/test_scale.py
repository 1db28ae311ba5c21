"""The upstream gradient on the emulated kernel: any factor, one or one a row; 1 touches nothing."""

from __future__ import annotations

import pytest
import torch

from compt_kernels.build import load_emulated
from compt_kernels.ops.scale import scaled


@pytest.fixture(scope="module", autouse=True)
def _kernels() -> None:
    load_emulated()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(5, 7), (4, 264), (1, 8), (0, 8), (3, 0)])
@pytest.mark.parametrize("a_row", [False, True])
@pytest.mark.parametrize("unit", [None, 0.125])
def test_equals_the_product(dtype: torch.dtype, shape: tuple[int, int], a_row: bool, unit: float | None) -> None:
    torch.manual_seed(0)
    gradient = torch.randn(shape).to(dtype)
    factor = torch.randn(shape[0]) if a_row else torch.tensor(3.7)
    held = None if unit is None else torch.tensor(unit)
    want = (gradient.float() * factor.unsqueeze(-1) * (unit or 1)).to(dtype)
    torch.ops.compt_kernels.scale_rows(gradient, factor, held)
    assert torch.equal(gradient, want)


def test_one_touches_nothing_and_a_kept_graph_gets_a_copy() -> None:
    gradient = torch.full((2, 8), float("nan"))
    gradient[0] = 2
    before = gradient.clone().view(torch.int32)
    torch.ops.compt_kernels.scale_rows(gradient, torch.ones(()), None)
    assert torch.equal(gradient.view(torch.int32), before)

    class Held(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):  # type: ignore[no-untyped-def]
            ctx.save_for_backward(torch.full((2, 8), 3.0))
            return x.sum()

        @staticmethod
        def backward(ctx, upstream):  # type: ignore[no-untyped-def]
            return scaled(ctx.saved_tensors[0], upstream)

    x = torch.zeros(2, 8, requires_grad=True)
    loss = Held.apply(x)
    for _ in range(2):
        x.grad = None
        (2 * loss).backward(retain_graph=True)
        assert torch.equal(x.grad, torch.full((2, 8), 6.0))
    x.grad = None
    (2 * loss).backward()
    assert torch.equal(x.grad, torch.full((2, 8), 6.0))


def test_opcheck() -> None:
    op = torch.ops.compt_kernels.scale_rows.default
    torch.library.opcheck(op, (torch.randn(3, 8), torch.tensor(2.0), None))
    torch.library.opcheck(op, (torch.randn(3, 5), torch.randn(3), torch.tensor(0.5)))
