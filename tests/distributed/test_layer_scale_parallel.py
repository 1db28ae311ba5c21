"""A layer scale behind a linear that tensor parallelism cuts is whole on every rank, and so is its gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed.spawn import run_ranks

TOKENS, ROWS, INSIDE, WIDTH = 4, 3, 64, 32


def values() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (TOKENS, ROWS, INSIDE), "weight": (WIDTH, INSIDE), "bias": (WIDTH,), "gamma": (WIDTH,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def scaled(rank: int, world: int, sequence_parallel: bool) -> dict[str, Any]:
    from megatron.core.transformer.transformer_config import TransformerConfig

    from compt_megatron.models.block import ScaledRowLinear
    from compt_megatron.models.groups import ensure_groups

    if not torch.cuda.is_available():  # where megatron-core puts the tokens that it scatters; this process is a child
        torch.cuda.current_device = lambda: torch.device("cpu")
    ensure_groups(tensor=world)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=WIDTH,
        num_attention_heads=2,
        tensor_model_parallel_size=world,
        sequence_parallel=sequence_parallel,
        perform_initialization=False,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
    )
    given = values()
    options = {"config": config, "init_method": None, "bias": True, "input_is_parallel": True, "skip_bias_add": True}
    layer = ScaledRowLinear(INSIDE, WIDTH, **options)
    own = given["weight"].chunk(world, 1)[rank]
    with torch.no_grad():
        for name, value in (("weight", own), ("bias", given["bias"]), ("gamma", given["gamma"])):
            getattr(layer, name).copy_(value)
    output, bias = layer(given["x"].chunk(world, 2)[rank].contiguous())
    output = output + bias
    output.sin().sum().backward()
    grads = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return {"output": output.detach(), "marked": layer.gamma.sequence_parallel, **grads}


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_two_ranks_are_one(sequence_parallel: bool) -> None:
    given = {name: value.requires_grad_() for name, value in values().items()}
    wanted = given["gamma"] * (given["x"] @ given["weight"].T + given["bias"])
    wanted.sin().sum().backward()
    found = run_ranks(scaled, 2, sequence_parallel)
    outputs = [rank["output"] for rank in found]
    output = torch.cat(outputs) if sequence_parallel else outputs[0]
    torch.testing.assert_close(output, wanted.detach(), rtol=1e-5, atol=1e-5)
    weight = torch.cat([rank["weight"] for rank in found], 1)
    torch.testing.assert_close(weight, given["weight"].grad, rtol=1e-5, atol=1e-4)
    for name in ("gamma", "bias"):
        # under sequence parallelism a rank sees its own tokens, and megatron sums what is marked
        whole = sum(rank[name] for rank in found) if sequence_parallel else found[1][name]
        torch.testing.assert_close(whole, given[name].grad, rtol=1e-5, atol=1e-4)
    assert found[0]["marked"] == sequence_parallel
