"""A layer scale multiplies, entry by entry, what a block adds: its growth is exact, and open_clip's files keep it."""

from __future__ import annotations

from copy import deepcopy
from math import sqrt
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from compt_megatron.checkpoint.api import check, convert
from compt_megatron.checkpoint.formats import open_reader
from compt_megatron.errors import UserError
from compt_megatron.growth.api import grow, verify
from compt_megatron.growth.operators import plan
from compt_megatron.growth.plan import GrowthPlan
from compt_megatron.torchvision_mend import ensure_torchvision
from tests.unit.checkpoint_samples import refused
from tests.unit.growth_helpers import (
    State,
    carried_out,
    clip_config,
    features,
    grown_model,
    make_spec,
    perturbed,
    relative_error,
    split_state,
)
from tests.unit.lm_helpers import states_carried_out

FP32, FP64 = 1e-5, 1e-12
INIT = 1e-4
BLOCK = "visual.transformer.resblocks.1."
WRITERS = {"attn.out_proj.weight": "ls_1.gamma", "mlp.c_proj.bias": "ls_2.gamma"}


def config(*sizes: int, **more: Any) -> dict[str, Any]:
    """A small CLIP with a layer scale in both towers and without `ln_pre`, so that fp64 shows every error."""
    made = clip_config(*sizes, **{"ls_init_value": INIT, "no_ln_pre": True, **more})
    made["text_cfg"]["ls_init_value"] = INIT
    return made


def trained(small: dict[str, Any], scales: str = "mixed") -> torch.nn.Module:
    """A model in fp64 whose multipliers have both signs, are all alike, or are all 0."""
    model = perturbed(small).double()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith(".gamma"):
                value.copy_({"mixed": torch.randn_like(value), "alike": value * 0 - 0.3, "zero": value * 0}[scales])
    return model


def both(
    small: dict[str, Any], large: dict[str, Any], scales: str = "mixed", **options: Any
) -> tuple[GrowthPlan, State, State, dict[str, float]]:
    """The plan, canonical tensors before and after, and the error of each tower's features."""
    made = plan(make_spec(small, "small"), make_spec(large, "large"), **options)
    model = trained(small, scales)
    grown = grown_model(made, model)
    old, new = features(model), features(grown)
    states = (split_state(spec, each.state_dict()) for spec, each in ((made.source, model), (made.target, grown)))
    return made, *states, {tower: relative_error(new[tower], old[tower]) for tower in old}


@pytest.mark.parametrize("scales", ["mixed", "alike", "zero"])
@pytest.mark.parametrize("sizes", [(64, 2, 48, 3), (80, 3, 32, 2), (96, 4, 64, 4)])
def test_growth_is_exact_at_any_width_and_depth(sizes: tuple[int, ...], scales: str) -> None:
    made, _, _, errors = both(config(), config(*sizes), scales)
    assert made.exact
    assert max(errors.values()) < FP64


def test_growth_is_exact_behind_ln_pre_and_in_fp32() -> None:
    small, large = config(no_ln_pre=False), config(80, 3, 48, 3, no_ln_pre=False)
    model = trained(small).float()
    grown = grown_model(plan(make_spec(small), make_spec(large)), model)
    for tower, value in features(model).items():
        assert relative_error(features(grown)[tower], value) < FP32


@pytest.mark.parametrize("axes", [{"embed": "tile"}, {"embed": "tile", "heads": "tile", "mlp": "tile"}])
def test_tile_is_exact(axes: dict[str, str]) -> None:
    made, old, new, errors = both(config(), config(96, 2, 64, 2), axes=axes)
    assert made.exact
    assert max(errors.values()) < FP64
    assert torch.equal(new[f"{BLOCK}ls_1.gamma"], old[f"{BLOCK}ls_1.gamma"].repeat(2))


def test_new_rows_are_the_weighted_mean_and_new_multipliers_the_level() -> None:
    """gamma' W' has c times the mean of gamma W in its new rows; which of the two has how much of it is the formula."""
    _, old, new, _ = both(config(), config(64, 2, 32, 2))
    c = sqrt(64 / 48)
    for writer, name in WRITERS.items():
        rows, gamma = old[BLOCK + writer], old[BLOCK + name]
        level = gamma.square().mean().sqrt()
        assert torch.allclose(new[BLOCK + name], torch.cat([gamma, level.expand(16)]), rtol=1e-12)
        weights = (gamma / level).reshape(-1, *(1,) * (rows.dim() - 1))
        mean = c * (weights * rows).mean(0, keepdim=True).expand(16, *rows.shape[1:])
        grown = new[BLOCK + writer]
        assert torch.allclose(grown[(slice(48, 64), *(slice(0, size) for size in rows.shape[1:]))], mean, rtol=1e-10)


def test_multipliers_that_are_alike_change_nothing_in_the_rule() -> None:
    """A fresh model's are: the new rows are plain means, as without a layer scale."""
    _, old, new, _ = both(config(), config(64, 2, 32, 2), "alike")
    mean = -sqrt(64 / 48) * old[f"{BLOCK}attn.out_proj.weight"].mean(0)  # the level is positive, they are negative
    assert torch.allclose(new[f"{BLOCK}attn.out_proj.weight"][50, :48], mean, rtol=1e-10)
    assert torch.allclose(new[f"{BLOCK}ls_1.gamma"][48:].abs(), torch.tensor(0.3, dtype=torch.float64))


def test_new_blocks_are_silent_by_their_projections_and_can_learn() -> None:
    """Their multipliers are the source's: with both at 0 no gradient would ever reach either."""
    small, large = config(), config(48, 4, 32, 2)
    made, old, new, _ = both(small, large)
    silent = "visual.transformer.resblocks.3."
    assert not new[f"{silent}attn.out_proj.weight"].any()
    assert not new[f"{silent}mlp.c_proj.bias"].any()
    assert torch.equal(new[f"{silent}ls_2.gamma"], old[f"{BLOCK}ls_2.gamma"])
    model = grown_model(made, trained(small))
    model.visual(torch.randn(2, 3, 32, 32, dtype=torch.float64)).sin().sum().backward()
    assert model.visual.transformer.resblocks[3].attn.out_proj.weight.grad.norm() > 0


def test_the_other_operators() -> None:
    small, large = config(), config(64, 3, 48, 2)
    source, target = make_spec(small), make_spec(large)
    tensors = split_state(source, trained(small).state_dict())
    corner = carried_out(plan(source, target, "corner"), tensors)
    gamma = tensors[f"{BLOCK}ls_1.gamma"]
    name = "visual.transformer.resblocks.2.ls_1.gamma"
    fresh = torch.full((16,), INIT).double()
    assert torch.equal(corner[name], torch.cat([gamma, fresh]))
    reference = carried_out(plan(source, make_spec(config(64, 2, 48, 2)), "reference"), tensors)
    assert torch.equal(reference[f"{BLOCK}ls_1.gamma"], torch.cat([gamma, fresh]))


def test_grown_moments_follow_the_gradient() -> None:
    """Under `tile`, every entry of every tensor, multipliers included."""
    axes = {"embed": "tile", "heads": "tile", "mlp": "tile"}
    small, large = config(), config(96, 2, 64, 2)
    made = plan(make_spec(small), make_spec(large), axes=axes, moments="grow-all")
    model = trained(small)
    found = {}
    for spec, each in (
        (made.source, model),
        (made.target, grown_model(plan(made.source, made.target, axes=axes), model)),
    ):
        generator = torch.Generator().manual_seed(2)
        images = torch.randn(4, 3, 32, 32, generator=generator, dtype=torch.float64)
        each.zero_grad()
        each.visual(images).sin().sum().backward()
        grads = {key: torch.zeros_like(v) if v.grad is None else v.grad for key, v in each.named_parameters()}
        found[spec.name, spec.digest] = split_state(spec, grads)
    source, target = found.values()
    moments = states_carried_out(made, {"exp_avg": source})["exp_avg"]
    largest = max(value.norm() for value in target.values())
    for name, value in target.items():
        assert (moments[name] - value).norm() < 1e-10 * value.norm() + 1e-12 * largest, name
    assert target[f"{BLOCK}ls_2.gamma"].norm() > 0


def test_masters_are_made_from_masters() -> None:
    """Weights and masters differ by rounding; a master's new rows are weighted by the master of the multipliers."""
    made = plan(make_spec(config()), make_spec(config(64, 3, 48, 2)), moments="grow")
    tensors = split_state(made.source, trained(config()).state_dict())
    found = states_carried_out(made, {"master": tensors})["master"]
    wanted = carried_out(plan(made.source, made.target), tensors)
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_models_with_and_without_it_are_not_connected() -> None:
    plain = clip_config(96, 3, 64, 3, no_ln_pre=True)
    with pytest.raises(UserError, match=r"vision tower: the layer scale \(ls_init_value\) differs, True in the source"):
        plan(make_spec(config()), make_spec(plain))
    other = config(96, 3, 64, 3)
    other["vision_cfg"]["ls_init_value"] = 0.5  # what a fresh model begins with does not matter
    assert plan(make_spec(config()), make_spec(other)).exact


def test_files_keep_it_and_open_clip_loads_what_is_grown(tmp_path: Path) -> None:
    ensure_torchvision()
    import open_clip

    small, large = config(), config(64, 3, 48, 3)
    model = trained(small).float()
    spec = make_spec(small)
    torch.save(model.state_dict(), tmp_path / "small.pt")
    convert(tmp_path / "small.pt", tmp_path / "run", "megatron", spec=spec)
    convert(tmp_path / "run", tmp_path / "again", "open_clip")
    check(tmp_path / "again")
    again = load_file(tmp_path / "again" / "open_clip_model.safetensors")
    assert again.keys() == model.state_dict().keys()
    assert all(torch.equal(again[key], value) for key, value in model.state_dict().items())
    grow(tmp_path / "run", tmp_path / "large", to=make_spec(large), format="open_clip")
    assert verify(tmp_path / "large", tmp_path / "run").ok
    loaded = open_clip.create_model(f"local-dir:{tmp_path / 'large'}").eval()
    for tower, value in features(model).items():
        assert relative_error(features(loaded)[tower], value) < FP32


def test_a_config_that_says_otherwise_is_said(tmp_path: Path) -> None:
    torch.save(perturbed(config()).state_dict(), tmp_path / "with.pt")
    plain = clip_config(no_ln_pre=True)
    torch.save(perturbed(plain).state_dict(), tmp_path / "without.pt")
    refused(
        lambda: open_reader(tmp_path / "with.pt", make_spec(plain)),
        "it also has 'visual.transformer.resblocks.0.ls_1.gamma'; name a model config with ls_init_value with --from",
    )
    refused(
        lambda: open_reader(tmp_path / "without.pt", make_spec(config())),
        "it has no 'visual.transformer.resblocks.0.ls_1.gamma'; name a model config without ls_init_value with --from",
    )
    for value in ("1e-4", True, [1e-4]):
        wrong = deepcopy(plain)
        wrong["text_cfg"]["ls_init_value"] = value
        refused(lambda wrong=wrong: make_spec(wrong), "text_cfg: 'ls_init_value' must be a number")
