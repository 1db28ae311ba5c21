"""Our language models compute what transformers' do: logits, hidden states and gradients, every family and scaling."""

from copy import deepcopy
from typing import Any

import pytest
import torch

from compt_megatron.errors import UserError
from compt_megatron.models.build import build_language_model
from compt_megatron.models.groups import lone_groups
from compt_megatron.models.language import LanguageModel
from compt_megatron.models.part import ModelPart
from compt_megatron.models.state import canonical_state, load_canonical, split_fused
from compt_megatron.spec.families import spec_from_config
from compt_megatron.spec.huggingface_names import HEAD, embedding_key
from compt_megatron.spec.table import ModelSpec
from tests.unit.lm_helpers import gpt2, llama, perturbed, split_state

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
YARN = {"factor": 4.0, "original_max_position_embeddings": 16}
MODELS: dict[str, dict[str, Any]] = {
    "llama": llama(layers=3),
    "llama, no groups": llama(groups=4),
    "llama, wide heads": llama(head=10, groups=1),
    "llama, biases": llama(attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "llama, biases of the MLP": llama(mlp_bias=True, hidden_act="gelu"),
    "llama, linear": llama(rope_scaling={"rope_type": "linear", "factor": 2.5}, rope_theta=5e3),
    "llama, llama3": llama(head=16, rope_scaling={"rope_type": "llama3", **LLAMA3}, rope_theta=5e5),
    "llama, yarn": llama(head=16, rope_scaling={"rope_type": "yarn", **YARN}),
    "llama, yarn with options": llama(
        head=32,
        rope_theta=500.0,
        rope_scaling={"rope_type": "yarn", **YARN, "beta_fast": 1.5, "beta_slow": 0.5, "truncate": False}
        | {"mscale": 0.7, "mscale_all_dim": 0.4},
    ),
    "llama, yarn with a factor": llama(head=16, rope_scaling={"rope_type": "yarn", **YARN, "attention_factor": 1.3}),
    "llama, yarn with positions outside": llama(
        head=16, rope_scaling={"rope_type": "yarn", "factor": 4.0}, original_max_position_embeddings=8
    ),
    "llama, dynamic": llama(rope_scaling={"rope_type": "dynamic", "factor": 3.0}, max_position_embeddings=24),
    "mistral": llama(model_type="mistral", sliding_window=9),
    "mistral, full": llama(model_type="mistral", sliding_window=None),
    "qwen2": llama(model_type="qwen2", tie_word_embeddings=True),
    "qwen3": llama(model_type="qwen3", head=10, attention_bias=True),
    "gpt2": gpt2(layers=3, n_positions=48),
    "gpt2, untied": gpt2(mlp=40, n_positions=48, tie_word_embeddings=False, activation_function="gelu"),
    "gpt2, relu": gpt2(n_positions=48, activation_function="relu"),
}
LENGTH = 48  # of the probe: longer than the original positions and than the window


def pair(config: dict[str, Any], double: bool = False, **build: Any) -> tuple[Any, LanguageModel, ModelSpec]:
    """transformers' model and ours with the same weights, no bias zero, no norm trivial."""
    spec = spec_from_config(deepcopy(config), "test")
    reference = perturbed(deepcopy(config), double=double)  # transformers writes into what it is given
    model = build_language_model(spec, dtype=torch.float64 if double else torch.float32, **build)
    load_canonical(model, spec, split_state(spec, reference.state_dict()).__getitem__)
    return reference, model, spec


def tokens(rows: int = 3, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(0, 61, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_hidden_states_are_those_of_transformers(name: str) -> None:
    reference, model, spec = pair(MODELS[name])
    layers = spec.towers["text"].layers
    with torch.no_grad():
        expected = reference(tokens(), output_hidden_states=True)
        outputs = model(tokens(), layers=range(layers - 1))
        logits = model.logits(outputs["hidden"])
    assert logits.shape == expected.logits.shape
    assert (logits - expected.logits).abs().max() < 1e-4
    assert (logits - expected.logits).norm() < 1e-5 * expected.logits.norm()
    found = [outputs[f"layer_{layer}"] for layer in range(layers - 1)] + [outputs["hidden"]]
    for mine, theirs in zip(found, expected.hidden_states[1:], strict=True):
        assert (mine - theirs).norm() < 1e-5 * theirs.norm()


def test_the_scalings_of_the_test_change_the_function() -> None:
    """A scaling that does nothing at the probe's length would be no test of it."""
    plain = {}
    for name, config in MODELS.items():
        if "rope_scaling" in config:
            model, without = pair(config)[1], pair({k: v for k, v in config.items() if k != "rope_scaling"})[1]
            with torch.no_grad():
                plain[name] = float((model(tokens())["hidden"] - without(tokens())["hidden"]).norm())
    assert min(plain.values()) > 0.5, plain


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("name", ["llama", "llama, biases", "mistral", "qwen3", "gpt2", "gpt2, untied"])
def test_gradients(name: str, recompute: str) -> None:
    """In fp64 every gradient is transformers' own, also through the states of a layer: rotary angles are in fp32."""
    reference, model, spec = pair(MODELS[name], double=True, recompute=recompute)
    probe = tokens()
    expected = reference(probe, output_hidden_states=True)
    (expected.logits.sin().sum() + expected.hidden_states[1].square().sum()).backward()
    outputs = model.train()(probe, layers=(0,))
    (model.logits(outputs["hidden"]).sin().sum() + outputs["layer_0"].square().sum()).backward()
    wanted = split_state(spec, {key: value.grad for key, value in named_parameters(reference, spec).items()})
    seen = set()
    for module_name, parameter in model.named_parameters():
        for key, gradient in split_fused(spec, module_name, parameter.grad).items():
            seen.add(key)
            assert (gradient - wanted[key]).norm() < 1e-9 * wanted[key].norm() + 1e-9, key
    assert seen == set(spec.params)


def named_parameters(reference: Any, spec: ModelSpec) -> dict[str, torch.nn.Parameter]:
    found = dict(reference.named_parameters())
    assert (HEAD in found) != spec.towers["text"].tied
    return found


def test_recompute_keeps_less() -> None:
    kept = {}
    for recompute in ("none", "full"):
        _, model, _ = pair(llama(layers=6), recompute=recompute)
        sizes: list[int] = []

        def pack(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.train()(tokens())
        kept[recompute] = sum(sizes)
    assert kept["full"] < kept["none"] / 4


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_bf16_is_as_close_as_transformers_in_bf16(name: str) -> None:
    reference, _, spec = pair(MODELS[name])
    model = build_language_model(spec, dtype=torch.bfloat16)
    half = perturbed(deepcopy(MODELS[name])).bfloat16()
    load_canonical(model, spec, split_state(spec, half.state_dict()).__getitem__)
    reference.load_state_dict({key: value.float() for key, value in half.state_dict().items()})
    with torch.no_grad():
        truth, theirs = reference(tokens(8)).logits, half(tokens(8)).logits
        found = model.logits(model(tokens(8))["hidden"])
    assert found.dtype == torch.bfloat16
    assert (found - truth).norm() < 1.2 * (theirs - truth).norm() < 0.1 * truth.norm()


def test_a_model_that_is_not_split_beside_one_that_is() -> None:
    """A teacher's groups."""
    _, model, spec = pair(MODELS["llama"])
    teacher = build_language_model(spec, part=ModelPart(spec), groups=lone_groups())
    load_canonical(teacher, spec, canonical_state(model, spec).__getitem__)
    with torch.no_grad():
        assert torch.equal(teacher(tokens())["hidden"], model(tokens())["hidden"])


@pytest.mark.parametrize("name", ["llama", "llama, biases", "qwen3", "gpt2", "gpt2, untied"])
def test_weights_round_trip(name: str) -> None:
    reference, model, spec = pair(MODELS[name])
    state = split_state(spec, reference.state_dict())
    found = canonical_state(model, spec)
    assert list(found) == list(spec.params)
    assert all(torch.equal(found[key], state[key]) for key in spec.params)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_padded_vocabulary_is_cut_and_joined(name: str) -> None:
    """61 entries on 4 ranks: 16 each, the last has 13 and three rows of padding."""
    reference, _, spec = pair(MODELS[name])
    state = split_state(spec, reference.state_dict())
    name = embedding_key(spec)
    parts = [ModelPart(spec, 4, rank) for rank in range(4)]
    whole = torch.cat([part.split([name], part.fuse({name: state[name][part.box(name)]}))[name] for part in parts])
    assert torch.equal(whole, state[name])
    padded = parts[3].fuse({name: state[name][parts[3].box(name)]})
    assert padded.shape[0] == 16
    assert not padded[13:].any()


def test_without_memory() -> None:
    big = llama(width=4096, heads=32, groups=8, layers=32, mlp=14336, vocab_size=128256)
    spec = spec_from_config(big, "8B")
    model = build_language_model(spec, dtype=torch.bfloat16, meta=True)
    assert sum(parameter.numel() for parameter in model.parameters()) == spec.numel


@pytest.mark.parametrize(
    ("config", "part", "reason"),
    [
        (llama(groups=2), {"tensor": 4}, "2 query groups, which tensor does not divide"),
        (llama(layers=4), {"pipeline": 2, "virtual": 4}, "pipeline 2 x virtual 4 does not divide"),
        (llama(groups=4, vocab_size=9), {"tensor": 4}, "leaves tensor-parallel ranks without an entry"),
        (llama(hidden_act="mish"), {}, "activation 'mish' is not supported"),
        (llama(rope_scaling={"rope_type": "longrope", "factor": 2.0}), {}, "'longrope' is not supported"),
        (llama(rope_scaling={"rope_type": "llama3", "factor": 2.0}), {}, "needs 'low_freq_factor'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_built_is_refused(config: dict[str, Any], part: dict[str, int], reason: str) -> None:
    spec = spec_from_config(config, "small")
    with pytest.raises(UserError, match=reason) as error:
        build_language_model(spec, part=ModelPart(spec, **part))
    assert "small" in str(error.value)


def test_more_tokens_than_learned_positions() -> None:
    _, model, _ = pair(MODELS["gpt2"])
    with pytest.raises(AssertionError, match="49 tokens, but the model has 48 positions"):
        model(tokens(length=49))
