"""The emulated alignment kernels against fp64 and against eager in the same dtype, and the cases at the edges."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator
from math import sqrt
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from compt_kernels.align import align_loss, align_loss_parallel
from compt_kernels.build import load_emulated
from compt_kernels.ops.align import align_projected
from tests.kernels.emulated import schedule

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NORMS, DISTANCES, REDUCTIONS = ("l2", "layer", "none"), ("mse", "cosine", "smooth_l1"), ("mean", "sum", "none")


@pytest.fixture(scope="module", autouse=True)
def _kernels() -> None:
    load_emulated()


def layout(kind: str, rows: int, features: int) -> torch.Tensor:
    """Random features in memory as `kind` says."""
    if kind == "tokens":  # all but the first token of each sample
        return torch.randn(rows, 4, features)[:, 1:]
    if kind == "padded":
        return torch.randn(rows, features + 8)[:, :features]
    if kind == "unaligned":
        return torch.randn(rows * features + 1)[1:].view(rows, features)
    if kind == "transposed":
        return torch.randn(features, rows).T
    if kind == "every second":
        return torch.randn(rows, 2 * features)[:, ::2]
    if kind == "four axes":
        return torch.randn(2, 1, rows, features).transpose(0, 2)
    if kind == "one":
        return torch.randn(features)
    return torch.randn(rows, features)


KINDS = ("plain", "tokens", "padded", "unaligned", "transposed", "every second", "four axes", "one")


def random_cases(count: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, dict[str, Any], float]]:
    """Student, teacher, settings and upstream gradient."""
    draw = random.Random(0)
    torch.manual_seed(0)
    for i in range(count):
        features = draw.choice([3, 8, 40, 77, 264, 768, 1000, 1031, 1544, 4104, 8192, 8193])
        rows = draw.choice([1, 2, 5]) if features > 1031 else draw.choice([1, 3, 7, 10])
        kind = KINDS[i % len(KINDS)]
        student = layout(kind, rows, features) * draw.choice([0.3, 1, 20])
        teacher = layout(kind, rows, features)
        if i % 3 == 0:
            teacher = teacher * 0.01 + student
        if draw.random() < 0.2:
            teacher = teacher[..., :1, :].expand_as(student) if teacher.ndim > 1 else teacher
        student = student.to(DTYPES[i % 3])
        settings: dict[str, Any] = {
            "norm": draw.choice(NORMS),
            "distance": draw.choice(DISTANCES),
            "reduction": draw.choice(REDUCTIONS),
            "beta": draw.choice([0.01, 1.0]),
        }
        weighted = draw.random()
        if weighted < 0.6:
            row_weight = torch.rand(student.shape[:-1]) + 0.2
            row_weight[torch.rand(row_weight.shape) < 0.3] = 0
            settings["row_weight"] = row_weight > 0 if weighted < 0.2 else row_weight.to(draw.choice(DTYPES))
            student[row_weight == 0] = float("nan")
        yield student, teacher.to(draw.choice(DTYPES)), settings, draw.choice([1.0, 0.25, -4.0])


def results(
    impl: Any, student: torch.Tensor, teacher: torch.Tensor, *linear: Any, upstream: float = 1, **settings: Any
) -> list:
    """The loss, and the gradients of student and whatever else is a parameter."""
    params = [None if p is None else p.detach().requires_grad_() for p in (student, *linear)]
    loss = align_loss(params[0], teacher, *params[1:], impl=impl, **settings)
    (loss.sum() * upstream).backward()
    return [loss.detach(), *(p.grad for p in params if p is not None)]


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative, in the 2-norm; the absolute one where nothing is wanted."""
    size = float(want.double().norm())
    return float((got.double() - want.double()).norm()) / (size or 1.0)


class Errors:
    """Root mean squares over cases, ours beside eager's, by what they are errors of."""

    def __init__(self) -> None:
        self.squares: dict[Any, list[tuple[float, float]]] = defaultdict(list)

    def add(self, key: Any, ours: float, eager: float) -> None:
        self.squares[key].append((ours**2, eager**2))

    def check(self) -> None:
        for key, pairs in self.squares.items():
            ours, eager = (sqrt(sum(side) / len(pairs)) for side in zip(*pairs))
            assert ours <= 1.1 * eager, (key, ours, eager)


def test_as_exact_as_eager_over_random_cases() -> None:
    errors = Errors()
    limits = {torch.float32: 2e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3}
    for student, teacher, settings, upstream in random_cases(240):
        wide = results("eager", student.double(), teacher.double(), **settings)
        if student.dtype == torch.float16:  # a loss scale, without which its gradients are below what fp16 can hold
            upstream *= 2.0 ** -torch.frexp(wide[1].abs().max()).exponent
        wide[1] *= upstream
        ours = results("emulated", student, teacher, upstream=upstream, **settings)
        eager = results("eager", student, teacher, upstream=upstream, **settings)
        for name, got, plain, want in zip(("loss", "gradient"), ours, eager, wide):
            assert (got.dtype, got.shape) == (plain.dtype, plain.shape)
            errors.add((name, student.dtype if name == "gradient" else "any"), error(got, want), error(plain, want))
        where = (student.shape, student.stride(), student.dtype, settings)
        assert error(ours[0], wide[0]) < 1e-6, where
        assert error(ours[1], wide[1]) < limits[student.dtype], where
    errors.check()


@pytest.mark.parametrize("dtype", DTYPES)
def test_projection_is_as_exact_as_eager(dtype: torch.dtype) -> None:
    """In one chunk and in many: dW is accumulated in fp32."""
    torch.manual_seed(0)
    errors = Errors()
    pairs = [(norm, distance) for norm in NORMS for distance in DISTANCES]
    for i, (norm, distance) in enumerate(pairs * 6):  # so many that chance has no say in the means
        student = layout(("tokens", "plain", "transposed")[i % 3], 13, 24).to(dtype)
        weight, bias = (torch.randn(40, 24) / 5).to(dtype), torch.randn(40).to(dtype) if i % 2 else None
        teacher = torch.randn(*student.shape[:-1], 40).to(DTYPES[i // 3 % 3])
        row_weight = torch.rand(student.shape[:-1])
        row_weight[0] = 0
        student[row_weight == 0] = float("nan")
        settings: dict[str, Any] = {
            "norm": norm,
            "distance": distance,
            "reduction": REDUCTIONS[i % 3],
            "row_weight": row_weight,
        }
        linear = (weight, bias)
        wide = results(
            "eager", student.double(), teacher.double(), *(p if p is None else p.double() for p in linear), **settings
        )
        eager = results("eager", student, teacher, *linear, **settings)
        ours = results("emulated", student, teacher, *linear, **settings)
        runs = [ours]
        if settings["reduction"] != "none":
            params = [p if p is None else p.detach().requires_grad_() for p in (student, weight, bias)]
            args = (row_weight, norm, distance, settings["reduction"], 1.0, 4)
            loss = align_projected(params[0], teacher, params[1], params[2], *args)
            loss.backward()
            runs.append([loss.detach(), *(p.grad for p in params if p is not None)])
        for run in runs:
            for name, got, plain, want in zip(("loss", "student", "weight", "bias"), run, eager, wide):
                assert (got.shape, got.dtype) == (plain.shape, plain.dtype)
                errors.add(name, error(got, want), error(plain, want))
    errors.check()


@pytest.mark.parametrize("misfit", [1e-1, 1e-3])
@pytest.mark.parametrize("features", [512, 1001])
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("parallel", [False, True])
def test_keeps_its_digits_at_a_small_misfit(misfit: float, features: int, distance: Any, parallel: bool) -> None:
    torch.manual_seed(2)
    teacher = torch.nn.functional.normalize(torch.randn(1, features), dim=-1)
    student = 3 * (teacher + misfit / sqrt(features) * torch.randn(1, features))
    want = results("eager", student.double(), teacher.double(), distance=distance)
    student.requires_grad_()
    if parallel:
        got = align_loss_parallel(student, teacher, None, distance=distance, impl="emulated")
    else:
        got = align_loss(student, teacher, distance=distance, impl="emulated")
    got.backward()
    assert student.grad is not None
    assert error(got.detach(), want[0]) < 1e-6
    assert error(student.grad, want[1]) < 2e-5


@pytest.mark.parametrize("impl", ["emulated", "eager"])
@pytest.mark.parametrize("norm", NORMS)
def test_rows_that_do_not_count(impl: Any, norm: Any) -> None:
    torch.manual_seed(3)
    student, teacher = torch.randn(8, 24), torch.randn(8, 24)
    mask = torch.tensor([1, 1, 1, 1, 0, 0, 1, 1]).bool()
    if norm != "none":
        student[0], teacher[1], student[2] = 0, 0, 1e-20
    if norm == "layer":
        student[7] = 0.1
    student[4], student[5], teacher[5] = float("nan"), float("inf"), float("nan")
    rows, gradient = results(impl, student, teacher, norm=norm, reduction="none", row_weight=mask)
    dead = [4, 5] if norm == "none" else [0, 1, 2, 4, 5] + [7] * (norm == "layer")
    live = [i for i in range(8) if i not in dead]
    alone = results(impl, student[live], teacher[live], norm=norm, reduction="none")
    assert torch.equal(rows[live], alone[0])
    assert torch.equal(gradient[live], alone[1])
    assert not rows[dead].any()
    assert not gradient[dead].any()
    student[3, 2] = float("nan")
    assert not results(impl, student, teacher, norm=norm, row_weight=mask)[0].isfinite()


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (0, 8193), (1, 1), (1, 8)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weights", [None, 0.0, 2.0])
def test_no_rows_one_row_and_no_weight(shape: tuple[int, ...], reduction: Any, weights: float | None) -> None:
    student, teacher = torch.randn(shape), torch.randn(shape)
    settings: dict[str, Any] = {"norm": "none", "reduction": reduction}
    if weights is not None:
        settings["row_weight"] = torch.full(shape[:-1], weights)
    ours, eager = results("emulated", student, teacher, **settings), results("eager", student, teacher, **settings)
    linear = (torch.randn(5, shape[-1]), torch.randn(5))
    projected = torch.randn(*shape[:-1], 5)
    ours += results("emulated", student, projected, *linear, **settings)
    eager += results("eager", student, projected, *linear, **settings)
    for got, want in zip(ours, eager):
        torch.testing.assert_close(got, want)
        assert got.isfinite().all()


def test_rows_further_apart_than_int32() -> None:
    base = torch.empty(2**31 + 1000, dtype=torch.bfloat16)  # never touched but for two rows
    student = base.as_strided((2, 264), (2**31 + 64, 1))
    student.copy_(torch.randn(2, 264))
    teacher = torch.randn(2, 264)
    got, want = (results(impl, student, teacher) for impl in ("emulated", "eager"))
    assert error(got[0], want[0]) < 1e-6
    assert error(got[1], want[1]) < 4e-3


def test_any_upstream_gradient() -> None:
    torch.manual_seed(4)
    student, teacher = torch.randn(5, 24), torch.randn(5, 24)
    one = results("emulated", student, teacher)[1]
    for upstream in (-2.0, 0.0, 512.0):
        assert torch.equal(results("emulated", student, teacher, upstream=upstream)[1], upstream * one)
    params = [student.clone().requires_grad_() for _ in range(2)]
    for param, gradient in zip(params, (torch.tensor(3.0).expand(5), torch.full((5,), 3.0))):  # strides 0
        align_loss(param, teacher, reduction="none", impl="emulated").backward(gradient)
    assert torch.equal(params[0].grad, params[1].grad)
    half = student.half().requires_grad_()
    (align_loss(half.expand(4096, 5, 24), teacher.expand(4096, 5, 24), impl="emulated") * 65536).backward()
    want = results("eager", student.half().double(), teacher.double(), upstream=65536)[1]
    assert error(half.grad, want) < 5e-3  # a mean over 20,480 rows, which fp16 could not hold without the loss scale


def test_backward_twice_and_second_derivatives() -> None:
    student, teacher = torch.randn(5, 24, requires_grad=True), torch.randn(5, 24)
    loss = align_loss(student, teacher, impl="emulated")
    first = torch.autograd.grad(3 * loss, student, retain_graph=True)[0]
    kept = first.clone()
    assert torch.equal(torch.autograd.grad(3 * loss, student)[0], first)
    assert torch.equal(first, kept)
    loss = align_loss(student, teacher, impl="emulated")
    with pytest.raises(RuntimeError, match="use impl='eager'"):
        torch.autograd.grad(loss, student, create_graph=True)


class Record(torch.utils._python_dispatch.TorchDispatchMode):
    """Keeps whether the operators were asked for a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.wanted: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.compt_kernels.align_rows.default:
            self.wanted.append(args[-1])
        if func is torch.ops.compt_kernels.align_projected.default:
            self.wanted.append(args[-2] or args[-1])
        return func(*args, **(kwargs or {}))


def test_no_gradient_is_made_where_none_is_needed() -> None:
    student, teacher = torch.randn(5, 24), torch.randn(5, 24, requires_grad=True)
    weight, bias = torch.randn(24, 24), torch.randn(24, requires_grad=True)
    with Record() as record:
        assert not align_loss(student, teacher, impl="emulated").requires_grad
        with torch.no_grad():
            align_loss(student.requires_grad_(), teacher, impl="emulated")
            align_loss(student, teacher, weight, bias, impl="emulated")
        align_loss(student.detach(), teacher, weight, impl="emulated")
        assert record.wanted == [False] * 4
        align_loss(student.detach(), teacher, weight, bias, impl="emulated").backward()
        assert record.wanted[-1]
    assert bias.grad is not None
    assert teacher.grad is None
    assert student.grad is None


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_without_a_graph_break(linear: bool, reduction: Any) -> None:
    torch.manual_seed(5)
    teacher, row_weight = torch.randn(6, 24), torch.rand(6)
    params = [torch.randn(6, 16 if linear else 24), *((torch.randn(24, 16), torch.randn(24)) if linear else ())]
    params = [p.requires_grad_() for p in params]

    def loss(*params: torch.Tensor) -> torch.Tensor:
        student, *rest = params
        return (
            3
            * align_loss(2 * student, teacher, *rest, row_weight=row_weight, reduction=reduction, impl="emulated").sum()
        )

    want = torch.autograd.grad(loss(*params), params)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(*params), params)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant: bool) -> None:
    student, teacher = torch.randn(5, 24, requires_grad=True), torch.randn(5, 24)
    want = torch.autograd.grad(align_loss(2 * student, teacher, impl="emulated"), student)[0]
    loss = checkpoint(lambda s: align_loss(2 * s, teacher, impl="emulated"), student, use_reentrant=use_reentrant)
    loss.backward()
    assert torch.equal(student.grad, want)


def test_autocast() -> None:
    """Products in autocast's dtype, everything else in fp32; gradients in the parameters' dtypes."""
    torch.manual_seed(6)
    student, teacher, weight, bias = torch.randn(9, 16), torch.randn(9, 24), torch.randn(24, 16), torch.randn(24)
    wide = results("eager", student.double(), teacher.double(), weight.double(), bias.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = results("emulated", student, teacher, weight, bias)
        eager = results("eager", student, teacher, weight, bias)
        rows = results("emulated", student.bfloat16(), student)
    assert rows[0].dtype == torch.float32
    for got, plain, want in zip(ours, eager, wide):
        assert got.dtype == plain.dtype == torch.float32
        assert error(got, want) < 1.1 * error(plain, want) + 1e-4
    with pytest.raises(ValueError, match=r"weight is torch\.float32, student torch\.bfloat16"):
        align_loss(student.bfloat16(), teacher, weight, impl="emulated")


def test_repeats_bit_for_bit_whatever_the_order() -> None:
    torch.manual_seed(7)
    for features in (40, 1544, 77):
        student, teacher, row_weight = torch.randn(300, features), torch.randn(300, features), torch.rand(300)
        runs = []
        for order in (0, 0, 1, 2):
            with schedule(order):
                runs.append(results("emulated", student, teacher, row_weight=row_weight))
        for run in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(run, runs[0]))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("distance", DISTANCES)
def test_gradient_of_the_reference(norm: Any, distance: Any) -> None:
    torch.manual_seed(8)
    params = [torch.randn(4, 5), torch.randn(6, 5), torch.randn(6)]
    doubles = [p.double().requires_grad_() for p in params]
    teacher, row_weight = torch.randn(4, 6).double(), torch.tensor([1.0, 0.5, 0.0, 2.0]).double()
    settings: dict[str, Any] = {"norm": norm, "distance": distance, "row_weight": row_weight, "beta": 0.3}
    for reduction in REDUCTIONS:
        assert torch.autograd.gradcheck(
            lambda s, w, b, r=reduction: align_loss(s, teacher, w, b, reduction=r, **settings), doubles
        )


def test_opcheck() -> None:
    ops, check = torch.ops.compt_kernels, torch.library.opcheck
    student, teacher, row_weight = torch.randn(2, 3, 8), torch.randn(2, 3, 8), torch.rand(6)
    check(ops.align_rows.default, (student, teacher, row_weight, None, 1, 0, 2, 1.0, True))
    check(ops.align_rows.default, (student.half(), teacher, None, None, 2, 2, 0, 1.0, False))
    linear = (torch.randn(8, 8), torch.randn(8), row_weight)
    check(ops.align_projected.default, (student, teacher, *linear, 1, 0, 2, 1.0, torch.float32, 2, True, True))
    check(ops.align_totals.default, (student, teacher))
    check(ops.align_squares.default, (student, teacher, torch.rand(2, 6)))
    check(ops.align_distance.default, (student, teacher, torch.rand(5, 6), 0, 1.0))
    check(ops.align_gradient.default, (student, teacher, torch.rand(5, 6), torch.rand(3, 6), 2, 1.0))
    check(ops.align_parallel.default, (student, teacher, row_weight, "", 8, 1, 0, 2, 1.0, True, False))


BAD = [
    ({"teacher": torch.zeros(4, 8)}, r"student \(3, 8\) and teacher \(4, 8\)"),
    ({"teacher": torch.zeros(3, 6)}, r"give weight \[6, 8\]"),
    ({"weight": torch.zeros(8, 6)}, r"weight \(8, 6\) must be \(8, 8\)"),
    ({"weight": torch.zeros(8, 8), "bias": torch.zeros(6)}, r"bias \(6,\) must be \(8,\)"),
    ({"bias": torch.zeros(8)}, "bias without weight"),
    ({"row_weight": torch.zeros(4)}, r"row_weight \(4,\) must be \(3,\)"),
    ({"student": torch.zeros(3, 8).long()}, "student must be of a float dtype"),
    ({"student": torch.zeros(3, 0), "teacher": torch.zeros(3, 0)}, "at least one feature"),
    ({"norm": "l1"}, "norm='l1', expected one of l2, layer, none"),
    ({"beta": -1.0}, "beta=-1.0"),
    ({"impl": "triton"}, "impl='triton', expected one of auto"),
    ({"impl": "cuda"}, "the tensors are on cpu, not on cuda"),
    ({"impl": "emulated", "student": torch.zeros(3, 8).double()}, "float64 is not float32, bfloat16 or float16"),
]


@pytest.mark.parametrize(("changes", "says"), BAD)
def test_what_does_not_fit_is_named(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        align_loss(**({"student": torch.zeros(3, 8), "teacher": torch.zeros(3, 8)} | changes))


def test_auto_says_once_what_it_chose(caplog: pytest.LogCaptureFixture) -> None:
    from compt_kernels import dispatch

    dispatch._said.clear()
    with caplog.at_level("INFO", "compt_kernels"):
        for _ in range(2):
            align_loss(torch.randn(3, 8), torch.randn(3, 8))
    assert [r.getMessage() for r in caplog.records] == [
        "align_loss runs as plain PyTorch: the tensors are on cpu, not on cuda"
    ]
