"""Whether Transformer Engine's layers do what torch's do, on this device: one block of a model, both ways.

Each tower's block is built at its width and heads, in the model's precision and split, with the same weights; output,
the input's gradient and every parameter's gradient must agree.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compt_megatron.models.block import LayerKind, block_layers, transformer_config
from compt_megatron.models.build import biased_linears
from compt_megatron.models.groups import lone_groups, model_groups
from compt_megatron.models.part import ModelPart
from compt_megatron.models.rotary import Rotary
from compt_megatron.models.towers import TowerBase, TowerPlace
from compt_megatron.spec.table import ModelSpec, Tower

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection

# |difference| / |torch's|, Frobenius norms. Roundings alone are about 1e-6 and 5e-3; products in TF32 some 5e-4.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}
_SEQUENCES, _MOST_TOKENS = 2, 512

_FOUND = dict[str, Tensor]


def disagreement(
    spec: ModelSpec,
    part: ModelPart,
    dtype: torch.dtype,
    device: torch.device,
    sequence: bool = False,
    groups: ProcessGroupCollection | None = None,
) -> str | None:
    """What differs between the two, in words, or None. Collective over the ranks that split the model.

    Lets through what building or running Transformer Engine's layers raises.
    """
    groups = groups or lone_groups(model_groups().tp)
    for name, tower in spec.towers.items():
        wanted = _block(spec, tower, part, dtype, sequence, groups, "torch").to(device)
        found = _block(spec, tower, part, dtype, sequence, groups, "transformer_engine").to(device)
        problem = _copied(wanted, found)
        if problem is None:
            with _fused_attention():
                problem = _compared(_run(wanted), _run(found), TOLERANCE[dtype])
        if problem is not None:
            return f"{problem} in a block of the {name} tower"
    return None


def _block(
    spec: ModelSpec,
    tower: Tower,
    part: ModelPart,
    dtype: torch.dtype,
    sequence: bool,
    groups: ProcessGroupCollection,
    kind: LayerKind,
) -> TowerBase:
    """The tower with one layer, and nothing but its block."""
    tower = replace(tower, layers=1, tokens=min(tower.tokens, _MOST_TOKENS))
    part = ModelPart(spec, part.tensor, part.tensor_rank)
    attention = 1.0 if tower.rope is None else Rotary(spec).attention
    config = transformer_config(tower, dtype, "none", part, sequence, attention)
    layers = block_layers(kind, tower, config, spec.identity.get("window"))
    biased = biased_linears(spec) if spec.is_language_model else None
    return TowerBase(tower, config, TowerPlace(True, True, None, groups, layers), biased)


@torch.no_grad()
def _copied(wanted: TowerBase, found: TowerBase) -> str | None:
    """Give both the same random weights, alike on all ranks. In words if their parameters differ."""
    generator = torch.Generator().manual_seed(0)
    own = dict(found.named_parameters())
    for name, param in wanted.named_parameters():
        other = own.pop(name, None)
        if other is None or (other.shape, other.dtype) != (param.shape, param.dtype):
            return f"{name} is not as it should be"
        if getattr(other, "sequence_parallel", False) != getattr(param, "sequence_parallel", False):
            return f"{name}'s mark for sequence parallelism is not as it should be"
        value = torch.randn(param.shape, generator=generator)
        value = (
            value * param.shape[1] ** -0.5
            if param.dim() == 2
            else 0.1 * value + name.endswith(("gamma", "norm.weight"))
        )
        param.copy_(value)
        other.copy_(param)
    return f"{next(iter(own))} should not be there" if own else None


def _run(block: TowerBase) -> _FOUND:
    """The output and all gradients of one forward and backward pass."""
    generator = torch.Generator().manual_seed(1)
    param = next(block.parameters())
    tokens = block.sequence_length // (block.config.tensor_model_parallel_size if block.config.sequence_parallel else 1)
    shape = (tokens, _SEQUENCES, block.tower.width)
    hidden, weight = (torch.randn(shape, generator=generator).to(param.device, param.dtype) for _ in range(2))
    hidden.requires_grad_()
    output = block.decoder(hidden, None)
    (output * weight).sum().backward()
    assert hidden.grad is not None
    gradients = {name: param.grad for name, param in block.named_parameters() if param.grad is not None}
    return {"the output": output.detach(), "the input's gradient": hidden.grad, **gradients}


def _compared(wanted: _FOUND, found: _FOUND, tolerance: float) -> str | None:
    if wanted.keys() != found.keys():
        return f"not the same tensors have gradients ({', '.join(sorted(wanted.keys() ^ found.keys()))})"
    errors = {}
    for name, value in wanted.items():
        errors[name] = float((found[name].double() - value.double()).norm() / value.double().norm())
    name = max(errors, key=lambda name: errors[name] if errors[name] == errors[name] else float("inf"))
    if errors[name] <= tolerance:
        return None
    return f"{name} differs by {errors[name]:.1e} (allowed: {tolerance:.0e})"


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Have Transformer Engine's attention fail where it has only the implementation that keeps all scores."""
    name = "NVTE_UNFUSED_ATTN"
    before = os.environ.get(name)
    os.environ[name] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
