"""Grown optimizer state follows the gradient: checked against autograd, and by one step of AdamW."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compt_megatron.checkpoint.contract import TensorInfo
from compt_megatron.errors import UserError
from compt_megatron.growth.moments import step_factors, with_source_states
from compt_megatron.growth.operators import plan
from compt_megatron.growth.plan import Copy, GrowthPlan
from tests.unit.growth_helpers import State
from tests.unit.lm_helpers import (
    fuse_state,
    gpt2,
    grown_model,
    llama,
    load,
    logits,
    make_spec,
    perturbed,
    probe,
    relative_error,
    split_state,
    states_carried_out,
)

TILE = {"embed": "tile", "heads": "tile", "mlp": "tile"}
PAIRS = {
    "llama": (llama(), llama(48, 8, 4, 2, 80, 6)),
    "llama tied, heads in their groups": (
        llama(tie_word_embeddings=True),
        llama(72, 12, 2, 2, 120, 6, tie_word_embeddings=True),
    ),
    "gpt2": (gpt2(), gpt2(48, 8, 2, 192)),
    "gpt2 untied": (gpt2(tie_word_embeddings=False), gpt2(48, 8, 2, 192, tie_word_embeddings=False)),
}


def gradients(model: Any, spec: Any) -> State:
    """Canonical gradients of a cross-entropy on the probe batch."""
    model.zero_grad()
    ids = probe()
    found = model(ids).logits[:, :-1]
    torch.nn.functional.cross_entropy(found.reshape(-1, found.shape[-1]), ids[:, 1:].reshape(-1)).backward()
    return split_state(spec, {name: value.grad for name, value in model.named_parameters()})


def made(small: dict[str, Any], large: dict[str, Any], **options: Any) -> tuple[GrowthPlan, Any, Any]:
    """The plan, the source model and the grown one, in fp64."""
    growth = plan(make_spec(small, "small"), make_spec(large, "large"), **options)
    model = perturbed(small, double=True)
    return growth, model, grown_model(growth, model)


def old_entries(growth: GrowthPlan, name: str) -> torch.Tensor:
    """Where a target tensor holds entries of the source."""
    mask = torch.zeros(growth.target.params[name].shape, dtype=torch.bool)
    for part in growth.tensors[name].parts:
        if isinstance(part.piece, Copy):
            mask[tuple(slice(low, high) for low, high in part.box)] = True
    return mask


@pytest.mark.parametrize("pair", PAIRS)
def test_tile_splits_the_gradient_as_autograd_does(pair: str) -> None:
    """Every entry, copies included: exp_avg of a constant gradient is the gradient."""
    growth, model, grown = made(*PAIRS[pair], axes=TILE, moments="grow-all")
    wanted = gradients(grown, growth.target)
    found = states_carried_out(growth, {"exp_avg": gradients(model, growth.source)})["exp_avg"]
    for name, value in wanted.items():
        assert relative_error(found[name], value) < 1e-10 or value.norm() < 1e-14, name  # keys' biases have none


@pytest.mark.parametrize(
    ("small", "large"),
    [
        (llama(), llama(36, 9, 3, 2, 60, 6)),
        (llama(tie_word_embeddings=True), llama(36, 4, 2, 2, 60, 12, tie_word_embeddings=True)),
        (llama(), llama(24, 6, 2, 4, 50, 6)),
        (gpt2(), gpt2(24, 4, 4, 150)),
    ],
)
def test_old_entries_keep_their_gradient(small: dict[str, Any], large: dict[str, Any]) -> None:
    """zero_pad, append, head size and identity depth: the map is the gradient's own on the source's entries."""
    growth, model, grown = made(small, large, moments="grow")
    wanted = gradients(grown, growth.target)
    found = states_carried_out(growth, {"exp_avg": gradients(model, growth.source)})["exp_avg"]
    for name, value in wanted.items():
        parts = growth.states["exp_avg"][name].parts
        if any(isinstance(part.piece, Copy) for part in parts):
            mask = old_entries(growth, name)
            assert relative_error(found[name][mask], value[mask]) < 1e-9, name


def adamw(params: State, grads: State, factors: dict[str, tuple[float, float]]) -> State:
    """One step of torch's AdamW on canonical tensors that already have moments of earlier steps."""
    groups = []
    for name, value in params.items():
        rate, decay = factors.get(name, (1.0, 1.0))
        groups.append({"params": [value], "lr": 1e-2 * rate, "weight_decay": 0.1 * decay})
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-30)
    for name, value in params.items():
        value.grad = grads[name]
        optimizer.state[value] = {
            "step": torch.tensor(7.0),
            "exp_avg": grads[f"exp_avg/{name}"],
            "exp_avg_sq": grads[f"exp_avg_sq/{name}"],
        }
    optimizer.step()
    return params


@pytest.mark.parametrize("pair", PAIRS)
def test_one_adamw_step_of_the_tiled_model_is_the_sources(pair: str) -> None:
    """With the factors on rate and decay, the grown model after a step computes what the source computes after its
    own; without them it does not."""
    growth, model, grown = made(*PAIRS[pair], axes=TILE, moments="grow-all")
    small, large = growth.source, growth.target
    generator = torch.Generator().manual_seed(5)

    def noise(value: torch.Tensor) -> torch.Tensor:
        return torch.randn(value.shape, generator=generator, dtype=value.dtype)

    source = {name: value.clone() for name, value in split_state(small, dict(model.state_dict())).items()}
    first = {name: 0.01 * noise(value) for name, value in source.items()}
    second = {name: 1e-4 * noise(value).square() for name, value in source.items()}
    states = states_carried_out(growth, {"exp_avg": first, "exp_avg_sq": second})
    target = {name: value.clone() for name, value in split_state(large, dict(grown.state_dict())).items()}
    mine, theirs = gradients(grown, large), gradients(model, small)
    for prefix in ("exp_avg", "exp_avg_sq"):
        mine |= {f"{prefix}/{name}": value.clone() for name, value in states[prefix].items()}
    theirs |= {f"exp_avg/{name}": value.clone() for name, value in first.items()}
    theirs |= {f"exp_avg_sq/{name}": value.clone() for name, value in second.items()}
    plain = {name: value.clone() for name, value in target.items()}
    unscaled = {name: value.clone() for name, value in mine.items()}
    load(model, small, adamw(source, theirs, {}))
    load(grown, large, adamw(target, mine, step_factors(growth)))
    assert relative_error(logits(grown), logits(model)) < 1e-9
    load(grown, large, adamw(plain, unscaled, {}))
    assert relative_error(logits(grown), logits(model)) > 1e-3


def test_new_entries_and_later_copies() -> None:
    """New entries: first moment 0, second the mean of the old ones. Later copies: first moment 0, second their own."""
    growth, model, _ = made(llama(), llama(36, 9, 3, 4, 80, 6), axes={"mlp": "tile"}, moments="grow")
    source = split_state(growth.source, dict(model.state_dict()))
    squares = {name: value.square() for name, value in source.items()}
    states = states_carried_out(growth, {"exp_avg": source, "exp_avg_sq": squares})
    name = "model.layers.0.mlp.down_proj.weight"  # rows: embed 24 -> 36, columns: mlp tiled
    old = squares[name]
    assert (states["exp_avg"][name][:24, :40] != 0).all()
    assert (states["exp_avg"][name][:, 40:] == 0).all()  # later copies
    assert (states["exp_avg"][name][24:] == 0).all()  # new rows
    slope = (36 / 24) ** -0.5
    assert torch.allclose(states["exp_avg_sq"][name][:24, 40:], slope**2 * old, rtol=1e-12)
    assert torch.allclose(states["exp_avg_sq"][name][24:, :40], old.mean(0, keepdim=True).expand(12, 40), rtol=1e-12)
    both = states["exp_avg_sq"]["model.layers.0.self_attn.q_proj.weight"][36:, 24:]  # new heads, new columns
    mean = squares["model.layers.0.self_attn.q_proj.weight"].mean()
    assert torch.allclose(both, mean.expand_as(both), rtol=1e-12)
    for part in ("o_proj", "q_proj"):  # a silent block: the later use of its source
        assert (states["exp_avg"][f"model.layers.1.self_attn.{part}.weight"] == 0).all()
        assert (states["exp_avg_sq"][f"model.layers.1.self_attn.{part}.weight"] > 0).all()


def test_master_and_step_follow() -> None:
    growth, model, grown = made(llama(), llama(36, 9, 3, 3, 60, 6), moments="grow")
    source = split_state(growth.source, dict(model.state_dict()))
    steps = {name: torch.tensor(float(index)) for index, name in enumerate(source)}
    states = states_carried_out(growth, {"master": source, "step": steps})
    wanted = split_state(growth.target, dict(grown.state_dict()))
    assert all(torch.equal(states["master"][name], value) for name, value in wanted.items())
    name = "model.layers.2.mlp.up_proj.weight"  # 2 -> 3 layers: made from layer 1
    assert states["step"][name] == steps[name.replace("layers.2", "layers.1")]


def test_one_count_for_all_parameters_is_taken_for_each() -> None:
    """As the first version's run checkpoints have it."""
    growth, _, _ = made(llama(), llama(48, 8, 4, 2, 80, 6), moments="grow")
    held = {f"{p}/{n}": TensorInfo(param.shape, torch.float32) for n, param in growth.source.params.items()
            for p in ("weight", "exp_avg", "exp_avg_sq")} | {"step/optimizer": TensorInfo((), torch.int64)}  # fmt: skip
    grown = with_source_states(growth, held)
    assert grown.states["step"].keys() == growth.target.params.keys()
    assert {source for tensor in grown.states["step"].values() for source in tensor.sources()} == {"optimizer"}


def test_a_source_without_moments() -> None:
    growth, _, _ = made(llama(), llama(48, 8, 4, 2, 80, 6), moments="grow")
    names = {f"weight/{name}": TensorInfo(param.shape, torch.float32) for name, param in growth.source.params.items()}
    with pytest.raises(UserError, match="holds no optimizer moments"):
        with_source_states(growth, names)
    moments = {f"{p}/{n}": i for p in ("exp_avg", "exp_avg_sq") for n, i in ((k[7:], v) for k, v in names.items())}
    assert set(with_source_states(growth, names | moments).states) == {"exp_avg", "exp_avg_sq"}
    moments.pop("exp_avg/model.norm.weight")
    with pytest.raises(UserError, match=r"no exp_avg of model\.norm\.weight"):
        with_source_states(growth, names | moments)


def test_fuse_is_the_inverse_of_split() -> None:
    """The helpers themselves: a test that mixes up q, k and v proves nothing."""
    model = perturbed(gpt2())
    spec = make_spec(gpt2())
    state = {
        name: value
        for name, value in model.state_dict().items()
        if name in fuse_state(spec, split_state(spec, dict(model.state_dict())))
    }
    again = fuse_state(spec, split_state(spec, dict(model.state_dict())))
    assert all(torch.equal(again[name], value) for name, value in state.items())
    assert len(again) == len(state) == len(dict(model.named_parameters()))
