"""What the benchmark runs: each operation with its sizes, its rivals, its model of bytes and operations, its bars."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import torch
from torch.nn import functional as F

from compt_kernels import align_loss, contrastive_loss, distill_kl, siglip_loss
from compt_kernels.ops.distill import MEMORY, plan
from compt_kernels.ops.pairs import TILE, blocks

Impl = Literal["cuda", "eager", "emulated"]
Tensors = list[torch.Tensor]


@dataclass(frozen=True)
class Bar:
    """A promise: the ratio named `of` is at most (or at least) `bound`."""

    of: str
    bound: float
    at_most: bool

    def met(self, ratio: float) -> bool:
        return ratio <= self.bound if self.at_most else ratio >= self.bound


@dataclass(frozen=True)
class Case:
    """One row of the table. Steps run forward and backward; `make` returns fresh tensors, leaves require gradients."""

    name: str
    make: Callable[[torch.device], Tensors]
    ours: Callable[[Tensors, Impl], torch.Tensor]
    rivals: dict[str, Callable[[Tensors], torch.Tensor]]
    bytes: float  # what the kernels read and write, beside the products
    operations: float  # of our products
    bars: tuple[Bar, ...]
    bare_operations: float = 0  # of the bare products that a bar compares with
    extra: float | None = None  # bytes beside the results, by the model
    rival_bytes: dict[str, float] = field(default_factory=dict)  # what rivals read and write, by the model
    products: Callable[[Tensors], None] | None = None  # the bare products, run as they would be alone
    results: int = 0  # bytes of the gradients, that do not count as extra memory
    launch_bar: int | None = None


def backward(loss: torch.Tensor, tensors: Tensors) -> None:
    torch.autograd.grad(loss, [x for x in tensors if x.requires_grad], _one(loss.device, loss.dtype))


@cache
def _one(device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """The upstream gradient, made once: a launch that is nobody's."""
    return torch.ones((), device=device, dtype=dtype)


def all_cases(small: bool) -> list[Case]:
    """Every promise of the project's kernels; `small` shrinks the sizes for a run that only shows that all runs."""
    n = (lambda size: max(size // 4096, 3)) if small else (lambda size: size)
    width = (lambda size: 8 + size // 512) if small else (lambda size: size)
    return [
        *(align(n(rows), width(d)) for rows, d in ((65536, 1024), (262144, 768), (16384, 4096))),
        align(n(4096), width(768), few=True),
        align(n(1024), width(1024), few=True),
        align_projected(n(65536), width(1024), width(768), 1.25),
        align_projected(n(65536), width(4096), width(8192), 1.1),
        clip(n(16384), width(768)),
        clip(n(131072), width(768)),
        siglip(n(131072), width(768)),
        distill(n(8192), n(131072), width(4096)),
    ]


def normal(*shape: int, device: torch.device, leaf: bool = False) -> torch.Tensor:
    return torch.randn(*shape, device=device, dtype=torch.bfloat16).requires_grad_(leaf)


def eager_align(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return F.mse_loss(F.normalize(student, dim=-1), F.normalize(teacher, dim=-1))


@cache
def compiled_align() -> Callable[..., torch.Tensor]:
    return torch.compile(eager_align)


def under_autocast(function: Callable[..., torch.Tensor], tensors: Tensors) -> torch.Tensor:
    with torch.autocast(tensors[0].device.type, dtype=torch.bfloat16):
        return function(*tensors)


def align(rows: int, d: int, few: bool = False) -> Case:
    size = 2 * rows * d
    bars = (
        (Bar("eager bf16", 3, False),)
        if few
        else (
            Bar("copy", 0.85, False),
            Bar("eager autocast", 12, False),
            Bar("eager bf16", 7, False),
            Bar("torch.compile", 1.5, False),
            Bar("extra memory", 0.05 * size, True),
        )
    )
    return Case(
        f"align_loss {rows} x {d}",
        lambda device: [normal(rows, d, device=device, leaf=True), normal(rows, d, device=device)],
        lambda x, impl: align_loss(x[0], x[1], impl=impl),
        {
            "eager autocast": lambda x: under_autocast(eager_align, x),
            "eager bf16": lambda x: eager_align(*x),
            "torch.compile": lambda x: compiled_align()(*x),
        },
        bytes=3 * size,
        operations=0,
        bars=bars,
        extra=0,
        rival_bytes={"eager autocast": 58 * size, "eager bf16": 28 * size, "torch.compile": 6 * size},
        results=size,
        launch_bar=2 if few else None,
    )


def eager_projected(
    student: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, teacher: torch.Tensor
) -> torch.Tensor:
    return eager_align(F.linear(student, weight, bias), teacher)


def align_projected(rows: int, d_s: int, d_t: int, most: float) -> Case:
    def products(x: Tensors) -> None:
        student, weight, _, teacher = (t.detach() for t in x)
        torch.mm(student, weight.T), torch.mm(teacher, weight), torch.mm(teacher.T, student)

    return Case(
        f"align_loss {rows} x {d_s} -> {d_t}",
        lambda device: [
            normal(rows, d_s, device=device, leaf=True),
            normal(d_t, d_s, device=device, leaf=True),
            normal(d_t, device=device, leaf=True),
            normal(rows, d_t, device=device),
        ],
        lambda x, impl: align_loss(x[0], x[3], x[1], x[2], impl=impl),
        {"eager autocast": lambda x: under_autocast(eager_projected, x), "eager bf16": lambda x: eager_projected(*x)},
        bytes=2 * 3 * rows * d_t,
        operations=3 * 2 * rows * d_s * d_t,
        bare_operations=3 * 2 * rows * d_s * d_t,
        bars=(Bar("products", most, True),),
        products=products,
        results=2 * (rows * d_s + d_t * d_s + d_t),
    )


def pair(rows: int, d: int, device: torch.device, *scalars: float) -> Tensors:
    features = [F.normalize(normal(rows, d, device=device), dim=1).requires_grad_() for _ in range(2)]
    return features + [torch.tensor(value, device=device, requires_grad=True) for value in scalars]


def pair_products(x: Tensors, forwards: int) -> None:
    """Of all pairs, by 16,384 rows at a time: `forwards` times the logits, and their gradient times each side."""
    image, text = (t.detach() for t in x[:2])
    step = min(16384, len(image))
    slopes = torch.empty(step, step, dtype=image.dtype, device=image.device)
    out, grad = torch.empty_like(slopes), torch.empty(step, image.shape[1], dtype=image.dtype, device=image.device)
    for top in range(0, len(image), step):
        for left in range(0, len(image), step):
            a, b = image[top : top + step], text[left : left + step]
            rows, columns = len(a), len(b)
            for _ in range(forwards):
                torch.mm(a, b.T, out=out[:rows, :columns])
            torch.mm(slopes[:rows, :columns], b, out=grad[:rows])
            torch.mm(slopes[:rows, :columns].T, a, out=grad[:columns])


def pair_extra(rows: int, d: int) -> float:
    """A tile of logits and of 16-bit gradients, and both sides' sums in fp32."""
    high, wide = blocks(rows, rows, TILE)
    return (4 + 2) * high * wide + 2 * 4 * rows * d


def eager_clip(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    logits = scale * image @ text.T
    target = torch.arange(len(image), device=image.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def eager_siglip(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    logits = scale * image @ text.T + bias
    signs = 2 * torch.eye(len(image), device=image.device, dtype=logits.dtype) - 1
    return -F.logsigmoid(signs * logits).sum() / len(image)


def clip(rows: int, d: int) -> Case:
    """Bytes: each logit is read for the sums, then read and written back in 2 bytes for the gradient."""
    fits = rows <= 16384
    bars = [Bar("products", 1.7, True)]
    bars += [Bar("eager bf16", 2, False)] if fits else [Bar("extra memory", 4e9, True)]
    return Case(
        f"contrastive_loss {rows} x {d}",
        lambda device: pair(rows, d, device, 30.0),
        lambda x, impl: contrastive_loss(x[0], x[1], x[2], impl=impl),
        {"eager bf16": lambda x: eager_clip(*x), "eager autocast": lambda x: under_autocast(eager_clip, x)}
        if fits
        else {},
        bytes=(4 + 4 + 2) * rows**2,
        operations=(3 if fits else 4) * 2 * rows**2 * d,
        bars=tuple(bars),
        bare_operations=4 * 2 * rows**2 * d,
        extra=pair_extra(rows, d),
        products=lambda x: pair_products(x, 2),
        results=4 * rows * d,
    )


def siglip(rows: int, d: int) -> Case:
    return Case(
        f"siglip_loss {rows} x {d}",
        lambda device: pair(rows, d, device, 10.0, -10.0),
        lambda x, impl: siglip_loss(*x, impl=impl),
        {"eager bf16": lambda x: eager_siglip(*x)} if rows <= 16384 else {},
        bytes=(4 + 2) * rows**2,
        operations=3 * 2 * rows**2 * d,
        bars=(Bar("products", 1.7, True), Bar("extra memory", 4e9, True)),
        bare_operations=4 * 2 * rows**2 * d,
        extra=pair_extra(rows, d),
        products=lambda x: pair_products(x, 2),
        results=4 * rows * d,
    )


def eager_distill(
    student: torch.Tensor, head: torch.Tensor, teacher: torch.Tensor, teacher_head: torch.Tensor
) -> torch.Tensor:
    with torch.no_grad():
        target = torch.log_softmax((teacher @ teacher_head.T).float(), dim=1)
    found = torch.log_softmax((student @ head.T).float(), dim=1)
    return F.kl_div(found, target, reduction="batchmean", log_target=True)


def distill(tokens: int, vocabulary: int, hidden: int) -> Case:
    def products(x: Tensors) -> None:
        """Student and teacher logits, dH and dW; of 1024 tokens at a time, as all do not fit."""
        student, head, teacher, teacher_head = (t.detach() for t in x)
        step = min(1024, tokens)
        logits = torch.empty(step, vocabulary, dtype=student.dtype, device=student.device)
        for start in range(0, tokens, step):
            rows = slice(start, min(start + step, tokens))
            out = logits[: rows.stop - start]
            torch.mm(student[rows], head.T, out=out)
            torch.mm(teacher[rows], teacher_head.T, out=out)
            torch.mm(out, head)
            torch.mm(out.T, student[rows])

    results = 2 * (tokens * hidden + vocabulary * hidden)
    found = plan(tokens, vocabulary, hidden, torch.bfloat16, True, MEMORY)
    return Case(
        f"distill_kl {tokens} x {vocabulary}, hidden {hidden}",
        lambda device: [
            normal(tokens, hidden, device=device, leaf=True),
            (normal(vocabulary, hidden, device=device) / hidden**0.5).requires_grad_(),
            normal(tokens, hidden, device=device),
            normal(vocabulary, hidden, device=device) / hidden**0.5,
        ],
        lambda x, impl: distill_kl(*x, impl=impl),
        {"eager bf16": lambda x: eager_distill(*x), **liger()},
        bytes=(8 + 8 + 2) * tokens * vocabulary,
        operations=4 * 2 * tokens * vocabulary * hidden,
        bare_operations=4 * 2 * tokens * vocabulary * hidden,
        extra=8 * vocabulary * found.chunk + 2 * vocabulary * found.kept,
        bars=(
            Bar("products", 1.5, True),
            Bar("extra memory", 2.5e9, True),
            Bar("Liger fused_linear_jsd", 1, False),
            Bar("Liger chunked JSD", 1, False),
        ),
        products=products,
        results=results,
    )


def liger() -> dict[str, Callable[[Tensors], torch.Tensor]]:
    """Liger-Kernel's distillation losses, where it is installed: the same KL (its beta 0), and its chunked JSD."""
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
        from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD
    except ImportError:
        return {}
    fused = LigerFusedLinearJSD(jsd_beta=0.0)
    chunked: Any = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0)

    def run_chunked(x: Tensors) -> torch.Tensor:
        labels = torch.zeros(len(x[0]), dtype=torch.int64, device=x[0].device)
        found = chunked(x[0], x[1], x[2], x[3], labels)
        return found[0] if isinstance(found, tuple) else found

    return {
        "Liger fused_linear_jsd": lambda x: fused(x[0], x[1], x[2], x[3], None),
        "Liger chunked JSD": run_chunked,
    }
