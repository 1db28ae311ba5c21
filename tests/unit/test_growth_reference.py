"""Operator `reference` equals the published rule, written out as loops over open_clip state dicts, bit for bit."""

from __future__ import annotations

import pytest
import torch

from compt_megatron.errors import UserError
from compt_megatron.growth.operators import plan
from compt_megatron.spec.random import initial
from tests.unit.growth_helpers import (
    State,
    carried_out,
    clip_config,
    fuse_state,
    make_spec,
    perturbed,
    split_state,
)

BLOCKS = "visual.transformer.resblocks."


def published(teacher: State, student: State, interleave: bool) -> State:
    """The published rule. `student` holds fresh values."""
    student = {key: value.clone() for key, value in student.items()}
    for key, value in teacher.items():
        keys = [key]
        if interleave and key.startswith(BLOCKS):
            layer, rest = key.removeprefix(BLOCKS).split(".", 1)
            keys = [f"{BLOCKS}{2 * int(layer)}.{rest}", f"{BLOCKS}{2 * int(layer) + 1}.{rest}"]
        for to in keys:
            if value.dim() == 0:
                student[to] = value
            elif value.dim() == 1:
                student[to][: value.shape[0]] = value
            elif value.dim() == 2:
                student[to][: value.shape[0], : value.shape[1]] = value
            elif value.dim() == 4:
                student[to][: value.shape[0]] = value
    return student


@pytest.mark.parametrize(
    ("large", "depth"),
    [
        (clip_config(96, 2, 64, 2), None),
        (clip_config(80, 2, 48, 2), None),  # Q rows of the student end inside the teacher's K rows
        (clip_config(160, 4, 112, 2), "interleave"),  # all of the teacher's in-projection lies in the student's Q rows
        (clip_config(64, 4, 48, 4), None),
        (clip_config(48, 4, 32, 4), "interleave"),
        (clip_config(96, 2, 64, 2, joint=40, mlp_ratio=5.0), "interleave"),
    ],
)
def test_bit_equal_to_the_published_rule(large: dict, depth: str | None) -> None:
    small = clip_config()
    source, target = make_spec(small), make_spec(large)
    teacher = {key: value.detach() for key, value in perturbed(small).state_dict().items()}
    fresh = fuse_state(target, {name: initial(param, 9) for name, param in target.params.items()})
    doubled = target.towers["vision"].layers == 2 * source.towers["vision"].layers
    wanted = published(teacher, fresh, interleave=depth == "interleave" and doubled)
    made = plan(source, target, "reference", depth=depth, seed=9)
    found = fuse_state(target, carried_out(made, split_state(source, teacher)))
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert torch.equal(found[key], value), key
    assert not made.exact


def test_what_it_refuses() -> None:
    small = make_spec(clip_config())
    with pytest.raises(UserError, match="doubles the depth"):
        plan(small, make_spec(clip_config(96, 3)), "reference")
    with pytest.raises(UserError, match="only depth 'interleave'"):
        plan(small, make_spec(clip_config(96, 4)), "reference", depth="identity")
    with pytest.raises(UserError, match="one rule for every axis"):
        plan(small, make_spec(clip_config(96)), "reference", axes={"mlp": "append"})
    plain = [clip_config(), clip_config(96)]
    for config in plain:
        del config["text_cfg"]
    with pytest.raises(UserError, match="for CLIP models"):
        plan(make_spec(plain[0]), make_spec(plain[1]), "reference")
