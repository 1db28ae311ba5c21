"""Which optimizer a link gets: its groups and their factors, and whose kernels do the work."""

from __future__ import annotations

import math
import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from compt_megatron.engine.apex_optimizer import ApexOptimizer, have_apex
from compt_megatron.engine.optimizer import GuardedAdamW, build_optimizer, parameter_groups, uses_apex
from compt_megatron.errors import UserError
from compt_megatron.growth.moments import step_factors
from tests.unit.growth_helpers import State
from tests.unit.lamb_reference import DECAY, decays, error, gradient, references, settings, start, take_step
from tests.unit.lm_helpers import load, logits, relative_error, split_state, states_carried_out
from tests.unit.test_growth_moments import PAIRS, TILE, gradients, made

# -- factors ---------------------------------------------------------------------------------------------------------


def one_step(spec: Any, params: State, grads: State, name: str, factors: dict[str, tuple[float, float]]) -> State:
    """One step on canonical tensors that already have moments of earlier steps, in fp64."""
    named = {key: torch.nn.Parameter(value) for key, value in params.items()}
    optimizer = build_optimizer(
        named.items(),
        settings(name=name, eps=1e-30),
        lambda key: spec.params[key].decays,
        lambda key: factors.get(key, (1.0, 1.0)),
    )
    for group in optimizer.param_groups:
        group["lr"] = 1e-2 * group["lr_scale"]
    for key, param in named.items():
        param.grad = grads[key]
        moments = {prefix: grads[f"{prefix}/{key}"].clone() for prefix in ("exp_avg", "exp_avg_sq")}
        optimizer.state[param] = {"step": torch.tensor(7.0), **moments}
    optimizer.step()
    return {key: param.detach() for key, param in named.items()}


@pytest.mark.parametrize("pair", ["llama tied, heads in their groups", "gpt2 untied"])
@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_a_step_of_a_tiled_model_is_the_sources(name: str, pair: str) -> None:
    """With the factors that growth returns, the grown model after a step computes what the source computes after its
    own; without them it does not. Under LAMB the trust ratio takes the place of the matrices' factor on the rate."""
    growth, model, grown = made(*PAIRS[pair], axes=TILE, moments="grow-all")
    small, large = growth.source, growth.target
    generator = torch.Generator().manual_seed(5)
    source = split_state(small, {key: value.clone() for key, value in model.state_dict().items()})
    target = split_state(large, {key: value.clone() for key, value in grown.state_dict().items()})

    def noise(value: torch.Tensor) -> torch.Tensor:
        return torch.randn(value.shape, generator=generator, dtype=value.dtype)

    states = {
        "exp_avg": {key: 0.01 * noise(value) for key, value in source.items()},
        "exp_avg_sq": {key: 1e-4 * noise(value).square() for key, value in source.items()},
    }
    carried = states_carried_out(growth, states)
    theirs, mine = gradients(model, small), gradients(grown, large)
    for prefix, values in states.items():
        theirs |= {f"{prefix}/{key}": value for key, value in values.items()}
        mine |= {f"{prefix}/{key}": value for key, value in carried[prefix].items()}

    def after(factors: dict[str, tuple[float, float]]) -> torch.Tensor:
        start = {key: value.clone() for key, value in target.items()}
        load(grown, large, one_step(large, start, mine, name, factors))
        return logits(grown)

    load(model, small, one_step(small, {key: value.clone() for key, value in source.items()}, theirs, name, {}))
    assert relative_error(after(step_factors(growth)), logits(model)) < 1e-9
    assert relative_error(after({}), logits(model)) > 1e-5


def test_groups_are_by_decay_and_factors() -> None:
    factors = {"b.weight": (0.5, 2.0), "scale": (0.25, 4.0)}
    params = start()

    def groups(name: str) -> list[tuple[list[str], float, float]]:
        names = {id(param): key for key, param in params.items()}
        return [
            ([names[id(param)] for param in group["params"]], group["lr_scale"], group["weight_decay"])
            for group in parameter_groups(
                params.items(), settings(name=name), decays, lambda key: factors.get(key, (1.0, 1.0))
            )
        ]

    assert groups("adamw") == [
        (["a.weight", "c.weight"], 1.0, DECAY),
        (["b.weight"], 0.5, 2 * DECAY),
        (["a.bias"], 1.0, 0.0),
        (["scale"], 0.25, 0.0),
    ]
    assert groups("lamb")[1] == (["b.weight"], 1.0, 2 * DECAY)
    plain = parameter_groups(params.items(), settings(), decays)
    assert [(len(group["params"]), group["lr_scale"]) for group in plain] == [(3, 1.0), (2, 1.0)]


# -- whose kernels ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(have_apex(), reason="says what happens without apex; this machine has it")
def test_without_apex() -> None:
    for name in ("adamw", "lamb"):
        assert not uses_apex(settings(name=name), {"cuda"}, tensor_parallel=False)
        with pytest.raises(UserError, match=r"optimizer\.implementation: 'apex' needs NVIDIA apex .* use auto"):
            build_optimizer(start().items(), settings(name=name, implementation="apex"), decays)
    adam = build_optimizer(start().items(), settings(name="adamw"), decays)
    assert isinstance(adam, GuardedAdamW)
    assert adam.param_groups[0]["fused"]
    assert (adam.implementation, build_optimizer(start().items(), settings(), decays).implementation) == (
        "AdamW in torch, fused",
        "LAMB in torch",
    )


class _Counting(torch.optim.Optimizer):
    """How apex's classes count and keep state (apex/optimizers/fused_adam.py, fused_lamb.py): the step by group, two
    moments with each parameter, nothing else."""

    def __init__(self, params: Any, max_grad_norm: float = 1.0) -> None:
        super().__init__(params, {"lr": 1e-3})
        self.limit, self.use_nvlamb = max_grad_norm, False

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        every = [param.grad for group in self.param_groups for param in group["params"] if param.grad is not None]
        clip = max(1.0, float(torch.linalg.vector_norm(torch.cat([g.flatten() for g in every]))) / self.limit)
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            assert group["bias_correction"]
            for param in group["params"]:
                state = self.state[param]
                if len(state) == 0:
                    state.update(exp_avg=torch.zeros_like(param), exp_avg_sq=torch.zeros_like(param))
                beta1, beta2 = group["betas"]
                gradient = param.grad / clip
                first = state["exp_avg"].mul_(beta1).add_(gradient, alpha=1 - beta1) / (1 - beta1 ** group["step"])
                second = state["exp_avg_sq"].mul_(beta2).add_(gradient * gradient, alpha=1 - beta2)
                update = first / ((second / (1 - beta2 ** group["step"])).sqrt() + group["eps"])
                update += group["weight_decay"] * param
                param.sub_(group["lr"] * self.ratio(group, param, update) * update)

    def ratio(self, group: dict[str, Any], param: torch.Tensor, update: torch.Tensor) -> float:
        return 1.0


class FusedAdam(_Counting):
    def __init__(self, params: Any, adam_w_mode: bool = False) -> None:
        super().__init__(params, math.inf)
        assert adam_w_mode


class FusedLAMB(_Counting):
    def ratio(self, group: dict[str, Any], param: torch.Tensor, update: torch.Tensor) -> float:
        if not (self.use_nvlamb or group["weight_decay"]):
            return 1.0
        sizes = float(param.norm()), float(update.norm())
        return sizes[0] / sizes[1] if min(sizes) > 0 else 1.0


@pytest.fixture
def apex(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels run on CUDA only; this stands in for the classes around them, so that what is given to them and
    what they leave behind can be seen. tests/gpu has the real ones."""
    optimizers = ModuleType("apex.optimizers")
    optimizers.FusedAdam, optimizers.FusedLAMB = FusedAdam, FusedLAMB  # type: ignore[attr-defined]
    for name, module in (("amp_C", ModuleType("amp_C")), ("apex", ModuleType("apex")), ("apex.optimizers", optimizers)):
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.usefixtures("apex")
def test_with_apex_on_cuda() -> None:
    def uses(tensor_parallel: bool = False, device: str = "cuda", **changed: Any) -> bool:
        return uses_apex(settings(**changed), {device}, tensor_parallel)

    assert uses()
    assert not uses(implementation="torch")
    assert not uses(device="cpu")
    assert not uses(tensor_parallel=True)
    assert not uses(trust_clamp=10.0)
    assert not uses(name="adamw")
    assert uses(name="adamw", implementation="apex")
    assert uses(name="adamw", implementation="apex", tensor_parallel=True)
    with pytest.raises(UserError, match=r"optimizer\.implementation: apex's LAMB has no tensor parallelism"):
        uses(implementation="apex", tensor_parallel=True)
    with pytest.raises(UserError, match=r"optimizer\.implementation: 'apex' needs a CUDA device"):
        uses(implementation="apex", device="cpu")


@pytest.mark.usefixtures("apex")
@pytest.mark.parametrize("decay", [DECAY, 0.0])
@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_apex_is_given_what_it_needs(name: str, decay: float) -> None:
    """No clipping, the ratio by name and not by decay, and a count for each parameter that comes from its own state."""
    params = start(torch.float64)
    chosen = settings(name=name, weight_decay=decay)
    groups = parameter_groups(params.items(), chosen, decays)
    optimizer = ApexOptimizer(groups, name, (0.9, 0.98), chosen.eps)
    assert optimizer.implementation == ("apex's FusedAdam" if name == "adamw" else "apex's FusedLAMB")
    wanted = references(params, decay=decay)
    for reference in wanted.values():
        reference.trust = reference.trust and name == "lamb"
    for step in range(5):
        if step == 3:  # as after loading a grown checkpoint
            optimizer.state[params["b.weight"]]["step"].fill_(8)
            wanted["b.weight"].count = 8
        take_step(optimizer, params, step)
        for key, reference in wanted.items():
            reference.step(gradient(key, step))
            assert error(params[key], reference.weight) < 1e-12, (step, key)
            assert error(optimizer.state[params[key]]["exp_avg"], reference.first) < 1e-12, (step, key)
    assert {key: int(optimizer.state[param]["step"]) for key, param in params.items()} == {
        key: reference.count for key, reference in wanted.items()
    }
    before = params["a.weight"].detach().clone()
    optimizer.refuse = True
    take_step(optimizer, params, 0)
    assert torch.equal(params["a.weight"], before)
