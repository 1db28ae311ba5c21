"""The alignment term: its unit, schedule and clamp; projections."""

from __future__ import annotations

import pytest
import torch

from compt_kernels.align import align_loss
from compt_megatron.align.alignment import Alignment
from compt_megatron.align.projection import Projections
from compt_megatron.errors import UserError


def features(rows=6, captions=2, width=16, seed=0):
    torch.manual_seed(seed)
    return {"image": torch.randn(rows, width), "text": torch.randn(rows * captions, width)}


def test_weight_is_the_squared_distance_of_unit_vectors_summed_over_towers():
    student, teacher = features(seed=0), features(seed=1)
    got = Alignment(0.3)(student, teacher, 0, 10, global_rows=6)
    want = 0.0
    for tower in ("image", "text"):
        x, y = (torch.nn.functional.normalize(f[tower].double(), dim=-1) for f in (student, teacher))
        want += float((x - y).square().sum(-1).mean())
    assert float(got.loss) == pytest.approx(0.3 * want, rel=1e-6)
    assert float(got.parts["align"]) == pytest.approx(0.3 * want, rel=1e-6)
    assert float(got.parts["align/image"] + got.parts["align/text"]) == pytest.approx(want, rel=1e-6)


def test_published_weight():
    """500 times the error that F.mse_loss averages over rows and 512 dimensions is weight 500/512."""
    student, teacher = features(width=512, seed=0), features(width=512, seed=1)
    published = 0.0
    for tower in ("image", "text"):
        x, y = (torch.nn.functional.normalize(f[tower], dim=1) for f in (student, teacher))
        published += 500 * torch.nn.functional.mse_loss(x, y)
    got = Alignment(500 / 512)(student, teacher, 0, 10, global_rows=6).loss
    assert float(got) == pytest.approx(float(published), rel=1e-5)


def test_cosine_is_half_the_squared_distance_at_every_width():
    for width in (8, 32):
        student, teacher = features(width=width, seed=0), features(width=width, seed=1)
        squared = Alignment()(student, teacher, 0, 1, global_rows=6).loss
        cosine = Alignment(distance="cosine")(student, teacher, 0, 1, global_rows=6).loss
        assert float(cosine) == pytest.approx(float(squared) / 2, rel=1e-6)


def test_micro_batches_sum_to_the_batch():
    student, teacher = features(), features(seed=1)
    align = Alignment()
    whole = align(student, teacher, 0, 10, global_rows=6).loss
    halves = sum(
        align(
            {"image": student["image"][i : i + 3], "text": student["text"][2 * i : 2 * i + 6]},
            {"image": teacher["image"][i : i + 3], "text": teacher["text"][2 * i : 2 * i + 6]},
            0,
            10,
            global_rows=6,
        ).loss
        for i in (0, 3)
    )
    assert float(halves) == pytest.approx(float(whole), rel=1e-6)


def test_dense_features():
    torch.manual_seed(0)
    student, teacher = {"image": torch.randn(4, 5, 8)}, {"image": torch.randn(4, 5, 8)}
    got = Alignment()(student, teacher, 0, 1, global_rows=4).loss
    assert float(got) == pytest.approx(8 * float(align_loss(student["image"], teacher["image"])), rel=1e-6)


@pytest.mark.parametrize(
    ("schedule", "end_step", "want"),
    [
        ("constant", None, [2.0, 2.0, 2.0, 2.0]),
        ("constant", 5, [2.0, 2.0, 0.0, 0.0]),
        ("linear", None, [2.0, 1.6, 1.0, 0.2]),
        ("linear", 4, [2.0, 1.0, 0.0, 0.0]),
        ("cosine", None, [2.0, 1.8090169943749475, 1.0, 0.04894348370484647]),
        ("cosine", 4, [2.0, 1.0, 0.0, 0.0]),
    ],
)
def test_schedule(schedule, end_step, want):
    align = Alignment(2.0, schedule=schedule, end_step=end_step)
    assert [align.weight_at(step, 10) for step in (0, 2, 5, 9)] == pytest.approx(want)
    student, teacher = features(), features(seed=1)
    base = Alignment()(student, teacher, 0, 10, global_rows=6).loss
    got = align(student, teacher, 2, 10, global_rows=6).loss
    assert float(got) == pytest.approx(want[1] * float(base), rel=1e-6)


def test_clamp_scales_the_term_down_to_the_task_loss():
    student, teacher = features(), features(seed=1)
    for value in student.values():
        value.requires_grad_()
    free = Alignment(5.0)(student, teacher, 0, 10, global_rows=6).loss
    task = torch.tensor(1.5)
    got = Alignment(5.0, clamp=True)(student, teacher, 0, 10, global_rows=6, task_loss=task)
    assert float(free.detach()) > 1.5
    assert float(got.loss.detach()) == pytest.approx(1.5, rel=1e-6)
    assert float(got.parts["align"]) == pytest.approx(1.5, rel=1e-6)
    (free_grad,) = torch.autograd.grad(free, student["image"])
    (grad,) = torch.autograd.grad(got.loss, student["image"])
    torch.testing.assert_close(grad, free_grad * (1.5 / free.detach()))
    loose = Alignment(5.0, clamp=True)(student, teacher, 0, 10, global_rows=6, task_loss=torch.tensor(100.0))
    torch.testing.assert_close(loose.loss, free)


def test_unweighted_is_zero_for_an_equal_student():
    student = features()
    teacher = {name: 3 * value for name, value in student.items()}  # the length of a feature does not count
    got = Alignment(7.0).unweighted(student, teacher)
    assert got == {"image": pytest.approx(0, abs=1e-12), "text": pytest.approx(0, abs=1e-12)}
    other = Alignment(7.0).unweighted(student, features(seed=1))
    parts = Alignment(1.0)(student, features(seed=1), 0, 1, global_rows=6).parts
    assert other == pytest.approx({tower: float(parts[f"align/{tower}"]) for tower in ("image", "text")}, rel=1e-6)


def test_projections_where_widths_differ():
    first, again = (Projections({"image": (12, 16), "text": (16, 16)}, seed=3) for _ in range(2))
    assert {name: tuple(p.shape) for name, p in first.canonical().items()} == {
        "align/image.weight": (16, 12),
        "align/image.bias": (16,),
    }
    for mine, other in zip(first.parameters(), again.parameters()):
        assert torch.equal(mine, other)  # no rank needs to be told another's
    different = Projections({"image": (12, 16)}, seed=4)
    assert not torch.equal(first.canonical()["align/image.weight"], different.canonical()["align/image.weight"])
    weight = first.canonical()["align/image.weight"]
    assert 0.2 < float(weight.detach().abs().max()) <= 12**-0.5

    torch.manual_seed(0)
    outputs = {"image": torch.randn(6, 12), "text": torch.randn(6, 16)}
    teacher = features(captions=1, seed=1)
    projected = first(outputs)
    assert set(projected) == {"image", "text", "align/image"}
    Alignment()(projected, teacher, 0, 1, global_rows=6).loss.backward()
    image = outputs["image"] @ weight.detach().T + first.canonical()["align/image.bias"].detach()
    want = Alignment()({"image": image, "text": outputs["text"]}, teacher, 0, 1, global_rows=6).loss
    got = Alignment()(projected, teacher, 0, 1, global_rows=6).loss
    torch.testing.assert_close(got, want)
    assert weight.grad is not None
    assert float(weight.grad.abs().max()) > 0

    saved = {name: value.detach().clone() for name, value in different.canonical().items()}
    first.load_canonical(lambda name: saved[name])
    assert torch.equal(first.canonical()["align/image.weight"], saved["align/image.weight"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "cosin"}, "align.schedule is 'cosin'; use one of: constant, cosine, linear"),
        ({"distance": "l1"}, "align.distance is 'l1'"),
        ({"norm": "batch"}, "align.norm is 'batch'"),
        ({"weight": -1.0}, "align.weight is -1.0"),
        ({"weight": float("nan")}, "align.weight is nan"),
        ({"end_step": 0}, "align.end_step is 0"),
        ({"beta": 0.0}, "align.beta is 0.0"),
    ],
)
def test_settings_that_are_none(options, message):
    with pytest.raises(UserError, match=message):
        Alignment(**options)
