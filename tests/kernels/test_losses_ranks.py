"""Two ranks with the kernels, emulated, compute what one process does with the whole batch or vocabulary."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from compt_kernels import contrastive_loss, distill_kl, siglip_loss
from compt_kernels.ops.contrastive import clip_loss
from compt_kernels.ops.siglip import sigmoid_loss
from tests.distributed.spawn import run_ranks
from tests.kernels.loss_cases import hidden_and_heads, pairs

ROWS, WIDTH, VOCABULARY = 14, 6, 23
FP64 = torch.float64


def contrastive(dtype, rank, world, impl, spread, name):
    """(loss, gradients) of this rank's rows; upstream factors differ from rank to rank where `world` > 1."""
    image, text, labels = pairs(ROWS, WIDTH, dtype, 0, spread=spread)
    scale, bias = torch.tensor(7.0, requires_grad=True), torch.tensor(-2.0, requires_grad=True)
    group = dist.group.WORLD if world > 1 else None
    mine = slice(rank * ROWS // world, (rank + 1) * ROWS // world)
    image, text = (x.detach()[mine].requires_grad_() for x in (image, text))
    labels = None if labels is None else labels[mine]
    tensors = [image, text, scale] if name == "clip" else [image, text, scale, bias]
    if impl == "plain":
        function = clip_loss if name == "clip" else sigmoid_loss
        loss = function(*tensors, labels, group.group_name if group else "", 30, True)
    else:
        function = contrastive_loss if name == "clip" else siglip_loss
        loss = function(*tensors, labels, group, impl)
    return loss, tensors


def factor(rank):
    return 1.5 - 2 * rank


def every_contrastive(rank, world):
    found = {}
    for name in ("clip", "siglip"):
        for spread in (0, 4):
            for impl, dtype in (("eager", FP64), ("plain", FP64), ("emulated", torch.float32)):
                loss, tensors = contrastive(dtype, rank, world, impl, spread, name)
                gradients = torch.autograd.grad(loss * factor(rank), tensors)
                found[name, spread, impl] = [loss.detach(), *gradients]
    return found


def one_process(name, spread):
    """The gradient of the sum of shares, each times its rank's factor, by autograd through both shares."""
    image, text, labels = pairs(ROWS, WIDTH, FP64, 0, spread=spread)
    scale, bias = torch.tensor(7.0, dtype=FP64, requires_grad=True), torch.tensor(-2.0, dtype=FP64, requires_grad=True)
    logits = scale * image @ text.T + (bias if name == "siglip" else 0)
    same = torch.eye(ROWS, dtype=FP64) if labels is None else (labels[:, None] == labels[None, :]).double()
    if name == "clip":
        target = same / same.sum(1, keepdim=True)
        rows = -(target * torch.log_softmax(logits, 1)).sum(1) - (target * torch.log_softmax(logits.T, 1)).sum(1)
        rows = rows / (2 * ROWS)
    else:
        rows = -torch.nn.functional.logsigmoid((2 * same - 1) * logits).sum(1) / ROWS
    shares = rows.view(2, -1).sum(1)
    leaves = [image, text, scale] + ([bias] if name == "siglip" else [])
    weighted = sum(share * factor(rank) for rank, share in enumerate(shares))
    return shares.detach(), torch.autograd.grad(weighted, leaves)


def distilled(rank, world, impl, dtype, top_k):
    student, head, teacher, teacher_head = hidden_and_heads(7, VOCABULARY, dtype, 1)
    mine = [slice(0, 9), slice(9, None)][rank] if world > 1 else slice(None)  # unequal parts
    head = head.detach()[mine].requires_grad_()
    mask = torch.tensor([1, 1, 0, 1, 1, 1, 1], dtype=torch.bool)
    found = []
    for reduction in ("mean", "none"):
        loss = distill_kl(
            *(student, head, teacher, teacher_head[mine], 1.5, mask, top_k, reduction),
            *(dist.group.WORLD if world > 1 else None, impl),
        )
        upstream = torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype).view_as(loss)
        found.append([loss.detach(), *torch.autograd.grad(loss, (student, head), upstream)])
    return found


def every_distilled(rank, world):
    return {
        (impl, top_k): distilled(rank, world, impl, dtype, top_k)
        for impl, dtype in (("eager", FP64), ("emulated", torch.float32))
        for top_k in (None, 5, 12, 30)
    }


def both(rank, world):
    return every_contrastive(rank, world), every_distilled(rank, world)


@pytest.fixture(scope="module")
def two_ranks():
    return run_ranks(both, 2)


def test_the_shares_of_a_global_batch(two_ranks):
    found = [contrastive for contrastive, _ in two_ranks]
    for name in ("clip", "siglip"):
        for spread in (0, 4):
            shares, (image, text, *scalars) = one_process(name, spread)
            for impl in ("eager", "plain", "emulated"):
                ranks = [result[name, spread, impl] for result in found]
                close = {"rtol": 2e-5, "atol": 1e-6} if impl == "emulated" else {"rtol": 1e-11, "atol": 1e-13}
                losses = torch.stack([r[0] for r in ranks]).double()
                torch.testing.assert_close(losses, shares, **close)
                for index, want in ((1, image), (2, text)):
                    got = torch.cat([r[index] for r in ranks]).double()
                    torch.testing.assert_close(got, want, **close)
                for index, want in enumerate(scalars, 3):  # replicated: summed over ranks
                    got = sum(r[index] for r in ranks).double()
                    torch.testing.assert_close(got, want.to(got.dtype), rtol=2e-5, atol=1e-5)


def test_heads_cut_over_ranks(two_ranks):
    found = [distilled for _, distilled in two_ranks]
    for top_k in (None, 5, 12, 30):
        want = distilled(0, 1, "eager", FP64, top_k)
        for impl in ("eager", "emulated"):
            close = {"rtol": 2e-5, "atol": 1e-6} if impl == "emulated" else {"rtol": 1e-10, "atol": 1e-12}
            for index, (loss, hidden, head) in enumerate(want):
                ranks = [result[impl, top_k][index] for result in found]
                for got in ranks:
                    torch.testing.assert_close(got[0].double(), loss, **close)
                    torch.testing.assert_close(got[1].double(), hidden, **close)
                torch.testing.assert_close(torch.cat([r[2] for r in ranks]).double(), head, **close)


def unequal(rank, world):
    image = torch.zeros(2 + rank, 3)
    contrastive_loss(image, image, torch.tensor(1.0), group=dist.group.WORLD, impl="emulated")


def test_unequal_rows_are_refused():
    with pytest.raises(AssertionError, match="between 2 and 3 rows"):
        run_ranks(unequal, 2)
