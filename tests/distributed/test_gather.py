"""Losses over several ranks are those of one process with the whole batch, gradients included."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from compt_kernels import exchange
from compt_megatron.align.alignment import Alignment
from compt_megatron.align.projection import Projections
from compt_megatron.objectives.registry import build_objective
from compt_megatron.share import several, total
from tests.distributed.spawn import run_ranks

ROWS, WIDTH = 8, 6
SCALARS = ("logit_scale", "logit_bias")
CASES = {
    **{
        f"{name} {captions} {same}": (name, captions, {"same_caption": same})
        for name in ("clip", "siglip")
        for captions in (1, 3)
        for same in ("separate", "shared")
    },
    "classify": ("classify", 1, {"label_smoothing": 0.1}),
}


def whole_batch(captions):
    torch.manual_seed(0)
    outputs = {
        "image": torch.randn(ROWS, WIDTH),
        "text": torch.randn(ROWS * captions, WIDTH),
        "logit_scale": torch.tensor(9.0),
        "logit_bias": torch.tensor(-3.0),
    }
    texts, labels = torch.randint(0, 2, (ROWS, captions, 2)), torch.randint(0, WIDTH, (ROWS,))
    return outputs, SimpleNamespace(texts=texts, labels=labels)


def own_part(outputs, batch, captions, rank, world):
    """This rank's rows, as leaves; scalars are replicated."""
    mine = slice(rank * ROWS // world, (rank + 1) * ROWS // world)
    per_row = {name: value.unflatten(0, (ROWS, -1)) for name, value in outputs.items() if name not in SCALARS}
    local = {name: value[mine].flatten(0, 1) for name, value in per_row.items()}
    local |= {name: outputs[name] for name in SCALARS}
    local = {name: value.clone().requires_grad_() for name, value in local.items()}
    return local, SimpleNamespace(texts=batch.texts[mine], labels=batch.labels[mine])


def gradients(leaves):
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def every_loss(rank, world):
    """For each case this rank's share of the loss and its gradients. Also the function under test in one process."""
    results = {}
    for case, (name, captions, options) in CASES.items():
        leaves, batch = own_part(*whole_batch(captions), captions, rank, world)
        result = build_objective(name, **options)(leaves, batch)
        result.loss.backward()
        results[case] = (result.loss.detach(), gradients(leaves))
    for clamp in (False, True):
        results[f"align clamp={clamp}"] = aligned(rank, world, clamp)
    return results


def aligned(rank, world, clamp):
    """An alignment through a projection (student image width 6, teacher 5), with a clamp that binds if asked for."""
    captions = 2
    leaves, _ = own_part(*whole_batch(captions), captions, rank, world)
    torch.manual_seed(1)
    teacher = {"image": torch.randn(ROWS, 5), "text": torch.randn(ROWS * captions, WIDTH)}
    mine = {name: value.unflatten(0, (world, -1))[rank] for name, value in teacher.items()}
    projections = Projections({"image": (WIDTH, 5), "text": (WIDTH, WIDTH)}, seed=2)
    task = torch.tensor(0.75 / world * (2 * rank + 1) / world)  # unequal shares that sum to 0.75
    align = Alignment(1.5, clamp=clamp)
    result = align(projections(leaves), mine, 0, 10, global_rows=ROWS, task_loss=task)
    result.loss.backward()
    grads = gradients(leaves) | {name: p.grad for name, p in projections.canonical().items()}
    unweighted = align.unweighted(projections(leaves), mine)
    return result.loss.detach(), grads | {f"unweighted/{k}": torch.tensor(v) for k, v in unweighted.items()}


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_equal_one_process_with_the_whole_batch(world):
    want = every_loss(0, 1)
    got = run_ranks(every_loss, world)
    for case, (loss, grads) in want.items():
        shares = [result[case] for result in got]
        torch.testing.assert_close(sum(share for share, _ in shares), loss, rtol=1e-6, atol=0, msg=case)
        assert grads, case
        for name, grad in grads.items():
            parts = [part[name] for _, part in shares]
            if name.startswith("unweighted/"):
                merged = parts[0]
                assert all(torch.equal(part, merged) for part in parts), case
            elif name in SCALARS or name.startswith("align/"):
                merged = sum(parts)  # replicated parameters: the engine sums their gradients
            else:
                merged = torch.cat(parts)
            torch.testing.assert_close(merged, grad, rtol=1e-5, atol=2e-7, msg=f"{case}: {name}")


def gathers(rank, world, backend_scatters):
    if not backend_scatters:

        def refuse(*args, **kwargs):
            raise RuntimeError("ProcessGroupGloo does not support reduce_scatter")

        exchange._reduce_scatter = refuse
    x = torch.full((2, 3), float(rank), dtype=torch.float64, requires_grad=True)
    everyone = exchange.group_name(dist.group.WORLD)
    gathered = exchange.gather_rows(x.T.contiguous().T, everyone)  # strides that no backend takes
    factor = torch.arange(gathered.numel(), dtype=torch.float64).view_as(gathered) * (rank + 1)
    (gathered * factor).sum().backward()
    group = dist.new_group([0])
    alone = several(group) is None if rank == 0 else True
    tokens = exchange.gather_rows(torch.tensor([rank, 10 + rank]), everyone)
    return gathered.detach(), x.grad, alone, tokens, total(x, None)


@pytest.mark.parametrize("backend_scatters", [True, False])
def test_gather_and_its_gradient(backend_scatters):
    for rank, (gathered, grad, alone, tokens, summed) in enumerate(run_ranks(gathers, 2, backend_scatters)):
        assert torch.equal(gathered, torch.tensor([0.0, 0, 1, 1], dtype=torch.float64)[:, None].expand(4, 3))
        factor = torch.arange(12, dtype=torch.float64).view(4, 3)
        assert torch.equal(grad, 3 * factor[2 * rank : 2 * rank + 2])  # rank 0's factor once, rank 1's twice
        assert alone
        assert tokens.tolist() == [0, 10, 1, 11]
        assert torch.equal(summed, torch.ones(2, 3, dtype=torch.float64))


def test_without_processes_a_gather_is_the_identity():
    x = torch.randn(2, 3)
    assert exchange.gather_rows(x, exchange.group_name(several())) is x


def unequal(rank, world):
    leaves, batch = own_part(*whole_batch(1), 1, rank, world)
    leaves = {name: value if name in SCALARS else value[: 3 + rank] for name, value in leaves.items()}
    build_objective("clip")(leaves, batch)


def test_unequal_rows_are_refused():
    with pytest.raises(AssertionError, match="between 3 and 4 rows"):
        run_ranks(unequal, 2)


def fails_on_one(rank, world):
    if rank == 1:
        raise ValueError("planted")
    dist.barrier()


def hangs(rank, world):
    if rank == 0:
        time.sleep(60)
    return rank


def dies(rank, world):
    if rank == 1:
        import os

        os._exit(7)
    dist.barrier()


def test_run_ranks_reports_failures():
    with pytest.raises(AssertionError, match=r"(?s)rank 1 of 2: .*planted"):
        run_ranks(fails_on_one, 2)
    with pytest.raises(AssertionError, match=r"(?s)not done after 4 s.*in hangs"):
        run_ranks(hangs, 2, timeout=4)
    with pytest.raises(AssertionError, match="rank 1 of 2: died with exit code 7"):
        run_ranks(dies, 2)
