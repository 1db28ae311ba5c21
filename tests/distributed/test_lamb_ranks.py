"""LAMB on several ranks: parameters cut by tensor parallelism step like whole ones; the engine trains with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.engine_cases import make_engine, rank_batch, state_of, write_start
from tests.distributed.spawn import run_ranks
from tests.unit.lamb_reference import decays, error, gradient, references, settings, start, take_step

STEPS = 4
CUT = {"a.weight": 0, "b.weight": 1, "a.bias": 0}  # the dimension that is cut; the others are whole on every rank


def cut(name: str, value: torch.Tensor, rank: int, world: int) -> torch.Tensor:
    return value.chunk(world, CUT[name])[rank] if name in CUT else value


def step_parts(rank: int, world: int, marked: bool) -> dict[str, torch.Tensor]:
    """STEPS steps on this rank's parts, megatron's mark on those that are cut (if `marked`)."""
    import torch.distributed as dist

    from compt_megatron.engine.optimizer import build_optimizer

    params = {}
    for name, whole in start().items():
        params[name] = torch.nn.Parameter(cut(name, whole.detach(), rank, world).clone())
        params[name].tensor_model_parallel = marked and name in CUT  # type: ignore[attr-defined]
    optimizer = build_optimizer(params.items(), settings(), decays, tensor_group=dist.group.WORLD)
    for step in range(STEPS):
        for name, param in params.items():
            param.grad = cut(name, gradient(name, step), rank, world).float().contiguous()
        for group in optimizer.param_groups:
            group["lr"] = settings().lr
        optimizer.step()
    return {name: param.detach() for name, param in params.items()}


def test_parts_step_like_the_whole() -> None:
    wanted = references(start())
    for step in range(STEPS):
        for name, reference in wanted.items():
            reference.step(gradient(name, step))
    found = run_ranks(step_parts, 2, True)
    for name, reference in wanted.items():
        parts = [part[name] for part in found]
        whole = torch.cat(parts, CUT[name]) if name in CUT else parts[0]
        assert error(whole, reference.weight) < 2e-6, name
    unmarked = run_ranks(step_parts, 2, False)  # each part by its own norms: what the mark is for
    parts = torch.cat([part["a.weight"] for part in unmarked], 0)
    assert error(parts, wanted["a.weight"].weight) > 1e-3


def test_one_process_is_the_reference() -> None:
    """What the parts are compared with is what one process computes."""
    from compt_megatron.engine.optimizer import build_optimizer

    params = start()
    optimizer, wanted = build_optimizer(params.items(), settings(), decays), references(params)
    for step in range(STEPS):
        take_step(optimizer, params, step)
        for name, reference in wanted.items():
            reference.step(gradient(name, step))
    assert max(error(params[name], reference.weight) for name, reference in wanted.items()) < 2e-6


OPTION: dict[str, Any] = {"name": "lamb", "trust_clamp": 10.0}


def train(rank: int, world: int, folder: str, precision: str) -> tuple[list[float], dict[str, Any], dict[str, Any]]:
    """Losses of STEPS steps and the state after them, undisturbed and from the checkpoint of the second step."""
    from compt_megatron.engine.runtime import Runtime

    runtime, home = Runtime.start(), Path(folder)
    engine = make_engine(runtime, (0, 1), precision, **OPTION)
    engine.load(home / "start")
    losses = []
    for step in range(STEPS):
        if step == 2:
            engine.save(home / f"middle-{precision}-{world}", {"step": 2}, [])
        losses.append(engine.step(rank_batch(step, rank, world)).loss)
    straight = state_of(engine)
    engine.close()
    engine = make_engine(runtime, (0, 1), precision, **OPTION)
    engine.load(home / f"middle-{precision}-{world}")
    for step in range(2, STEPS):
        engine.step(rank_batch(step, rank, world))
    again = state_of(engine)
    engine.close()
    return losses, straight, again


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_engine_trains_with_it_and_goes_on(tmp_path: Path, precision: str) -> None:
    write_start(tmp_path / "start")
    losses, one, again = run_ranks(train, 1, str(tmp_path), precision)[0]
    assert losses[-1] < losses[0]
    assert all(torch.equal(value, again[name]) for name, value in one.items())
    both = run_ranks(train, 2, str(tmp_path), precision)
    assert all(torch.equal(value, both[1][1][name]) for name, value in both[0][1].items())
    assert both[0][0] == pytest.approx(losses, rel=1e-5 if precision == "fp32" else 3e-2)
