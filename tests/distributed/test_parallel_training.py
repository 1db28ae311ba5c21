"""Tensor, pipeline, virtual pipeline, data parallelism and ZeRO: the losses, gradients and weights of one process.

`benchmarks/layouts.py` goes through all layouts of four processes; these are a covering few.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.engine_cases import STEPS, write_start
from tests.distributed.layout_cases import (
    CONFIG,
    PLAIN,
    Case,
    Ran,
    distance,
    gradient,
    layout,
    loss_distance,
    of,
    outcomes,
)

# One job runs its cases, all of one model, in turn: a process also goes from layout to layout, as a chain's links do.
JOBS: list[tuple[int, list[Case]]] = [
    (1, [Case(layout("megatron"), STEPS, aligned) for aligned in (False, True)]),
    (
        2,
        [
            Case(layout("deepspeed", 2, zero=0), STEPS, aligned=True),
            Case(layout("megatron", zero=0, micro_batches=2), STEPS),
            Case(layout("megatron", 1, 2), STEPS, aligned=True),
        ],
    ),
    (
        4,
        [
            Case(layout("deepspeed", 2, zero=1, sequence=True, micro_batches=2), STEPS, aligned=True),
            Case(layout("megatron", 2, 1, micro_batches=4, sequence=True), STEPS, aligned=True),
            Case(layout("megatron", 2, 2, zero=0, micro_batches=4, sequence=True), STEPS, aligned=True),
            Case(layout("megatron", 1, 2, 2, micro_batches=4), STEPS, aligned=True),
            Case(layout("megatron", 1, 4), STEPS),
        ],
    ),
    (
        2,
        [
            Case(layout("megatron", 2, sequence=True), STEPS, aligned=True, config=PLAIN),
            Case(layout("megatron", 1, 2, zero=0, micro_batches=4), STEPS, config=PLAIN),
            Case(layout("deepspeed", zero=3), STEPS, config=PLAIN),
            Case(layout("deepspeed", zero=2, micro_batches=2), STEPS, aligned=True, config=PLAIN),
            Case(layout("megatron", 1, 2, 2, zero=0, micro_batches=4), STEPS, aligned=True, config=PLAIN),
        ],
    ),
]


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("start")
    return {kind: write_start(folder / kind, config) for kind, config in (("clip", CONFIG), ("vit", PLAIN))}


_expected: dict[str, dict[bool, Ran]] = {}


def expected(starts: dict[str, Path], case: Case) -> Ran:
    """One process that sees the whole batch at once, itself compared with open_clip's model in test_engine.py."""
    if not _expected:
        for kind, config in (("clip", CONFIG), ("vit", PLAIN)):
            cases = [Case({"zero": 0}, STEPS, aligned, config=config) for aligned in (False, True)]
            _expected[kind] = dict(zip((False, True), outcomes(starts[kind], cases, 1)))
    return _expected[kind_of(case)][case.aligned]


def kind_of(case: Case) -> str:
    return "clip" if "text_cfg" in case.config else "vit"


@pytest.mark.parametrize(("world", "cases"), JOBS, ids=["one rank", "two ranks", "four ranks", "plain ViT"])
def test_every_layout_takes_the_steps_of_one_process(starts: dict[str, Path], world: int, cases: list[Case]) -> None:
    for case, found in zip(cases, outcomes(starts[kind_of(cases[0])], cases, world), strict=True):
        check(case, found, expected(starts, case))


def check(case: Case, found: Ran, wanted: Ran) -> None:
    name: Any = case.parallel
    assert loss_distance(found, wanted) < 1e-4, name
    assert found.norms == pytest.approx(wanted.norms, rel=1e-4), name
    assert distance(gradient(found), gradient(wanted)) < 1e-5, name
    for kind in ("weight", "exp_avg", "exp_avg_sq"):
        assert distance(of(found.last, kind), of(wanted.last, kind)) < 1e-3, (name, kind)
    assert found.count == STEPS, name
    assert distance(found.features, wanted.features) < 1e-4, name
