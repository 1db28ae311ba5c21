"""The distillation term of language models: its value and gradients by plain PyTorch, its schedule, what counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from compt_megatron.align.alignment import Alignment
from compt_megatron.align.distillation import Distillation
from compt_megatron.errors import UserError
from compt_megatron.share import CountedRows
from compt_megatron.vocabulary import Head

ROWS, TOKENS, WIDTH, THEIRS, VOCAB = 3, 7, 8, 6, 31


def case(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor, CountedRows]:
    """Student's states and head, which want gradients; the teacher's; which tokens count."""
    torch.manual_seed(0)
    hidden, theirs = torch.randn(ROWS, TOKENS, WIDTH, dtype=dtype), torch.randn(ROWS, TOKENS, THEIRS, dtype=dtype)
    head, their_head = torch.randn(VOCAB + 2, WIDTH, dtype=dtype), torch.randn(VOCAB, THEIRS, dtype=dtype)
    mask = torch.rand(ROWS, TOKENS) < 0.6
    return hidden.requires_grad_(), head.requires_grad_(), theirs, their_head, CountedRows(mask, 20.0)


def term(distill: Distillation, of: tuple[Tensor, Tensor, Tensor, Tensor, CountedRows], step: int = 0) -> Any:
    hidden, head, theirs, their_head, counted = of
    outputs = {"hidden": hidden, "head": Head(head, VOCAB, 0, VOCAB)}  # two rows of padding
    return distill(outputs, theirs, their_head, counted, step, 10)


def expected(of: tuple[Tensor, Tensor, Tensor, Tensor, CountedRows], temperature: float, top_k: int | None) -> Tensor:
    hidden, head, theirs, their_head, counted = of
    teacher = theirs @ their_head.T
    if top_k is not None:
        teacher = teacher.masked_fill(teacher < teacher.topk(top_k).values[..., -1:], -torch.inf)
    teacher = log_softmax(teacher / temperature, -1)
    student = log_softmax(hidden @ head[:VOCAB].T / temperature, -1)
    rows = kl_div(student, teacher.exp(), reduction="none").sum(-1)
    return (rows * counted.weights).sum() / counted.total


@pytest.mark.parametrize("chunk", [4, 1000])
@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, None), (3.0, None), (2.0, 5)])
def test_value_and_gradients(temperature: float, top_k: int | None, chunk: int) -> None:
    of = case()
    found = term(Distillation(0.7, temperature=temperature, top_k=top_k, chunk=chunk), of)
    kl = expected(of, temperature, top_k)
    assert found.parts["distill/kl"] == pytest.approx(float(kl), rel=1e-12)
    want = 0.7 * temperature**2 * kl
    assert float(found.loss) == pytest.approx(float(want), rel=1e-12)
    assert found.parts["distill"] == pytest.approx(float(want), rel=1e-12)
    ours = torch.autograd.grad(2 * found.loss, of[:2])
    for own, theirs in zip(ours, torch.autograd.grad(2 * want, of[:2])):
        torch.testing.assert_close(own, theirs, rtol=1e-9, atol=1e-12)
    assert not ours[1][VOCAB:].any()


def test_tokens_that_do_not_count_may_hold_anything() -> None:
    of = case()
    clean = torch.autograd.grad(term(Distillation(), of).loss, of[:2])
    with torch.no_grad():
        of[0][~of[4].weights] = torch.nan
        of[2][~of[4].weights] = torch.inf
    found = term(Distillation(), of)
    assert torch.isfinite(found.loss)
    for own, other in zip(torch.autograd.grad(found.loss, of[:2]), clean):
        assert torch.equal(own, other)


def test_bf16_sums_over_chunks_in_fp32() -> None:
    of = case(torch.bfloat16)
    many, one = (torch.autograd.grad(term(Distillation(chunk=size), of).loss, of[1])[0] for size in (1, 1000))
    assert many.dtype == torch.bfloat16
    torch.testing.assert_close(many, one, rtol=0.02, atol=1e-4)


def test_without_gradients_none_are_made() -> None:
    with torch.no_grad():
        assert not term(Distillation(), case()).loss.requires_grad


def test_the_weight_decays_and_ends() -> None:
    distill, of = Distillation(2.0, schedule="linear", end_step=4), case()
    assert [distill.weight_at(step, 10) for step in (0, 2, 4, 9)] == [2.0, 1.0, 0.0, 0.0]
    assert float(term(distill, of, 2).loss) == pytest.approx(float(expected(of, 1.0, None)), rel=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "distill.temperature is 0.0"),
        ({"top_k": 0}, "distill.top_k is 0"),
        ({"weight": -1.0}, "distill.weight is -1.0"),
        ({"schedule": "step"}, "distill.schedule is 'step'"),
    ],
)
def test_settings_that_are_none(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Distillation(**options)


def test_alignment_of_counted_tokens_of_states_and_layers() -> None:
    torch.manual_seed(1)
    names = ("hidden", "layer_2")
    student, teacher = ({name: torch.randn(ROWS, TOKENS, WIDTH) for name in names} for _ in range(2))
    mask = torch.rand(ROWS, TOKENS) < 0.5
    want = {}
    for name in names:
        x, y = (torch.nn.functional.normalize(each[name], dim=-1) for each in (student, teacher))
        want[name] = float(((x - y).square().sum(-1) * mask).sum()) / 11
        student[name][~mask] = torch.nan
    align = Alignment(0.5, towers=("hidden",), layers={2: 0})
    found = align(student, teacher, 0, 10, global_rows=ROWS, counted=CountedRows(mask, 11.0))
    assert {name: float(found.parts[f"align/{name}"]) for name in names} == pytest.approx(want, rel=1e-5)
    assert float(found.loss) == pytest.approx(0.5 * sum(want.values()), rel=1e-5)
    inner = align({"layer_2": student["layer_2"]}, teacher, 0, 10, ROWS, counted=CountedRows(mask, 11.0))
    assert inner.parts.keys() == {"align", "align/layer_2"}, "another pipeline stage has the final states"
