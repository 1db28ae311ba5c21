"""Units that never separate are found, those that do are not; a warning comes before."""

from __future__ import annotations

from typing import Any

import pytest

from compt_megatron.growth.operators import plan
from compt_megatron.growth.twins import Twins, find_twins
from tests.unit.growth_helpers import MemoryCheckpoint, State, carried_out
from tests.unit.lm_helpers import gpt2, llama, make_spec, perturbed, split_state

HIDDEN = {"heads": "tile", "mlp": "tile"}


def grown(
    small: dict[str, Any], large: dict[str, Any], **options: Any
) -> tuple[list[str], list[Twins], MemoryCheckpoint]:
    """The plan's warnings, the twins in what it makes, and that checkpoint."""
    made = plan(make_spec(small, "small"), make_spec(large, "large"), **options)
    tensors = carried_out(made, split_state(made.source, dict(perturbed(small).state_dict())))
    checkpoint = MemoryCheckpoint(made.target, tensors)
    return made.warnings(), find_twins(checkpoint, made.target), checkpoint


@pytest.mark.parametrize(
    ("small", "large", "heads"),
    [
        (llama(), llama(24, 8, 4, 2, 80, 6), (4, 0)),
        (llama(), llama(24, 8, 2, 2, 80, 6), (2, 0)),  # copies inside their group
        (gpt2(), gpt2(24, 4, 2, 192), None),
    ],
)
def test_tiling_without_noise_makes_twins(
    small: dict[str, Any], large: dict[str, Any], heads: tuple[int, int] | None
) -> None:
    warnings, twins, _ = grown(small, large, axes=HIDDEN)
    assert "never separate" in warnings[0]
    units = [each for each in twins if each.unit == "MLP unit"]
    assert [each.layer for each in units] == [0, 1]
    old = make_spec(small).towers["text"].mlp
    assert units[0].pairs == [(old + unit, unit) for unit in range(old)]
    assert "identical to an earlier one (first: " in str(units[0])
    assert [each.pairs[0] for each in twins if each.unit == "head"] == [heads] * 2 * bool(heads)


@pytest.mark.parametrize(
    ("large", "options"),
    [
        (llama(24, 8, 4, 2, 80, 6), {"axes": HIDDEN, "noise": 0.01}),
        (llama(24, 8, 4, 2, 80, 6), {}),  # appended
        (llama(48, 8, 4, 2, 80, 6), {"axes": HIDDEN}),  # padded: each copy reads new entries through columns of its own
        (llama(layers=4), {"axes": HIDDEN}),  # nothing was tiled
    ],
)
def test_other_growth_makes_none(large: dict[str, Any], options: dict[str, Any]) -> None:
    warnings, twins, _ = grown(llama(), large, **options)
    assert (warnings, twins) == ([], [])


def test_one_copied_unit_is_found_and_its_moments_part_it() -> None:
    _, _, checkpoint = grown(llama(), llama(24, 4, 2, 2, 60, 6))
    assert checkpoint.spec is not None
    prefix, values = "weight/model.layers.1.mlp.", checkpoint.values
    for name in ("gate_proj", "up_proj"):
        values[f"{prefix}{name}.weight"][7] = values[f"{prefix}{name}.weight"][3]
    assert find_twins(checkpoint, checkpoint.spec) == []  # their outputs still differ
    values[f"{prefix}down_proj.weight"][:, 7] = values[f"{prefix}down_proj.weight"][:, 3]
    (found,) = find_twins(checkpoint, checkpoint.spec)
    assert (found.layer, found.unit, found.pairs) == (1, "MLP unit", [(7, 3)])
    moments: State = {name.replace("weight/", "exp_avg/"): value.clone() for name, value in values.items()}
    moments["exp_avg/model.layers.1.mlp.up_proj.weight"][7] += 1
    values.update(moments)
    assert find_twins(checkpoint, checkpoint.spec) == []
