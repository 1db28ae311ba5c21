"""A run's checkpoint: going on from it is as if nothing had happened, in any layout; bad numbers reach no weight."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from compt_megatron.errors import UserError
from compt_megatron.spec.families import spec_from_config
from tests.distributed.engine_cases import CONFIG, engine_of, make_engine, pieces_of, rank_batch, state_of, write_start
from tests.distributed.spawn import run_ranks

FIRST, MORE = 2, 2
Layout = tuple[int, str]  # ZeRO stage, precision
LAYOUTS: dict[int, list[Layout]] = {  # together every stage in both precisions
    1: [(0, "fp32"), (0, "bf16"), (1, "fp32"), (2, "bf16"), (3, "fp32")],
    2: [(0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "bf16")],
}
State = dict[str, Any]


def snapshot(engine: Any) -> State:
    """Masters, moments and counters, and every weight as the forward pass sees it (bits, not values)."""
    state: State = {name: tensor.clone() for name, tensor in state_of(engine).items()}
    for name, param in engine._student.named_parameters():
        piece = getattr(param, "ds_tensor", param)
        state[f"local/{name}"] = piece.detach().clone()
    return {**state, "step": engine._state.step, "global_step": engine.global_step}


def differing(left: State, right: State, among: str = "") -> list[str]:
    assert left.keys() == right.keys()
    names = [name for name in left if name.startswith(among)]
    return [name for name in names if not _same(left[name], right[name])]


def _same(left: Any, right: Any) -> bool:
    if not isinstance(left, torch.Tensor):
        return bool(left == right)
    return left.dtype == right.dtype and left.shape == right.shape and bool((left == right).all())


def go_on(engine: Any, rank: int, world: int, first: int, count: int) -> list[float]:
    return [engine.step(rank_batch(step, rank, world)).loss for step in range(first, first + count)]


def whole(state: State) -> State:
    """Without what depends on the layout: the rank's own pieces."""
    return {name: value for name, value in state.items() if not name.startswith("local/")}


# -- in two processes, the second knows only the folder --------------------------------------------------------------


def undisturbed(rank: int, world: int, folder: str, layouts: list[Layout]) -> list[tuple[State, State, list[float]]]:
    """Every layout: FIRST steps, save, MORE steps. Returns the states at the save and at the end, and the losses."""
    from compt_megatron.engine.runtime import Runtime

    runtime, found = Runtime.start(), []
    for zero, precision in layouts:
        engine = make_engine(runtime, (zero, 1), precision, aligned=True)
        engine.load(Path(folder) / "start")
        losses = go_on(engine, rank, world, 0, FIRST)
        saved = snapshot(engine)
        engine.save(Path(folder) / f"{zero}-{precision}-{world}", {"step": FIRST}, [])
        losses += go_on(engine, rank, world, FIRST, MORE)
        found.append((saved, snapshot(engine), losses))
        engine.close()
    return found


def resumed(
    rank: int, world: int, start: str, sources: list[str], layouts: list[Layout]
) -> list[tuple[State, State, list[float], dict[str, Any]]]:
    """Every layout: load, MORE steps. Returns the states after the load and at the end, losses and metadata."""
    from compt_megatron.engine.runtime import Runtime

    runtime, found = Runtime.start(), []
    for source, (zero, precision) in zip(sources, layouts):
        engine = make_engine(runtime, (zero, 1), precision, aligned=True)
        engine.load(Path(start))
        go_on(engine, rank, world, 50, 1)  # an engine that has been used: the load must replace all of its state
        metadata = engine.load(Path(source))
        loaded = snapshot(engine)
        losses = go_on(engine, rank, world, FIRST, MORE)
        found.append((loaded, snapshot(engine), losses, metadata))
        engine.close()
    return found


@pytest.mark.parametrize("world", [1, 2])
def test_saved_killed_and_resumed_is_undisturbed_bit_for_bit(world: int, tmp_path: Path) -> None:
    start = str(write_start(tmp_path / "start"))
    layouts = LAYOUTS[world]
    expected = run_ranks(undisturbed, world, str(tmp_path), layouts)
    sources = [str(tmp_path / f"{zero}-{precision}-{world}") for zero, precision in layouts]
    found = run_ranks(resumed, world, start, sources, layouts)
    for rank in range(world):
        for layout, (saved, end, losses), (loaded, again, later, metadata) in zip(layouts, expected[rank], found[rank]):
            assert any("projections" in name for name in saved), "the projections are part of the state"
            assert saved["step"] == FIRST
            assert end["step"] == FIRST + MORE
            assert differing(saved, end), f"{layout}: training changes the state"
            assert differing(saved, loaded) == [], layout
            assert later == losses[FIRST:], layout
            assert differing(end, again) == [], layout
            assert metadata["train"]["step"] == FIRST


def test_a_checkpoint_of_two_ranks_goes_on_in_any_number(tmp_path: Path) -> None:
    start = str(write_start(tmp_path / "start"))
    saved, end, losses = run_ranks(undisturbed, 2, str(tmp_path), [(3, "fp32")])[0][0]
    source = str(tmp_path / "3-fp32-2")
    for world, zero in ((1, 0), (4, 1)):
        loaded, again, later, _ = run_ranks(resumed, world, start, [source], [(zero, "fp32")])[0][0]
        assert differing(whole(saved), whole(loaded)) == [], (world, zero)
        assert later == pytest.approx(losses[FIRST:], abs=1e-4)
        for name, value in whole(end).items():
            if isinstance(value, torch.Tensor) and not name.startswith("exp_avg"):
                assert (again[name] - value).abs().max() < 1e-3, (world, zero, name)


# -- what is loaded --------------------------------------------------------------------------------------------------


def load_others(rank: int, world: int, folder: str) -> tuple[State, State, str]:
    """After training: weights alone (a first checkpoint, and one with state that is not wanted); another model's."""
    from compt_megatron.engine.runtime import Runtime
    from compt_megatron.growth.fresh import write_fresh

    runtime = Runtime.start()
    engine = make_engine(runtime, (3, 1), aligned=True)
    engine.load(Path(folder) / "start")
    go_on(engine, rank, world, 0, FIRST)
    engine.save(Path(folder) / "trained", {"step": FIRST}, [])
    engine.load(Path(folder) / "start")
    weights = snapshot(engine)
    engine.load(Path(folder) / "trained", optimizer=False)
    without_state = snapshot(engine)
    other = Path(folder) / "other"
    if rank == 0:
        config = {**CONFIG, "vision_cfg": {**CONFIG["vision_cfg"], "layers": 3}}
        write_fresh(spec_from_config(config, "deeper"), other, seed=1)
    runtime.barrier()
    try:
        engine.load(other)
    except UserError as error:
        return weights, without_state, str(error)
    raise AssertionError("another model's checkpoint was loaded")


def test_weights_alone_start_with_zero_moments_and_other_models_are_refused(tmp_path: Path) -> None:
    write_start(tmp_path / "start")
    for weights, without_state, error in run_ranks(load_others, 2, str(tmp_path)):
        for state in (weights, without_state):
            assert state["step"] == 0
            assert state["global_step"] == 0
            moments = {name: value for name, value in state.items() if name.startswith("exp_avg")}
            assert moments
            assert not any(value.any() for value in moments.values())
        assert differing(weights, without_state, "model."), "the trained weights were loaded"
        assert "deeper" in error
        assert "\n" not in error


# -- numbers that are not finite -------------------------------------------------------------------------------------


def poisoned(rank: int, world: int, start: str, cases: list[tuple[int, int, str, str]]) -> list[dict[str, Any]]:
    """Every case: two good steps, one with a bad image or gradient on the last rank, one good one."""
    from compt_megatron.engine.runtime import Runtime

    runtime, found = Runtime.start(), []
    for zero, micro_batches, precision, what in cases:
        engine = make_engine(runtime, (zero, micro_batches), precision, aligned=True)
        engine.load(Path(start))
        go_on(engine, rank, world, 0, FIRST)
        before = snapshot(engine)
        batch, hook = rank_batch(FIRST, rank, world), None
        if rank == world - 1 and what == "image":
            batch.images[1, 2, 3, 4] = float("inf")
        if rank == world - 1 and what == "gradient":
            hook = engine._student.register_forward_hook(_spoil_gradient)
        bad = engine.step(batch)
        if hook is not None:
            hook.remove()
        after = snapshot(engine)
        good = engine.step(rank_batch(FIRST + 1, rank, world))
        changed = differing(before, snapshot(engine), "model.")
        found.append({"bad": bad, "good": good, "spoilt": differing(before, after), "changed": len(changed)})
        engine.close()
    return found


def masters(engine: Any) -> State:
    return {name: part for name, _, part in pieces_of(engine, ["weight"])}


def in_another_precision(rank: int, world: int, folder: str) -> list[tuple[State, State, float]]:
    """A checkpoint in bf16, and what each engine makes of it in fp32: saved and loaded masters, the loss of a step."""
    from compt_megatron.engine.runtime import Runtime

    runtime, found = Runtime.start(), []
    engine = make_engine(runtime, (1, 1), "bf16")
    engine.load(Path(folder) / "start")
    go_on(engine, rank, world, 0, FIRST)
    saved = masters(engine)
    engine.save(Path(folder) / "bf16", {"step": FIRST}, [])
    engine.close()
    for layout in ({"zero": 0}, {"zero": 3}, {"engine": "megatron", "zero": 0}, {"engine": "megatron", "zero": 1}):
        engine = engine_of(runtime, layout, "fp32")
        engine.load(Path(folder) / "bf16")
        found.append((saved, masters(engine), go_on(engine, rank, world, FIRST, 1)[0]))
        engine.close()
    return found


def test_fp32_goes_on_from_the_masters_of_bf16(tmp_path: Path) -> None:
    write_start(tmp_path / "start")
    found = run_ranks(in_another_precision, 1, str(tmp_path))[0]
    for saved, loaded, _ in found:
        assert differing(saved, loaded) == []
    assert [loss for *_, loss in found] == pytest.approx([found[0][2]] * len(found), abs=1e-6)


def _spoil_gradient(module: torch.nn.Module, inputs: Any, outputs: dict[str, torch.Tensor]) -> None:
    if outputs["image"].requires_grad:
        outputs["image"].register_hook(lambda gradient: gradient * float("inf"))


POISONED = {
    1: [(0, 2, "fp32", "gradient"), (1, 1, "bf16", "gradient"), (3, 2, "fp32", "gradient")],
    2: [
        (0, 1, "fp32", "gradient"),
        (0, 1, "fp32", "image"),
        (1, 1, "fp32", "gradient"),
        (2, 1, "bf16", "gradient"),
        (2, 2, "fp32", "image"),
        (3, 1, "fp32", "gradient"),
    ],
}


@pytest.mark.parametrize("world", [1, 2])
def test_a_step_that_is_not_finite_leaves_no_trace(world: int, tmp_path: Path) -> None:
    found = run_ranks(poisoned, world, str(write_start(tmp_path / "start")), POISONED[world])
    for rank in range(world):
        for case, seen in zip(POISONED[world], found[rank]):
            assert seen["bad"].skipped, case
            assert seen["spoilt"] == ["global_step"], case  # the data goes on, the optimizer does not
            assert not seen["good"].skipped, case
            assert math.isfinite(seen["good"].loss), case
            assert seen["changed"] > 10, case
