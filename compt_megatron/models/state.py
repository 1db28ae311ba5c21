"""Between the table's names and the parameters of a whole model, where q, k and v (gate and up) are one tensor.

`part.py` has the same for a rank's part of a model that is split.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from compt_megatron.models.part import ModelPart
from compt_megatron.spec.table import ModelSpec


def module_to_canonical(spec: ModelSpec) -> dict[str, list[str]]:
    """Name of each parameter of the built model -> the canonical names it holds: one, or all parts that share it."""
    return ModelPart(spec).names()


def split_fused(spec: ModelSpec, module_name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Canonical name -> tensor, from a module parameter (or its gradient or moment). Unfused ones are not copied."""
    return ModelPart(spec).split(module_to_canonical(spec)[module_name], tensor)


def fuse(spec: ModelSpec, module_name: str, tensors: dict[str, Tensor]) -> Tensor:
    """The inverse of `split_fused`: the module parameter that holds the canonical `tensors`."""
    assert sorted(tensors) == sorted(module_to_canonical(spec)[module_name]), (module_name, list(tensors))
    return ModelPart(spec).fuse(tensors)


@torch.no_grad()
def load_canonical(model: nn.Module, spec: ModelSpec, get: Callable[[str], Tensor], part: ModelPart | None = None,
                   chunk: int = 0) -> None:  # fmt: skip
    """Copy every parameter in from `get(canonical name)`, rounding to the model's dtype. Values may be on any device.

    `get` returns whole tensors; of a `part` of the model (a chunk of its layers) only its regions are kept. The model
    must be there (before ZeRO-3 partitions it).
    """
    part = part or ModelPart(spec)
    parameters = dict(model.named_parameters())
    for module_name, names in part.names(chunk).items():
        tensors = {name: get(name) for name in names}
        for name, tensor in tensors.items():
            assert tensor.shape == spec.params[name].shape, (name, tuple(tensor.shape), spec.params[name].shape)
        regions = {name: tensor[part.box(name)] if tensor.dim() else tensor for name, tensor in tensors.items()}
        parameters.pop(module_name).copy_(part.fuse(regions))
    assert not parameters, f"parameters without a canonical name: {sorted(parameters)}"


@torch.no_grad()
def canonical_state(model: nn.Module, spec: ModelSpec) -> dict[str, Tensor]:
    """Canonical name -> value, in the table's order, on the model's device. Unfused tensors share the model's memory
    (clone them to keep them over a step)."""
    parts: dict[str, Tensor] = {}
    for module_name, parameter in model.named_parameters():
        parts.update(split_fused(spec, module_name, parameter.detach()))
    return {name: parts[name] for name in spec.params}
