"""The contrastive losses and the distillation on a GPU: errors, memory, CUDA graphs, no host synchronisation."""

from __future__ import annotations

import pytest
import torch

from compt_kernels import contrastive_loss, distill_kl, siglip_loss
from tests.kernels.loss_cases import (
    DTYPES,
    doubled,
    eager_clip,
    eager_distill,
    eager_siglip,
    hidden_and_heads,
    pairs,
    relative,
    value_and_gradients,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; this machine has none"),
]


def moved(tensors):
    return [x.detach().cuda().requires_grad_(x.requires_grad) for x in tensors]


def losses(dtype):
    """name -> (by the kernels, eager on the CPU, tensors on the CPU)."""
    image, text, labels = pairs(515, 96, dtype, 0, easy=0.3, spread=200)
    scale, bias = torch.tensor(40.0, requires_grad=True), torch.tensor(-8.0, requires_grad=True)
    student, head, teacher, teacher_head = hidden_and_heads(70, 9001, dtype, 1, width=64, teacher_width=96)
    on_gpu = labels.cuda()
    return {
        "clip": (lambda *x: contrastive_loss(*x, impl="cuda"), eager_clip, [image, text, scale]),
        "clip labels": (
            lambda *x: contrastive_loss(*x, on_gpu, impl="cuda"),
            lambda *x: eager_clip(*x, labels),
            [image, text, scale],
        ),
        "siglip": (lambda *x: siglip_loss(*x, impl="cuda"), eager_siglip, [image, text, scale, bias]),
        "distill": (
            lambda *x: distill_kl(*x, temperature=2.0, impl="cuda"),
            lambda *x: eager_distill(*x, temperature=2.0),
            [student, head, teacher, teacher_head],
        ),
        "distill top_k": (
            lambda *x: distill_kl(*x, top_k=100, impl="cuda"),
            lambda *x: eager_distill(*x, top_k=100),
            [student, head, teacher, teacher_head],
        ),
    }


NAMES = ("clip", "clip labels", "siglip", "distill", "distill top_k")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_errors_and_equal_bits(name, dtype, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    kernels, eager, tensors = losses(dtype)[name]
    got = value_and_gradients(kernels, moved(tensors), upstream=1 / 3)
    want = value_and_gradients(eager, doubled(tensors), upstream=1 / 3)
    found = value_and_gradients(eager, tensors, upstream=1 / 3)
    for a, b, c in zip(got, want, found):
        least = 2e-5 if dtype == torch.float32 else 0.0
        assert relative(a.cpu(), b) <= max(1.1 * relative(c, b), least), name
    again = value_and_gradients(kernels, moved(tensors), upstream=1 / 3)
    assert all(torch.equal(a, b) for a, b in zip(got, again))


@pytest.mark.parametrize("name", NAMES)
def test_no_host_synchronisation_and_cuda_graphs(name):
    kernels, _, tensors = losses(torch.bfloat16)[name]
    tensors = moved(tensors)
    want = value_and_gradients(kernels, tensors)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        value_and_gradients(kernels, tensors)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        value_and_gradients(kernels, tensors)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = value_and_gradients(kernels, tensors)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want))


@pytest.mark.parametrize("name", NAMES)
def test_compiles_to_one_graph(name):
    kernels, _, tensors = losses(torch.bfloat16)[name]
    tensors = moved(tensors)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: kernels(*x) * 2, fullgraph=True)
    for a, b in zip(value_and_gradients(compiled, tensors), value_and_gradients(lambda *x: kernels(*x) * 2, tensors)):
        torch.testing.assert_close(a, b, rtol=1e-2 if a.dtype == torch.bfloat16 else 1e-6, atol=1e-6)


def extra(function, tensors):
    """Bytes at the peak beside the gradients that are returned."""
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    _, *gradients = value_and_gradients(function, tensors)
    return torch.cuda.max_memory_allocated() - before - sum(x.numel() * x.element_size() for x in gradients)


def test_memory_of_the_promises():
    if torch.cuda.get_device_properties(0).total_memory < 30e9:
        pytest.skip("needs 30 GB of GPU memory")
    features = [torch.randn(131072, 768, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(2)]
    scale = torch.tensor(10.0, device="cuda", requires_grad=True)
    assert extra(lambda *x: contrastive_loss(*x, impl="cuda"), [*features, scale]) < 4e9
    del features
    hidden = [torch.randn(8192, 4096, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    heads = [torch.randn(131072, 4096, device="cuda", dtype=torch.bfloat16) / 64 for _ in range(2)]
    tensors = [hidden[0].requires_grad_(), heads[0].requires_grad_(), hidden[1], heads[1]]
    assert extra(lambda *x: distill_kl(*x, impl="cuda"), tensors) < 2.5e9
