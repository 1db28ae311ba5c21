"""Language models in training: on any layout the losses and weights of one process, with and without a teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from compt_megatron.checkpoint.formats import open_reader
from tests.distributed.engine_cases import engine_of, whole_batch, write_start
from tests.distributed.layout_cases import Case, Ran, distance, gradient, layout, loss_distance, of, outcomes
from tests.distributed.spawn import run_ranks

STEPS = 6
TIED: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 48, "vocab_size": 61, "max_position_embeddings": 32,
    "tie_word_embeddings": True,
}  # fmt: skip
UNTIED = {**TIED, "tie_word_embeddings": False}
JOBS = {
    1: [
        (TIED, layout("megatron"), True),
        (UNTIED, layout("deepspeed", zero=3, micro_batches=2), False),
    ],
    2: [
        (TIED, layout("deepspeed", zero=3), True),
        (UNTIED, layout("deepspeed", zero=2, micro_batches=2), True),
        (TIED, layout("deepspeed", 2, sequence=True, micro_batches=2), True),
        (TIED, layout("megatron", 1, 2, micro_batches=4), True),
        (UNTIED, layout("megatron", zero=1, micro_batches=2), True),
    ],
    4: [
        (TIED, layout("megatron", 2, 2, 2, micro_batches=4, sequence=True), True),
        (TIED, layout("megatron", 1, 2, zero=1, micro_batches=2, recompute="full"), True),
        (UNTIED, layout("megatron", 2, 1, zero=1), False),
    ],
}


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    folder = tmp_path_factory.mktemp("start")
    return {config is TIED: write_start(folder / str(config is TIED), config) for config in (TIED, UNTIED)}


@pytest.fixture(scope="module")
def expected(starts: dict[bool, Path]) -> dict[tuple[bool, bool], Ran]:
    """One process under DeepSpeed's stage 0, by (tied, aligned)."""
    found = {}
    for config in (TIED, UNTIED):
        for aligned in (False, True):
            case = Case({"zero": 0}, STEPS, aligned, config=config)
            (found[config is TIED, aligned],) = outcomes(starts[config is TIED], [case], 1)
    return found


@pytest.mark.parametrize("world", JOBS)
def test_every_layout_takes_the_steps_of_one_process(
    starts: dict[bool, Path], expected: dict[tuple[bool, bool], Ran], world: int
) -> None:
    for tied in (True, False):
        cases = [
            Case(parallel, STEPS, aligned, config=config)
            for config, parallel, aligned in JOBS[world]
            if (config is TIED) == tied
        ]
        for case, found in zip(cases, outcomes(starts[tied], cases, world), strict=True):
            check(case, found, expected[tied, case.aligned])


def check(case: Case, found: Ran, wanted: Ran) -> None:
    name: Any = case.parallel
    assert loss_distance(found, wanted) < 1e-4, name
    assert found.norms == pytest.approx(wanted.norms, rel=1e-4), name
    assert distance(gradient(found), gradient(wanted)) < 1e-5, name
    for kind in ("weight", "exp_avg", "exp_avg_sq"):
        assert distance(of(found.last, kind), of(wanted.last, kind)) < 1e-3, (name, kind)
    assert found.count == STEPS, name
    assert found.features["loss"] == pytest.approx(float(wanted.features["loss"]), rel=1e-5), name


RELAY = [
    (4, layout("megatron", 2, 2, 2, micro_batches=4, sequence=True)),
    (2, layout("deepspeed", zero=3)),
    (2, layout("megatron", 1, 2, micro_batches=2)),
]


def leg(rank: int, world: int, before: str, after: str, parallel: dict[str, Any], first: int) -> list[float]:
    from compt_megatron.engine.runtime import Runtime

    engine = engine_of(Runtime.start(), parallel, aligned=True, config=TIED)
    engine.load(Path(before))
    place = engine.topology
    losses = [
        engine.step(whole_batch(step, TIED).split(place.data)[place.data_rank]).loss for step in range(first, first + 2)
    ]
    engine.save(Path(after), {"step": first + 2}, [])
    engine.close()
    return losses


def test_a_run_goes_on_under_other_layouts(
    starts: dict[bool, Path], expected: dict[tuple[bool, bool], Ran], tmp_path: Path
) -> None:
    path, losses = starts[True], []
    for number, (world, parallel) in enumerate(RELAY):
        after = tmp_path / f"step_{number}"
        losses += run_ranks(leg, world, str(path), str(after), parallel, 2 * number)[0]
        path = after
    assert losses == pytest.approx([loss for loss, *_ in expected[True, True].losses], rel=1e-4)
    reader = open_reader(path)
    wanted = {name: value for name, value in expected[True, True].last.items() if "weight/align/" not in name}
    held = {name: reader.read(name) for name in reader.tensors() if name in wanted}
    reader.close()
    assert held.keys() == wanted.keys()
    assert distance(of(held, "weight"), of(wanted, "weight")) < 1e-3
