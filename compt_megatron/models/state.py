"""Between the table's names and the parameters of our modules, where q, k and v are one interleaved tensor.

The functions on single tensors serve weights, gradients and optimizer moments alike: they only move rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import cast

import torch
from torch import Tensor, nn

from compt_megatron.spec.megatron_names import Part, fused_rows, megatron_place
from compt_megatron.spec.table import ModelSpec

_NAMES: dict[str, dict[str, list[str]]] = {}  # by the spec's digest: asked for once a tensor


def module_to_canonical(spec: ModelSpec) -> dict[str, list[str]]:
    """Name of each parameter of the built model -> the canonical names it holds: one, or q, k and v."""
    digest = spec.digest
    if digest not in _NAMES:
        names: dict[str, list[str]] = {}
        for name in spec.params:
            names.setdefault(megatron_place(spec, name).module, []).append(name)
        _NAMES[digest] = names
    return _NAMES[digest]


def split_fused(spec: ModelSpec, module_name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Canonical name -> tensor, from a module parameter (or its gradient or moment). Unfused ones are not copied."""
    names = module_to_canonical(spec)[module_name]
    if len(names) == 1:
        return {names[0]: tensor.view(spec.params[names[0]].shape)}
    parts = {}
    for name in names:
        parts[name] = tensor.new_empty(spec.params[name].shape)
        for own, fused in _heads(spec, name):
            parts[name][own] = tensor[fused]
    return parts


def fuse(spec: ModelSpec, module_name: str, tensors: dict[str, Tensor]) -> Tensor:
    """The inverse of `split_fused`: the module parameter that holds the canonical `tensors`."""
    if len(tensors) == 1:
        tensor = next(iter(tensors.values()))
        return tensor.view(1) if tensor.dim() == 0 else tensor  # modules hold scalars as [1], see ClipModel
    assert sorted(tensors) == sorted(module_to_canonical(spec)[module_name]), (module_name, list(tensors))
    first = next(iter(tensors.values()))
    rows = sum(tensor.shape[0] for tensor in tensors.values())
    fused_tensor = first.new_empty((rows, *first.shape[1:]))
    for name, tensor in tensors.items():
        for own, fused in _heads(spec, name):
            fused_tensor[fused] = tensor[own]
    return fused_tensor


@torch.no_grad()
def load_canonical(model: nn.Module, spec: ModelSpec, get: Callable[[str], Tensor]) -> None:
    """Copy every parameter in from `get(canonical name)`, rounding to the model's dtype. Values may be on any device.

    The model must be whole on this process (before ZeRO-3 partitions it).
    """
    parameters = dict(model.named_parameters())
    for module_name, names in module_to_canonical(spec).items():
        tensors = {name: get(name) for name in names}
        for name, tensor in tensors.items():
            assert tensor.shape == spec.params[name].shape, (name, tuple(tensor.shape), spec.params[name].shape)
        parameters.pop(module_name).copy_(fuse(spec, module_name, tensors))
    assert not parameters, f"parameters without a canonical name: {sorted(parameters)}"


@torch.no_grad()
def canonical_state(model: nn.Module, spec: ModelSpec) -> dict[str, Tensor]:
    """Canonical name -> value, in the table's order, on the model's device. Unfused tensors share the model's memory
    (clone them to keep them over a step)."""
    parts: dict[str, Tensor] = {}
    for module_name, parameter in model.named_parameters():
        parts.update(split_fused(spec, module_name, parameter.detach()))
    return {name: parts[name] for name in spec.params}


def _heads(spec: ModelSpec, name: str) -> Iterator[tuple[slice, slice]]:
    """For each head: its rows in canonical parameter `name`, and in the fused tensor."""
    tower = spec.towers[spec.params[name].tower]
    part = cast(Part, megatron_place(spec, name).part)
    for head in range(tower.heads):
        own = slice(head * tower.head_dim, (head + 1) * tower.head_dim)
        yield own, fused_rows(part, head, tower.heads, tower.heads, tower.head_dim)
