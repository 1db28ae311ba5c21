"""Exact growth of Llama- and GPT-2-type models keeps transformers' logits, for random shapes, modes and options."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from compt_megatron.errors import UserError
from compt_megatron.growth.operators import plan
from tests.unit.lm_helpers import gpt2, grown_model, llama, logits, make_spec, perturbed, relative_error

FP32, FP64 = 5e-5, 1e-12  # fp32: the models' own noise is 1e-5

quick = settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def error(small: dict[str, Any], large: dict[str, Any], double: bool = True, **options: Any) -> float:
    model = perturbed(small, double=double)
    grown = grown_model(plan(make_spec(small, "small"), make_spec(large, "large"), **options), model)
    return relative_error(logits(grown), logits(model))


@quick
@given(
    width=st.sampled_from([24, 28, 32, 44, 48, 72]),
    heads=st.sampled_from(
        [(4, 2, 4, 2), (4, 2, 8, 2), (4, 2, 8, 4), (4, 2, 9, 3), (4, 1, 4, 4), (4, 1, 8, 4), (4, 4, 6, 6)]
    ),
    mlp=st.integers(40, 90),
    layers=st.integers(2, 5),
    head=st.sampled_from([6, 12, 18]),
    tied=st.booleans(),
    biases=st.booleans(),
)
def test_llama_any_size(
    width: int, heads: tuple[int, int, int, int], mlp: int, layers: int, head: int, tied: bool, biases: bool
) -> None:
    """One axis or all: width, heads, query groups, head size (whole ratios), MLP, depth."""
    assume(width % heads[2] == 0)
    more = {"tie_word_embeddings": tied, "attention_bias": biases, "mlp_bias": biases}
    small = llama(24, heads[0], heads[1], head=6, **more)
    large = llama(width, heads[2], heads[3], layers, mlp, head, **more)
    assert error(small, large) < FP64
    assert error(small, large, double=False) < FP32


@quick
@given(
    size=st.sampled_from([(24, 4), (32, 4), (36, 6), (40, 4), (48, 8), (60, 6)]),
    mlp=st.integers(96, 200),
    layers=st.integers(2, 5),
    tied=st.booleans(),
)
def test_gpt2_any_size(size: tuple[int, int], mlp: int, layers: int, tied: bool) -> None:
    small = gpt2(tie_word_embeddings=tied)
    large = gpt2(*size, layers, mlp, tie_word_embeddings=tied)
    assert error(small, large) < FP64
    assert error(small, large, double=False) < FP32


TILE = {"embed": "tile", "heads": "tile", "mlp": "tile"}


@pytest.mark.parametrize("noise", [0.0, 0.5])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("times", "heads", "groups"), [(2, 8, 4), (2, 8, 2), (3, 12, 6), (2, 8, 8)])
def test_tiled_llama(times: int, heads: int, groups: int, tied: bool, noise: float) -> None:
    """Copies of everything, parted or not, inside their groups or with them."""
    small = llama(tie_word_embeddings=tied)
    large = llama(24 * times, heads, groups, 2, 40 * times, 6, tie_word_embeddings=tied)
    assert error(small, large, axes=TILE, noise=noise) < FP64
    assert error(small, large, double=False, axes=TILE, noise=noise) < FP32


@pytest.mark.parametrize("noise", [0.0, 0.5])
@pytest.mark.parametrize("tied", [False, True])
def test_tiled_gpt2(tied: bool, noise: float) -> None:
    small, large = gpt2(tie_word_embeddings=tied), gpt2(72, 12, 4, 288, tie_word_embeddings=tied)
    assert error(small, large, axes=TILE, noise=noise) < FP64


@pytest.mark.parametrize("axis", ["embed", "heads", "mlp"])
def test_one_axis_by_another_mode(axis: str) -> None:
    """--set one axis: the others keep the operator's own mode."""
    assert error(llama(), llama(48, 8, 4, 3, 80, 6), axes={axis: "tile"}, noise=0.1) < FP64
    assert error(gpt2(), gpt2(48, 8, 3, 192), axes={axis: "tile"}, noise=0.1) < FP64


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        | {"original_max_position_embeddings": 16},
    ],
)
def test_rotary_scalings(scaling: dict[str, Any]) -> None:
    small, large = llama(rope_scaling=scaling), llama(32, 4, 2, head=12, rope_scaling=scaling)
    assert error(small, large) < FP64


def test_yarn_keeps_its_head_size() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    assert error(llama(rope_scaling=yarn), llama(48, 8, 2, 3, 50, 6, rope_scaling=yarn)) < FP64
    with pytest.raises(UserError, match="the frequencies of rotary scaling 'yarn' depend on it"):
        plan(make_spec(llama(rope_scaling=yarn)), make_spec(llama(head=12, rope_scaling=yarn)))


@pytest.mark.parametrize("kind", ["mistral", "qwen2", "qwen3"])
def test_relatives_of_llama(kind: str) -> None:
    small, large = llama(model_type=kind), llama(40, 8, 4, 3, 60, 6, model_type=kind)
    assert error(small, large) < FP64


def test_corner_and_stack_are_not_exact() -> None:
    assert error(llama(), llama(48, 8, 4), operator="corner") > 1e-2
    assert error(llama(), llama(layers=4), depth="stack", allow_approximate=True) > 1e-2


@pytest.mark.parametrize(
    ("small", "large", "options", "match"),
    [
        (llama(), llama(heads=2, groups=1, head=6), {}, "number of heads would shrink from 4 to 2"),
        (llama(groups=4), llama(groups=2), {}, "key-value heads would shrink from 4 to 2"),
        (llama(), llama(mlp=30), {}, "MLP size would shrink"),
        (llama(), llama(layers=1), {}, "number of layers would shrink"),
        (llama(), llama(hidden_act="gelu"), {}, "activation differs"),
        (llama(), llama(rms_norm_eps=1e-6), {}, "norm eps differs"),
        (llama(), llama(rope_theta=5e5), {}, "rotary positions .* differs"),
        (llama(), llama(vocab_size=62), {}, "vocabulary size differs"),
        (llama(), llama(tie_word_embeddings=True), {}, "tie_word_embeddings"),
        (llama(), llama(attention_bias=True), {}, "biases differs"),
        (llama(), gpt2(), {}, "a llama model is not a gpt2 model"),
        (gpt2(), gpt2(n_positions=64), {}, "longest sequence differs"),
        (llama(24, 6, 2, head=4), llama(24, 6, 3, head=4), {}, "cannot hold 2 groups of 3"),
        (llama(), llama(head=8), {}, "head size grows by a whole number of times only"),
        (llama(), llama(36, head=6), {"axes": {"embed": "tile"}}, "needs a whole ratio"),
        (llama(), llama(36, head=6), {"axes": {"embed": "mean_pad"}}, "this model has RMSNorm; use mode 'zero_pad'"),
        (gpt2(), gpt2(32), {"axes": {"embed": "zero_pad"}}, "this model has LayerNorm; use mode 'mean_pad'"),
        (llama(), llama(24, 8, 4, head=6), {"axes": {"kv_heads": "tile"}}, "set heads=tile too"),
        (llama(), llama(layers=4), {"depth": "stack"}, "changes the function"),
        (llama(), llama(48), {"noise": -1.0}, "noise -1.0 must be"),
        (llama(model_type="qwen3"), llama(head=12, model_type="qwen3"), {}, "norm inside each head"),
    ],
)
def test_refusals(small: dict[str, Any], large: dict[str, Any], options: dict[str, Any], match: str) -> None:
    with pytest.raises(UserError, match=match):
        plan(make_spec(small, "small"), make_spec(large, "large"), **options)


def test_impossible_configs() -> None:
    """What Hugging Face would refuse is refused here, by the name of the field."""
    for config, match in (
        (llama(30, 6, 3, head=5), "'head_dim' is 5; rotary positions need an even number"),
        (llama(25, 4, 2, head=6), "'hidden_size' 25 is not divisible by 'num_attention_heads' 4"),
        (llama(24, 4, 3), "'num_attention_heads' 4 is not divisible by 'num_key_value_heads' 3"),
        (gpt2(25), "'n_embd' 25 is not divisible by 'n_head' 4"),
        (llama(hidden_size="24"), "'hidden_size' must be a positive integer, not '24'"),
        ({**llama(), "model_type": "gemma"}, "model_type 'gemma' is not supported"),
        (llama(quantization_config={"bits": 4}), "quantised weights cannot be grown"),
    ):
        with pytest.raises(UserError, match=match):
            make_spec(config)


def test_longer_positions_are_another_model_but_grow() -> None:
    """Rotary positions have no weights: only their number differs."""
    small, large = make_spec(llama()), make_spec(llama(36, head=6, max_position_embeddings=128))
    assert plan(small, large).exact


def test_layers_of_different_attention_are_refused() -> None:
    """A list that was copied with the config, and Qwen's first layers that do not slide."""
    stale = llama(layers=4, model_type="qwen2", layer_types=["full_attention"] * 2)
    mixed = llama(layers=4, model_type="qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=2)
    for config, match in ((stale, "an entry for each of the 4 layers"), (mixed, "different kinds of attention")):
        with pytest.raises(UserError, match=match):
            make_spec(config)
    sliding = {"model_type": "mistral", "sliding_window": 4}
    assert error(llama(**sliding), llama(36, 6, 3, 3, 50, 6, **sliding)) < FP64
