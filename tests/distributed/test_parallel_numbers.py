"""bf16 with fp32 masters, clipping, the logit scale's limits and numbers that are not finite, wherever the model is
split: what every rank holds and says is what one process would."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from compt_megatron.checkpoint.formats import open_reader
from compt_megatron.spec.families import spec_from_config
from tests.distributed.engine_cases import engine_of, joined, pieces_of, whole_batch, write_start
from tests.distributed.layout_cases import CONFIG, Case, Ran, State, distance, gradient, layout, of, outcomes, uneven
from tests.distributed.spawn import run_ranks

STEPS, LR = 2, 1e-3
BF16 = [
    layout("megatron", 1, 2, 2, micro_batches=2),
    layout("megatron", 2, 1, zero=0, sequence=True),
    layout("megatron", 2, 2, zero=0),
    layout("deepspeed", 2, zero=0),
    layout("deepspeed", 2, zero=2, sequence=True, micro_batches=2),
    layout("deepspeed", 2, zero=3),
]
CLIPPED = [
    layout("megatron", 2, 2, zero=0),
    layout("megatron", 2, 2, zero=1),
    layout("deepspeed", 2, zero=0),
    layout("deepspeed", 2, zero=1),
    layout("deepspeed", 2, zero=3),
]
# a whole tensor; the queries alone of the tensor that queries, keys and values share in training; a bias
FACTORS = {
    "visual.proj": (0.5, 2.0),
    "visual.transformer.resblocks.0.attn.q_proj.weight": (8.0, 0.125),
    "transformer.resblocks.1.mlp.c_fc.bias": (3.0, 1.0),
}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_start(tmp_path_factory.mktemp("start") / "start", CONFIG)


def like(found: State, wanted: State) -> float:
    """The least cosine between two tensors, of those that are not nothing beside the whole."""
    floor = 1e-2 * torch.stack([value.norm() for value in wanted.values()]).norm()
    return min(
        float(torch.nn.functional.cosine_similarity(found[name].flatten(), value.flatten(), dim=0))
        for name, value in wanted.items()
        if value.norm() > floor
    )


# -- bf16, and gradients that are clipped ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fp32(start: Path) -> tuple[Ran, Ran]:
    """One process in fp32, and one with clipping and factors."""
    plain, clipped = outcomes(start, [case({"zero": 0}), clipped_case({"zero": 0})], 1)
    return plain, clipped


def case(parallel: dict[str, Any], precision: str = "fp32", **optimizer: Any) -> Case:
    return Case(parallel, STEPS, aligned=True, precision=precision, optimizer={"lr": LR, **optimizer})


def clipped_case(parallel: dict[str, Any]) -> Case:
    return replace(case(parallel, clip_grad=0.1), factors=FACTORS)


def test_bf16_follows_fp32(start: Path, fp32: tuple[Ran, Ran]) -> None:
    wanted = fp32[0]
    for parallel, found in zip(BF16, outcomes(start, [case(parallel, "bf16") for parallel in BF16], 4), strict=True):
        assert [loss for loss, *_ in found.losses] == pytest.approx([loss for loss, *_ in wanted.losses], rel=1e-2)
        assert found.norms == pytest.approx(wanted.norms, rel=5e-2), parallel
        assert like(gradient(found), gradient(wanted)) > 0.99, parallel
        assert found.count == STEPS, f"{parallel}: DeepSpeed's stage 0 counts one step before the first"
        for kind in ("weight", "exp_avg_sq"):
            assert distance(of(found.last, kind), of(wanted.last, kind)) < 0.2, (parallel, kind)


def test_gradients_are_clipped_by_the_norm_of_the_whole_model(start: Path, fp32: tuple[Ran, Ran]) -> None:
    plain, wanted = fp32
    assert min(plain.norms) > 0.2, "clipping at 0.1 does something"
    assert like(gradient(wanted), gradient(plain)) > 0.9999
    assert distance(gradient(wanted), gradient(plain)) > 0.5
    cases = [clipped_case(parallel) for parallel in CLIPPED]
    for parallel, found in zip(CLIPPED, outcomes(start, cases, 4), strict=True):
        assert found.norms == pytest.approx(wanted.norms, rel=1e-4), parallel
        assert distance(gradient(found), gradient(wanted)) < 2e-5, parallel
        assert distance(of(found.last, "weight"), of(wanted.last, "weight")) < 1e-3, parallel


def test_factors_are_on_the_steps_of_their_tensors(start: Path) -> None:
    """Without decay, Adam's first step is the rate times the sign of the gradient."""
    one = replace(case({"zero": 0}, weight_decay=0.0), steps=1)
    plain, scaled = outcomes(start, [one, replace(one, factors=FACTORS)], 1)
    reader = open_reader(start)
    began = {name: reader.read(f"weight/{name}") for name in spec_from_config(CONFIG, "tiny").params}
    reader.close()
    moved = [{name: ran.first[f"weight/{name}"] - began[name] for name in began} for ran in (plain, scaled)]
    wanted = {name: rate for name, (rate, _) in FACTORS.items()}
    for part in "qkv":
        wanted[f"visual.transformer.resblocks.0.attn.{part}_proj.weight"] = 2.0  # the geometric mean of 8, 1 and 1
    for name in began:
        ratio = moved[1][name].abs().sum() / moved[0][name].abs().sum()
        assert float(ratio) == pytest.approx(wanted.get(name, 1.0), rel=1e-2), name


# -- what must not reach a weight ------------------------------------------------------------------------------------

GUARDED = [
    (layout("megatron", 2, 2, micro_batches=2), "bf16"),
    (layout("megatron", 2, 2, zero=0), "fp32"),
    (layout("megatron", 1, 2, 2, zero=0, micro_batches=2), "bf16"),
    (layout("deepspeed", 2, zero=0), "fp32"),
    (layout("deepspeed", 2, zero=0), "bf16"),
    (layout("deepspeed", 2, zero=1, sequence=True), "bf16"),
    (layout("deepspeed", 2, zero=3), "fp32"),
]
BAD = ("image", "gradient of one rank")


@dataclass
class Guarded:
    """One rank's part of a case; states are pieces, then whole."""

    before: Any
    after: dict[str, Any]  # the state after each of BAD
    skipped: dict[str, bool]
    good: Any  # the weights after one more step
    good_loss: float
    good_skipped: bool
    scales: list[list[float]]  # the logit scale's master and weight, both ends, where the rank has it
    uneven: list[str]


def guard(rank: int, world: int, start: str) -> list[Guarded]:
    from compt_megatron.engine.runtime import Runtime

    runtime = Runtime.start()
    return [_guarded(runtime, Path(start), parallel, precision) for parallel, precision in GUARDED]


def _guarded(runtime: Any, start: Path, parallel: dict[str, Any], precision: str) -> Guarded:
    engine = engine_of(runtime, parallel, precision, True, CONFIG, lr=LR)
    engine.load(start)
    place = engine.topology

    def step(number: int, spoilt: bool = False) -> Any:
        batch = whole_batch(number).split(place.data)[place.data_rank]
        if spoilt and place.data_rank == place.data - 1:
            batch.images[1, 2, 3, 4] = float("inf")
        return engine.step(batch)

    step(0)
    before, after, skipped = pieces_of(engine), {}, {}
    skipped["image"] = step(1, spoilt=True).skipped
    after["image"] = pieces_of(engine)
    # one entry of a weight that only this rank has: of the second tensor-parallel rank, or of a stage
    hook = _a_matrix(engine).register_hook(_spoil) if runtime.rank == 1 else None
    skipped["gradient of one rank"] = step(2).skipped
    if hook is not None:
        hook.remove()
    after["gradient of one rank"] = pieces_of(engine)
    result = step(3)
    good = pieces_of(engine, ["weight"])
    scales = [_scale_after(engine, step, value) for value in (9.0, -9.0)]
    found = Guarded(before, after, skipped, good, result.loss, result.skipped, scales, uneven(engine))
    engine.close()
    return found


def _a_matrix(engine: Any) -> torch.nn.Parameter:
    return next(held.param for held in engine._checkpoint._held if held.names[0].endswith("c_fc.weight"))


def _spoil(gradient: torch.Tensor) -> torch.Tensor:
    gradient = gradient.clone()
    gradient.view(-1)[0] = float("inf")
    return gradient


def _scale_after(engine: Any, step: Any, value: float) -> list[float]:
    """The logit scale's master and weight after a step from `value`; nothing where another rank has it."""
    mine = [held.param for held in engine._checkpoint._held if held.names == ["logit_scale"]]
    for param in mine:
        engine._state.set_weight(param, torch.full((1,), value).to(engine._dtype), torch.full((1,), value))
    step(4)
    return [number for param in mine for number in (float(engine._state.master(param)), _weight(param))]


def _weight(param: torch.nn.Parameter) -> float:
    """The value that the model computes with. Collective under ZeRO 3."""
    import deepspeed

    with deepspeed.zero.GatheredParameters([param], enabled=hasattr(param, "ds_id")):
        return float(param)


@pytest.fixture(scope="module")
def guarded(start: Path) -> list[list[Guarded]]:
    """Each case's ranks."""
    ranks = run_ranks(guard, 4, str(start))
    return [[rank[index] for rank in ranks] for index in range(len(GUARDED))]


@pytest.mark.parametrize("index", range(len(GUARDED)), ids=lambda index: str(GUARDED[index]))
def test_a_step_that_is_not_finite_is_refused_on_all_ranks(guarded: list[list[Guarded]], index: int) -> None:
    ranks, spec = guarded[index], spec_from_config(CONFIG, "tiny")
    before = joined(spec, [rank.before for rank in ranks])
    for what in BAD:
        assert [rank.skipped[what] for rank in ranks] == [True] * 4, what
        after = joined(spec, [rank.after[what] for rank in ranks])
        assert [name for name, value in before.items() if not torch.equal(value, after[name])] == [], what
    good = joined(spec, [rank.good for rank in ranks])
    assert not any(rank.good_skipped for rank in ranks)
    assert all(rank.good_loss == ranks[0].good_loss for rank in ranks)
    assert math.isfinite(ranks[0].good_loss)
    assert sum(not torch.equal(value, good[name]) for name, value in of(before, "weight").items()) > 10


@pytest.mark.parametrize("index", range(len(GUARDED)), ids=lambda index: str(GUARDED[index]))
def test_the_logit_scale_keeps_its_limits_in_weights_and_masters(guarded: list[list[Guarded]], index: int) -> None:
    parallel, precision = GUARDED[index]
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    top = torch.tensor(math.log(100))
    holders = [rank for rank in guarded[index] if rank.scales[0]]
    assert len(holders) == 4 // parallel["pipeline"]
    for rank in holders:
        (top_master, top_weight), (low_master, low_weight) = rank.scales
        assert top_master == float(top)
        assert top_weight == float(top.to(dtype))
        assert (low_master, low_weight) == (0.0, 0.0)
    assert [rank.uneven for rank in guarded[index]] == [[]] * 4
