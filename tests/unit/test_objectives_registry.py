"""Objectives by name, and the classification loss."""

from __future__ import annotations

from math import exp, log
from types import SimpleNamespace

import pytest
import torch

from compt_megatron.errors import UserError
from compt_megatron.objectives.registry import OBJECTIVES, build_objective


def test_every_objective_is_built_by_its_name():
    assert {name: build_objective(name).name for name in OBJECTIVES} == {
        name: name for name in ("clip", "siglip", "classify", "causal_lm")
    }


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("clipp", {}, "objective.name is 'clipp', which is unknown; did you mean 'clip'?"),
        ("zzz", {}, "use one of: causal_lm, classify, clip, siglip"),
        ("clip", {"same_captions": "shared"}, "did you mean 'same_caption'?"),
        ("clip", {"same_caption": "both"}, "use 'separate' or 'shared'"),
        ("siglip", {"same_caption": "both"}, "use 'separate' or 'shared'"),
        ("classify", {"label_smoothing": 1.0}, "objective.label_smoothing is 1.0"),
        ("classify", {"same_caption": "shared"}, "objective.same_caption is no option of 'classify'"),
    ],
)
def test_wrong_names_and_options(name, options, message):
    with pytest.raises(UserError) as caught:
        build_objective(name, **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_classify_equals_the_formula(smoothing):
    torch.manual_seed(0)
    logits, labels = torch.randn(4, 5), torch.tensor([0, 4, 2, 2])
    want = 0.0
    for row, label in zip(logits.double().tolist(), labels.tolist()):
        whole = log(sum(exp(v) for v in row))
        target = [smoothing / 5 + (1 - smoothing) * (j == label) for j in range(5)]
        want += sum(mass * (whole - v) for mass, v in zip(target, row)) / 4
    batch = SimpleNamespace(texts=None, labels=labels, captions=0)
    objective = build_objective("classify", label_smoothing=smoothing)
    got = objective({"image": logits}, batch)
    assert float(got.loss) == pytest.approx(want, rel=1e-6)
    assert got.parts.keys() == {"classify"}
    half = objective({"image": logits.bfloat16()}, batch).loss
    assert half.dtype == torch.float32
    leaf = logits.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: objective({"image": x}, batch).loss, leaf)


def test_classify_needs_labels():
    with pytest.raises(UserError, match="labels"):
        build_objective("classify")({"image": torch.zeros(2, 3)}, SimpleNamespace(texts=None, labels=None))
