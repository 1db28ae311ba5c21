"""Language models in every kind of layout: the loss and the gradients of one process."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from compt_megatron.objectives.causal_lm import chunked_cross_entropy
from compt_megatron.vocabulary import Head
from tests.distributed.language_cases import Case, State, joined, one_process, run
from tests.distributed.language_engines import buffered, stepped, zero_three
from tests.distributed.spawn import run_ranks

TWO = [
    Case("untied", tensor=2, micro_batches=2),
    Case("tied", tensor=2, sequence=True, recompute="full"),
    Case("head norm", tensor=2),
    Case("tied", pipeline=2, micro_batches=4),
    Case("gpt2", pipeline=2, virtual=2, micro_batches=4, recompute="selective"),
    Case("untied", pipeline=2, virtual=2, micro_batches=2),
    Case("gpt2", tensor=2, sequence=True, micro_batches=2),
    Case("tied"),
    Case("tied", pipeline=2, micro_batches=2, dtype=torch.bfloat16),
]
FOUR = [
    Case("untied", tensor=4, sequence=True),
    Case("gpt2", tensor=4),
    Case("tied", tensor=2, pipeline=2, sequence=True, micro_batches=2, recompute="full"),
    Case("gpt2", tensor=2, pipeline=2, virtual=2, micro_batches=2, sequence=True),
    Case("tied", pipeline=2, micro_batches=2),
    Case("head norm", tensor=2, micro_batches=4, sequence=True),
    Case("untied", pipeline=4, micro_batches=8),
]

_expected = functools.cache(one_process)


@pytest.mark.parametrize("cases", [TWO, FOUR], ids=["two ranks", "four ranks"])
def test_every_layout_has_the_loss_and_gradients_of_one_process(cases: list[Case]) -> None:
    world = 2 if cases is TWO else 4
    ranks = run_ranks(run, world, cases)
    for index, case in enumerate(cases):
        found = [rank[index] for rank in ranks]
        loss, gradients = _expected(case.config)
        losses = [value for one in found for value in (one.loss, one.evaluated) if value == value]
        near, nearer = (0.1, 1e-2) if case.dtype == torch.bfloat16 else (1e-10, 1e-12)
        assert losses == pytest.approx([loss] * (2 * world // case.pipeline), rel=nearer), case
        worst = distance(joined(case.config, found), gradients)
        assert worst[0] < near, (case, worst)


def distance(found: State, wanted: State) -> tuple[float, str]:
    """The worst relative error of a gradient; of those near zero (a key's bias) relative to the whole, and whose."""
    floor = 1e-3 * torch.stack([value.norm() for value in wanted.values()]).norm()
    return max((float((found[name] - value).norm() / value.norm().clamp_min(floor)), name)
               for name, value in wanted.items())  # fmt: skip


@pytest.mark.parametrize("cases", [[Case("tied"), Case("gpt2", recompute="full"), Case("untied", recompute="full")]])
def test_zero_three_has_the_loss_and_gradients_of_one_process(cases: list[Case]) -> None:
    """The loss is made where ZeRO 3 has the head's weight; a tied one is gathered in two places."""
    ranks = run_ranks(zero_three, 2, cases)
    for index, case in enumerate(cases):
        loss, gradients = _expected(case.config)
        assert [rank[index].loss for rank in ranks] == pytest.approx([loss] * 2, rel=1e-6)
        found = {name: value.double() for name, value in joined(case.config, [rank[index] for rank in ranks]).items()}
        worst = distance(found, gradients)
        assert worst[0] < 1e-5, (case, worst)


def test_both_copies_of_a_tied_head_take_the_same_steps() -> None:
    """Under megatron's optimizers, the distributed one too, and gradient norms count them once."""
    flat = Case("tied", pipeline=2, micro_batches=2, dtype=torch.float32)
    split = Case("tied", 2, 2, 2, sequence=True, micro_batches=2, dtype=torch.float32)
    cases = [(flat, False), (flat, True), (split, True)]
    ranks = run_ranks(buffered, 4, cases)
    norms, state = stepped("tied")
    for index, case in enumerate(cases):
        copies: dict[str, torch.Tensor] = {}
        for rank in ranks:
            assert rank[index].norms[0] == pytest.approx(norms[0], rel=1e-5), case
            assert rank[index].norms == pytest.approx(norms, rel=1e-4), case  # Adam's steps magnify rounding
            for name, region, values in rank[index].weights:
                assert torch.equal(copies.setdefault(f"{name}{region}", values), values), (case, name)
                assert (values - state[name][region]).norm() < 1e-4 * values.norm(), (case, name)


def test_the_head_is_split_in_all_ways() -> None:
    """Cross entropy of a split vocabulary: values and gradients of plain PyTorch, padding and masked targets too."""
    ranks = run_ranks(split_cross_entropy, 2)
    hidden, weight, targets, counts = problem()
    expected = plain(hidden, weight, targets, counts)
    for loss, to_hidden, _, logits in ranks:
        assert loss == pytest.approx(float(expected), rel=1e-12)
        assert torch.allclose(to_hidden, hidden.grad, rtol=1e-10, atol=1e-14)
        assert torch.allclose(logits, (hidden @ weight.t()).detach(), rtol=1e-12)
    rows = torch.cat([to_weight for _, _, to_weight, _ in ranks])
    assert torch.allclose(rows[:7], weight.grad, rtol=1e-10, atol=1e-14)
    assert not rows[7:].any()


def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden [10, 5], a head of 7 entries, targets [10], weights [10], in fp64."""
    generator = torch.Generator().manual_seed(2)
    hidden, weight = (torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in (10, 7))
    targets = torch.randint(0, 7, (10,), generator=generator)
    counts = torch.tensor([1, 0, 1, 1, 0, 1, 1, 1, 1, 0])
    return hidden.requires_grad_(), weight.requires_grad_(), torch.where(counts > 0, targets, -100), counts


def plain(hidden: Any, weight: Any, targets: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    logits = hidden @ weight.t()
    entropy = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    loss: torch.Tensor = 3 * (entropy + 0.1 * (counts * logits.logsumexp(1).square()).sum())
    loss.backward()
    return loss


def split_cross_entropy(rank: int, world: int) -> tuple[float, Any, Any, torch.Tensor]:
    """A rank's part: 4 entries, or 3 and a row of padding."""
    from compt_megatron.models.groups import ensure_groups, model_groups
    from compt_megatron.models.language import OutputLayer, full_logits
    from compt_megatron.models.megatron_cpu import use_cpu_in_training

    use_cpu_in_training()
    ensure_groups(world)
    hidden, weight, targets, counts = problem()
    padded = torch.cat([weight.detach(), torch.full((1, 5), 9.0, dtype=torch.float64)])
    layer = OutputLayer(torch.nn.Parameter(padded[4 * rank : 4 * rank + 4]), 7, model_groups().tp)
    head: Head = layer(lambda head: head)
    loss = 3 * chunked_cross_entropy(hidden, head, targets, counts, z_loss=0.1, chunk=4).loss
    loss.backward()
    return float(loss.detach()), hidden.grad, layer.weight.grad, full_logits(hidden, head).detach()
