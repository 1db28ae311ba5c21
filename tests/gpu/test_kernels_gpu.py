"""The alignment kernels on a GPU: against fp64, odd strides, repeatability, CUDA graphs, memory and launches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compt_kernels import align_loss
from tests.kernels.test_align import DTYPES, error, random_cases, results

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; this machine has none"),
]


def moved(x: torch.Tensor) -> torch.Tensor:
    """On the GPU, with the strides it has here."""
    span = sum((n - 1) * s for n, s in zip(x.shape, x.stride())) + 1
    flat = torch.empty(span + x.storage_offset(), dtype=x.dtype, device="cuda")
    return flat.as_strided(x.shape, x.stride(), x.storage_offset()).copy_(x) if x.numel() else x.cuda()


def test_as_exact_as_eager() -> None:
    limits = {torch.float32: 2e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3}
    for student, teacher, settings, upstream in random_cases(120):
        wide = results("eager", student.double(), teacher.double(), **settings)
        if student.dtype == torch.float16:
            upstream *= 2.0 ** -torch.frexp(wide[1].abs().max()).exponent
        if 0 in teacher.stride():
            teacher = teacher.contiguous()
        options = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in settings.items()}
        loss, gradient = results("cuda", moved(student), moved(teacher), upstream=upstream, **options)
        assert error(loss.cpu(), wide[0]) < 1e-6, settings
        assert error(gradient.cpu(), wide[1] * upstream) < limits[student.dtype], settings


@pytest.mark.parametrize("dtype", DTYPES)
def test_projection(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    student, weight, bias = (torch.randn(s).to(dtype) for s in ((517, 256), (384, 256), (384,)))
    teacher, row_weight = torch.randn(517, 384).to(dtype), torch.rand(517)
    wide = results(
        "eager", *(x.double() for x in (student, teacher, weight, bias)), row_weight=row_weight, upstream=1024
    )
    tensors = [x.cuda() for x in (student, teacher, weight, bias)]
    ours = results("cuda", *tensors, row_weight=row_weight.cuda(), upstream=1024)
    eager = results("eager", *tensors, row_weight=row_weight.cuda(), upstream=1024)
    for got, plain, want in zip(ours, eager, wide):
        assert error(got.cpu(), want) < 1.1 * error(plain.cpu(), want) + 1e-7


@pytest.mark.parametrize("shape", [(64, 768), (70000, 256), (300, 4096), (300, 8192), (300, 1001)])
def test_repeats_bit_for_bit(shape: tuple[int, int]) -> None:
    student, teacher, row_weight = (torch.randn(s, device="cuda") for s in (shape, shape, shape[:1]))
    first, second = (results("cuda", student, teacher, row_weight=row_weight.abs()) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("linear", [False, True])
def test_cuda_graph(linear: bool) -> None:
    """Captured once, replayed on new features: no host synchronisation, no shape that depends on data."""
    student, teacher = (torch.randn(512, 768, device="cuda") for _ in range(2))
    params = [
        student.requires_grad_(),
        *((torch.randn(768, 768, device="cuda", requires_grad=True),) if linear else ()),
    ]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            torch.autograd.grad(align_loss(params[0], teacher, *params[1:], impl="cuda"), params)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        loss = align_loss(params[0], teacher, *params[1:], impl="cuda")
        gradients = torch.autograd.grad(loss, params)
    with torch.no_grad():
        teacher.copy_(torch.randn(512, 768))
    graph.replay()
    want = results("cuda", params[0], teacher, *params[1:])
    for got, expected in zip((loss.detach(), *gradients), want):
        torch.testing.assert_close(got, expected)


def test_extra_memory_is_one_gradient() -> None:
    student = torch.randn(65536, 768, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    teacher = torch.randn(65536, 768, device="cuda", dtype=torch.bfloat16)
    align_loss(student[:8], teacher[:8], impl="cuda").backward()
    student.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    align_loss(student, teacher, impl="cuda").backward()
    assert torch.cuda.max_memory_allocated() - before < 1.01 * student.numel() * 2


def test_two_launches_for_few_rows() -> None:
    student = torch.randn(4096, 768, device="cuda", requires_grad=True)
    teacher, row_weight = torch.randn(4096, 768, device="cuda"), torch.rand(4096, device="cuda")
    upstream = torch.ones((), device="cuda")
    for options in ({}, {"row_weight": row_weight}):
        arguments: dict[str, Any] = {"impl": "cuda", **options}
        torch.autograd.grad(align_loss(student, teacher, **arguments), student, upstream)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            torch.autograd.grad(align_loss(student, teacher, **arguments), student, upstream)
            torch.cuda.synchronize()
        kernels = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        assert len(kernels) <= 2, kernels
