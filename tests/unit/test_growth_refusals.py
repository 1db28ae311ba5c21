"""Models that no growth connects are refused in one line that names the field."""

from __future__ import annotations

from typing import Any

import pytest

from compt_megatron.errors import UserError
from compt_megatron.growth.operators import OPERATORS, plan
from tests.unit.growth_helpers import clip_config, make_spec


def changed(**fields: Any) -> dict[str, Any]:
    """A larger config with one field different; `vision__x` and `text__x` reach into the towers."""
    config = clip_config(96, 3, 64, 3)
    for name, value in fields.items():
        tower, _, field = name.rpartition("__")
        (config[f"{tower}_cfg"] if tower else config)[field] = value
    return config


@pytest.mark.parametrize(
    ("large", "match"),
    [
        (changed(vision__patch_size=16), "patch size differs"),
        (changed(vision__image_size=64), "image size differs"),
        (changed(text__vocab_size=61), "vocabulary size differs"),
        (changed(text__context_length=10), "context length differs"),
        (changed(quick_gelu=True), "activation differs"),
        (changed(vision__norm_kwargs={"eps": 1e-6}), "norm eps differs"),
        (changed(vision__pool_type="avg"), "pooling differs"),
        (changed(text__pool_type="last"), "pooling differs"),
        (changed(vision__no_ln_pre=True), "norm before the first block"),
        (changed(vision__final_ln_after_pool=True), "place of the final norm"),
        (changed(text__no_causal_mask=True), "attention mask differs"),
        (changed(text__ls_init_value=0.1), r"layer scale \(ls_init_value\) differs"),
        (changed(vision__width=32), "width would shrink from 48 to 32"),
        (changed(vision__layers=1), "number of layers would shrink from 2 to 1"),
        (changed(vision__head_width=96), "number of heads would shrink from 3 to 1"),
        (changed(vision__head_width=8), "head size would shrink"),
        (changed(vision__mlp_ratio=1.0), "MLP size would shrink from 192 to 96"),
        (changed(embed_dim=16), "joint embedding would shrink"),
        (changed(init_logit_bias=-10.0), "init_logit_bias"),
        (changed(text_cfg=None), "a clip model is not a vit model"),
    ],
)
def test_every_operator_refuses(large: dict[str, Any], match: str) -> None:
    for operator in OPERATORS:
        with pytest.raises(UserError, match=match) as error:
            plan(make_spec(clip_config(), "small"), make_spec(large, "large"), operator)
        assert "\n" not in str(error.value)
        assert "large" in str(error.value)


def test_classes_of_a_plain_vit_stay() -> None:
    small, large = clip_config(joint=10), clip_config(96, joint=20)
    del small["text_cfg"], large["text_cfg"]
    with pytest.raises(UserError, match="10 classes in the source and 20"):
        plan(make_spec(small), make_spec(large))


def test_one_new_entry_and_ln_pre() -> None:
    small, large = clip_config(16, head=16), clip_config(17, head=17)
    with pytest.raises(UserError, match="wider by two or more"):
        plan(make_spec(small), make_spec(large))


def test_unknown_names() -> None:
    small, large = make_spec(clip_config()), make_spec(clip_config(96))
    for options, match in (
        ({"operator": "best"}, "exact, corner, reference"),
        ({"axes": {"width": "tile"}}, "no axis is called 'width'"),
        ({"axes": {"audio.embed": "tile"}}, "no axis is called"),
        ({"axes": {"embed": "append"}}, "choose one of identity, mean_pad, zero_pad, tile, corner"),
        ({"axes": {"embed": "identity"}}, "needs equal sizes"),
        ({"depth": "double"}, "depth mode 'double' is not known"),
    ):
        with pytest.raises(UserError, match=match):
            plan(small, large, **options)
