"""The alignment with its features on two ranks: the loss of all features on both, each its part of the gradient."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
import torch.distributed as dist

from compt_kernels import align_loss, align_loss_parallel
from tests.distributed.spawn import run_ranks

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASES = list(product(("l2", "layer", "none"), ("mse", "cosine", "smooth_l1")))
SPLIT = 24  # of 40 features: the ranks' parts may differ


def features(case: int, misfit: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Student, teacher and row weights, with rows that do not count."""
    torch.manual_seed(case)
    teacher = torch.randn(2, 6, 40)
    student = teacher + misfit * torch.randn(2, 6, 40) if misfit else torch.randn(2, 6, 40)
    row_weight = torch.rand(2, 6) + 0.1
    row_weight[0, 1] = 0
    student[0, 1], student[0, 2], teacher[1, 3], student[1, 4] = float("nan"), 0, 0, 0.1
    return student, teacher, row_weight


def settings_of(case: int) -> dict[str, Any]:
    norm, distance = CASES[case]
    return {"norm": norm, "distance": distance, "reduction": ("mean", "sum", "none")[case % 3], "beta": 0.3}


def loss_of(part: torch.Tensor, target: torch.Tensor, row_weight: torch.Tensor, case: int, impl: Any) -> torch.Tensor:
    options = settings_of(case)
    return align_loss_parallel(part, target, dist.group.WORLD, row_weight=row_weight, features=40, impl=impl, **options)


def every_case(rank: int, world: int) -> dict[Any, list[torch.Tensor]]:
    """(loss, gradient) of this rank's features in every case."""
    mine = slice(0, SPLIT) if rank == 0 else slice(SPLIT, 40)
    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    found = {}
    for case, dtype, misfit, impl in product(range(len(CASES)), DTYPES, (0.0, 1e-3), ("emulated", "eager", "compiled")):
        if (impl == "compiled" and (case or misfit)) or (misfit and dtype != torch.float32):
            continue
        student, teacher, row_weight = features(case, misfit)
        part, target = student[..., mine].to(dtype).requires_grad_(), teacher[..., mine].to(dtype)
        function = compiled if impl == "compiled" else loss_of
        value = function(part, target, row_weight, case, "eager" if impl == "eager" else "emulated")
        (value.sum() * upstream(dtype)).backward()
        found[case, dtype, misfit, impl] = [value.detach(), part.grad]
    return found


def upstream(dtype: torch.dtype) -> float:
    """A loss scale where fp16 needs it."""
    return 2.0**10 if dtype == torch.float16 else 1.0


def test_two_ranks_equal_one() -> None:
    ranks = run_ranks(every_case, 2)
    assert len(ranks[0]) == len(CASES) * (3 + 1) * 2 + 3
    for key in ranks[0]:
        case, dtype, misfit, impl = key
        student, teacher, row_weight = features(case, misfit)
        whole = student.to(dtype).double().requires_grad_()
        want = align_loss(whole, teacher.to(dtype).double(), row_weight=row_weight, **settings_of(case))
        (want.sum() * upstream(dtype)).backward()
        (loss, left), (other, right) = (rank[key] for rank in ranks)
        assert torch.equal(loss, other)
        got = torch.cat([left, right], -1).double()
        # Eager rounds the normalised features before it takes their difference; the kernels do not.
        exact = impl != "eager" or not misfit
        assert float((loss - want).norm() / want.norm()) < (1e-6 if exact else 1e-4), key
        limit = {torch.float32: 2e-5 if exact else 1e-3, torch.bfloat16: 4e-3, torch.float16: 1e-3}[dtype]
        assert float((got - whole.grad).norm() / whole.grad.norm()) < limit, key
        assert not got[0, 1].any(), key
