"""megatron-core reduces a bucket of gradients while the backward pass goes on, whatever a step has gradients of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.engine_cases import engine_of, pieces_of, whole_batch, write_start
from tests.distributed.layout_cases import CONFIG, layout
from tests.distributed.spawn import run_ranks

STEPS, ALIGNED = 4, 2  # the alignment ends half-way: its projections have no gradient then
LAYOUTS = [layout("megatron", zero=0), layout("megatron", zero=1, micro_batches=2)]


def run(rank: int, world: int, start: str, layouts: list[dict[str, Any]], bucket: int) -> list[dict[str, Any]]:
    from compt_megatron.engine.runtime import Runtime

    runtime = Runtime.start()
    return [_run_one(runtime, Path(start), parallel, bucket) for parallel in layouts]


def _run_one(runtime: Any, start: Path, parallel: dict[str, Any], bucket: int) -> dict[str, Any]:
    from compt_megatron.align.alignment import Alignment
    from compt_megatron.engine import megatron_optimizer

    megatron_optimizer.BUCKET = bucket
    early: list[tuple[int, int]] = []  # buckets reduced before the update began, of how many
    rest = megatron_optimizer._start_the_rest

    def watched(buffers: Any) -> None:
        early.append((sum(g.grad_reduce_handle is not None for g in buffers.bucket_groups), len(buffers.bucket_groups)))
        rest(buffers)

    megatron_optimizer._start_the_rest = watched
    try:
        engine = engine_of(runtime, parallel, aligned=True, config=CONFIG)
        engine.losses.alignment = Alignment(weight=0.7, end_step=ALIGNED)
        engine.load(start)
        place = engine.topology
        losses = [
            engine.step(whole_batch(step, CONFIG).split(place.data)[place.data_rank]).loss for step in range(STEPS)
        ]
        found = {"losses": losses, "early": early, "pieces": pieces_of(engine)}
        engine.close()
        return found
    finally:
        megatron_optimizer._start_the_rest = rest


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_start(tmp_path_factory.mktemp("start") / "start", CONFIG)


@pytest.fixture(scope="module")
def alone(start: Path) -> dict[str, Any]:
    return run_ranks(run, 1, str(start), [layout("megatron", zero=0)], 0)[0][0]


def test_gradients_are_reduced_while_the_backward_pass_goes_on(start: Path, alone: dict[str, Any]) -> None:
    for found in run_ranks(run, 2, str(start), LAYOUTS, 3_000):
        for one in found:
            assert one["losses"] == pytest.approx(alone["losses"], rel=1e-4)
            learning, second, *later = one["early"]
            assert learning[0] == 0, "megatron learns in the first step when a bucket is whole"
            assert second[0] == second[1] > 3
            assert all(second[1] > done > 0 for done, _ in later), "all but the one with the projections"


def test_stages_of_a_pipeline_reduce_their_own(start: Path, alone: dict[str, Any]) -> None:
    for (found,) in run_ranks(run, 4, str(start), [layout("megatron", 1, 2, micro_batches=2)], 3_000):
        assert found["losses"] == pytest.approx(alone["losses"], rel=1e-4)
        assert found["early"][1][0] == found["early"][1][1]


def test_the_result_does_not_depend_on_the_buckets(start: Path) -> None:
    small, large = (run_ranks(run, 2, str(start), LAYOUTS[:1], bucket)[0][0] for bucket in (3_000, 10**9))
    assert small["early"][1][1] > 3
    assert large["early"][1][1] == 1
    assert small["losses"] == large["losses"]
    for one, other in zip(small["pieces"], large["pieces"], strict=True):
        assert one[0] == other[0]
        assert torch.equal(one[2], other[2]), one[0]
