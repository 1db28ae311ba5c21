"""Next-token prediction in one process: plain PyTorch's loss and gradients, chunk by chunk. Split vocabularies are in
tests/distributed/test_language_layouts.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from compt_megatron.errors import UserError
from compt_megatron.objectives.causal_lm import CausalLmObjective
from compt_megatron.objectives.registry import build_objective
from compt_megatron.vocabulary import Head


@dataclass
class Batch:
    targets: torch.Tensor
    mask: torch.Tensor | None


def problem(dtype: torch.dtype = torch.float64, masked: bool = True) -> tuple[torch.Tensor, torch.Tensor, Batch]:
    """hidden [3, 7, 6] that is not contiguous, as a model's is; a head of 11 entries; which targets count."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 3, 6, generator=generator, dtype=torch.float64).to(dtype).transpose(0, 1)
    weight = torch.randn(11, 6, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.randint(0, 11, (3, 7), generator=generator)
    mask = torch.rand(3, 7, generator=generator) < 0.6 if masked else None
    return hidden.requires_grad_(), weight.requires_grad_(), Batch(targets, mask)


def outputs(hidden: torch.Tensor, weight: torch.Tensor) -> dict[str, Any]:
    return {"hidden": hidden, "head": Head(weight, len(weight), 0, len(weight))}


def plain(hidden: torch.Tensor, weight: torch.Tensor, batch: Batch, z_loss: float) -> torch.Tensor:
    logits = (hidden @ weight.t()).float() if hidden.dtype == torch.bfloat16 else hidden @ weight.t()
    counted = torch.ones_like(batch.targets, dtype=torch.bool) if batch.mask is None else batch.mask
    return F.cross_entropy(logits[counted], batch.targets[counted]) + z_loss * (
        logits[counted].logsumexp(-1).square().mean()
    )


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("z_loss", [0.0, 0.3])
@pytest.mark.parametrize("chunk", [1, 4, 21, 1000])
def test_loss_and_gradients_in_fp64(chunk: int, z_loss: float, masked: bool) -> None:
    hidden, weight, batch = problem(masked=masked)
    result = build_objective("causal_lm", z_loss=z_loss, chunk=chunk)(outputs(hidden, weight), batch)
    (2 * result.loss).backward()
    found = hidden.grad, weight.grad
    hidden.grad = weight.grad = None
    expected = plain(hidden, weight, batch, z_loss)
    (2 * expected).backward()
    assert float(result.loss) == pytest.approx(float(expected), rel=1e-12)
    assert float(sum(result.parts.values())) == pytest.approx(float(expected), rel=1e-12)
    assert list(result.parts) == (["causal_lm", "z_loss"] if z_loss else ["causal_lm"])
    for mine, theirs in zip(found, (hidden.grad, weight.grad), strict=True):
        assert mine is not None
        assert theirs is not None
        assert torch.allclose(mine, theirs, rtol=1e-10, atol=1e-14)


def test_micro_batches_add_up_to_the_batch() -> None:
    hidden, weight, batch = problem()
    objective, shares = CausalLmObjective(0.1), []
    total = objective.divisor(batch)
    assert batch.mask is not None
    assert float(total) == float(batch.mask.sum())
    for row in range(3):
        part = Batch(batch.targets[row : row + 1], batch.mask[row : row + 1])
        shares.append(objective(outputs(hidden[row : row + 1], weight), part, divisor=total).loss)
    whole = objective(outputs(hidden, weight), batch).loss
    assert float(torch.stack(shares).sum()) == pytest.approx(float(whole), rel=1e-12)


def test_what_does_not_count_may_be_anything_and_nothing_may_count() -> None:
    hidden, weight, batch = problem()
    assert batch.mask is not None
    before = float(CausalLmObjective()(outputs(hidden, weight), batch).loss)
    batch.targets[~batch.mask] = -100
    assert float(CausalLmObjective()(outputs(hidden, weight), batch).loss) == before
    batch.mask[:] = False
    result = CausalLmObjective()(outputs(hidden, weight), batch)
    result.loss.backward()
    assert float(result.loss) == 0
    assert hidden.grad is not None
    assert not hidden.grad.any()


def test_bf16_is_as_close_as_plain_pytorch_in_bf16() -> None:
    exact, half = problem(), problem(torch.bfloat16)
    for ours, (hidden, weight, batch) in ((False, exact), (True, half)):
        loss = CausalLmObjective(chunk=4)(outputs(hidden, weight), batch).loss if ours else plain(*exact, 0.0)
        loss.backward()
    again = problem(torch.bfloat16)
    plain(*again, 0.0).backward()
    for index in range(2):
        truth, mine, theirs = (one[index].grad for one in (exact, half, again))
        assert truth is not None
        assert mine is not None
        assert theirs is not None
        assert mine.dtype == torch.bfloat16
        assert (mine - truth).norm() < 1.3 * (theirs - truth).norm() + 1e-3 * truth.norm()


def test_only_a_chunk_of_logits_exists_at_once_and_none_is_kept() -> None:
    """In saved tensors: the gradients of hidden states and head. Without grad: nothing."""
    rows, entries = 512, 4096
    hidden, weight = torch.randn(1, rows, 8, requires_grad=True), torch.randn(entries, 8, requires_grad=True)
    batch = Batch(torch.zeros(1, rows, dtype=torch.long), None)
    largest = 0
    sizes: list[int] = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            found = func(*args, **(kwargs or {}))
            if isinstance(found, torch.Tensor):
                largest = max(largest, found.numel())
            return found

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.numel())
        return tensor

    with Watch(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        CausalLmObjective(chunk=16)(outputs(hidden, weight), batch).loss.backward()
    assert largest == 16 * entries
    assert sum(sizes) <= hidden.numel() + weight.numel() + 16
    with torch.no_grad():
        assert not CausalLmObjective(chunk=16)(outputs(hidden, weight), batch).loss.requires_grad


@pytest.mark.parametrize(("options", "reason"), [({"z_loss": -1.0}, "z_loss is -1.0"), ({"chunk": 0}, "chunk is 0")])
def test_options_out_of_range(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        build_objective("causal_lm", **options)
