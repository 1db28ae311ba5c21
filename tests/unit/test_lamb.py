"""LAMB against the paper's formula written out in fp64, and the state that it shares with AdamW."""

from __future__ import annotations

import pytest
import torch

from compt_megatron.engine.lamb import Lamb
from compt_megatron.engine.optimizer import LinkOptimizer, build_optimizer
from tests.unit.lamb_reference import RATE, SHAPES, decays, error, gradient, references, settings, start, take_step

STEPS = 5


def lamb(params: dict[str, torch.nn.Parameter], **changed: float | None) -> LinkOptimizer:
    optimizer = build_optimizer(params.items(), settings(**changed), decays)
    assert isinstance(optimizer, Lamb)
    return optimizer


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
@pytest.mark.parametrize("clamp", [None, 0.5])
def test_it_is_the_papers(dtype: torch.dtype, tolerance: float, clamp: float | None) -> None:
    params = start(dtype)
    optimizer, wanted = lamb(params, trust_clamp=clamp), references(params, clamp=clamp)
    for step in range(STEPS):
        take_step(optimizer, params, step)
        for name, reference in wanted.items():
            reference.step(gradient(name, step))
            assert error(params[name], reference.weight) < tolerance, (step, name)
            for key, moment in (("exp_avg", reference.first), ("exp_avg_sq", reference.second)):
                assert error(optimizer.state[params[name]][key], moment) < tolerance, (step, name, key)
    ratios = wanted["a.weight"].ratios
    assert clamp is None or max(ratios) == clamp
    assert len({round(ratio, 3) for ratio in ratios}) > 1 or clamp is not None  # ratios that are all 1 prove nothing
    assert set(wanted["a.bias"].ratios) == {1.0}


def test_where_a_norm_is_zero_the_ratio_is_one() -> None:
    params = start(torch.float64)
    with torch.no_grad():
        params["a.weight"].zero_()
    optimizer, wanted = lamb(params), references(params)
    take_step(optimizer, params, 0)
    wanted["a.weight"].step(gradient("a.weight", 0))
    assert error(params["a.weight"], wanted["a.weight"].weight) < 1e-13
    still = start(torch.float64)
    before = still["b.weight"].detach().clone()
    optimizer = lamb(still, weight_decay=0.0)
    still["b.weight"].grad = torch.zeros_like(still["b.weight"])
    optimizer.step()
    assert torch.equal(still["b.weight"], before)


def test_matrices_keep_their_ratio_without_weight_decay() -> None:
    params = start(torch.float64)
    optimizer, wanted = lamb(params, weight_decay=0.0), references(params, decay=0.0)
    take_step(optimizer, params, 2)
    for name, reference in wanted.items():
        reference.step(gradient(name, 2))
        assert error(params[name], reference.weight) < 1e-13, name


def test_a_refused_step_changes_nothing() -> None:
    params = start()
    optimizer = lamb(params)
    take_step(optimizer, params, 0)
    before = [value.clone() for value in everything(optimizer, params)]
    optimizer.refuse = True
    take_step(optimizer, params, 1)
    assert all(torch.equal(*pair) for pair in zip(everything(optimizer, params), before))
    optimizer.refuse = False
    take_step(optimizer, params, 1)
    assert not any(torch.equal(*pair) for pair in zip(everything(optimizer, params), before))


def everything(optimizer: LinkOptimizer, params: dict[str, torch.nn.Parameter]) -> list[torch.Tensor]:
    """Weights, moments and counts."""
    states = [optimizer.state[param] for param in params.values()]
    return [*(param.detach() for param in params.values()), *(value for state in states for value in state.values())]


def test_its_state_is_adams_with_a_count_for_each_parameter() -> None:
    """A checkpoint does not tell which of the two wrote it; counts may differ, as in a grown one."""
    params, adams = start(), start()
    optimizer = lamb(params)
    adam = build_optimizer(adams.items(), settings(name="adamw"), decays)
    take_step(optimizer, params, 0)
    take_step(adam, adams, 0)
    for name in SHAPES:
        state, other = optimizer.state[params[name]], adam.state[adams[name]]
        assert state.keys() == other.keys()
        for key, value in state.items():
            assert (value.shape, value.dtype) == (other[key].shape, other[key].dtype), key
            assert torch.allclose(value, other[key]), key
    assert len({state["step"].data_ptr() for state in optimizer.state.values()}) == len(SHAPES)
    wanted = references(params)
    for name, reference in wanted.items():
        state = optimizer.state[params[name]]
        reference.first, reference.second = state["exp_avg"].double(), state["exp_avg_sq"].double()
        reference.count = 7 if name == "b.weight" else 1
        state["step"].fill_(reference.count)
        reference.step(gradient(name, 1))
    take_step(optimizer, params, 1)
    assert {name: int(optimizer.state[param]["step"]) for name, param in params.items()} == {
        name: reference.count for name, reference in wanted.items()
    }
    assert max(error(params[name], reference.weight) for name, reference in wanted.items()) < 2e-6


def test_parameters_without_gradient_wait() -> None:
    params = start()
    optimizer = lamb(params)
    before = params["b.weight"].detach().clone()
    for name, param in params.items():
        param.grad = None if name == "b.weight" else gradient(name, 0).float()
    optimizer.step()
    assert torch.equal(params["b.weight"], before)
    assert params["b.weight"] not in optimizer.state
    take_step(optimizer, params, 1, RATE)
    assert [int(optimizer.state[param]["step"]) for param in params.values()] == [2, 1, 2, 2, 2]
