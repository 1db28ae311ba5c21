"""Small Hugging Face language models and their canonical tensors, for tests of growth and formats."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch

from compt_megatron.growth.execute import Maker
from compt_megatron.growth.plan import GrowthPlan
from compt_megatron.spec.families import spec_from_config
from compt_megatron.spec.table import ModelSpec
from compt_megatron.torchvision_mend import ensure_torchvision
from tests.unit.growth_helpers import State, carried_out, relative_error

__all__ = ["relative_error"]

PARTS = ("q", "k", "v")


def llama(
    width: int = 24,
    heads: int = 4,
    groups: int = 2,
    layers: int = 2,
    mlp: int = 40,
    head: int | None = None,
    **more: Any,
) -> dict[str, Any]:
    """A small Llama-type config.json."""
    return {
        "model_type": "llama",
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "num_hidden_layers": layers,
        "intermediate_size": mlp,
        "head_dim": head or width // heads,
        "vocab_size": 61,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.3,
        **more,
    }


def gpt2(width: int = 24, heads: int = 4, layers: int = 2, mlp: int | None = None, **more: Any) -> dict[str, Any]:
    """A small GPT-2-type config.json."""
    return {
        "model_type": "gpt2",
        "n_embd": width,
        "n_head": heads,
        "n_layer": layers,
        "n_inner": mlp or 4 * width,
        "vocab_size": 61,
        "n_positions": 32,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.3,
        **more,
    }


def make_spec(config: dict[str, Any], name: str = "small") -> ModelSpec:
    return spec_from_config(dict(config), name)


def hf_model(config: dict[str, Any]) -> Any:
    """transformers' own model of a config (its eager attention takes the softmax in fp32 whatever the dtype)."""
    ensure_torchvision()
    import transformers

    known = dict(config)
    made = transformers.AutoConfig.for_model(known.pop("model_type"), **known)
    model = transformers.AutoModelForCausalLM.from_config(made, attn_implementation="sdpa").eval()
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):  # theirs computes in fp32 even in an fp64 model
            module.forward = partial(_rms_norm, module)
    return model


def _rms_norm(norm: Any, x: torch.Tensor) -> torch.Tensor:
    return norm.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon)


def perturbed(config: dict[str, Any], seed: int = 0, double: bool = False) -> Any:
    """A model in which no bias is zero and no norm trivial, as after training."""
    torch.manual_seed(seed)
    model = hf_model(config)
    model = model.double() if double else model
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * (0.3 if "norm" in name or "ln_" in name else 0.1))
    return model


def split_state(spec: ModelSpec, state: State) -> State:
    """Canonical tensors of transformers' state dict: GPT-2's c_attn in thirds."""
    found: State = {}
    for name in spec.params:
        for index, part in enumerate(PARTS):
            if spec.family == "gpt2" and f".attn.{part}_proj." in name:
                found[name] = state[name.replace(f"{part}_proj", "c_attn")].chunk(3, -1)[index]
        if name not in found:
            found[name] = state[name]
    return {name: value.detach().clone() for name, value in found.items()}


def fuse_state(spec: ModelSpec, tensors: State) -> State:
    """The inverse of `split_state`."""
    state: State = {}
    for name, value in tensors.items():
        if spec.family == "gpt2" and ".attn.q_proj." in name:
            rows = [tensors[name.replace("q_proj", f"{part}_proj")] for part in PARTS]
            state[name.replace("q_proj", "c_attn")] = torch.cat(rows, -1)
        elif not (spec.family == "gpt2" and (".attn.k_proj." in name or ".attn.v_proj." in name)):
            state[name] = value
    return state


def load(model: Any, spec: ModelSpec, tensors: State) -> Any:
    """Fill transformers' model with canonical tensors; every parameter must get one."""
    left = model.load_state_dict(fuse_state(spec, tensors), strict=False)
    tied = ["lm_head.weight"] if spec.towers["text"].tied else []
    assert not left.unexpected_keys
    assert left.missing_keys in ([], tied), left.missing_keys
    return model


def grown_model(plan: GrowthPlan, model: Any) -> Any:
    """transformers' model that the plan makes of one, in its dtype."""
    weights = replace(plan, states={})
    tensors = carried_out(weights, split_state(plan.source, dict(model.state_dict())))
    return load(hf_model(plan.target.config).to(next(model.parameters()).dtype), plan.target, tensors)


def probe(seed: int = 1, batch: int = 3, length: int = 11) -> torch.Tensor:
    return torch.randint(1, 60, (batch, length), generator=torch.Generator().manual_seed(seed))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(probe()).logits


def states_carried_out(plan: GrowthPlan, states: dict[str, State]) -> dict[str, State]:
    """Grown optimizer state by prefix, from canonical tensors of the source by prefix."""
    found: dict[str, State] = {}
    sources = {f"{prefix}/{name}": value for prefix, tensors in states.items() for name, value in tensors.items()}
    maker = Maker(plan, lambda name, region: sources[name][region].clone())
    for prefix, tensors in states.items():
        dtype = next(iter(tensors.values())).dtype
        found[prefix] = {name: maker.make(f"{prefix}/{name}", None, dtype) for name in plan.states[prefix]}
    return found
