"""Between the table's names and the parameters of our modules, where q, k and v (gate and up) are one tensor.

The functions on single tensors serve weights, gradients and optimizer moments alike: they only move rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from compt_megatron.spec.megatron_names import megatron_place
from compt_megatron.spec.table import ModelSpec

_NAMES: dict[str, dict[str, list[str]]] = {}  # by the spec's digest: asked for once a tensor


def module_to_canonical(spec: ModelSpec) -> dict[str, list[str]]:
    """Name of each parameter of the built model -> the canonical names it holds: one, or all parts that share it."""
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
        oriented = tensor.t() if megatron_place(spec, names[0]).transposed else tensor
        return {names[0]: oriented.view(spec.params[names[0]].shape)}
    parts = {}
    for name in names:
        parts[name] = tensor.new_empty(spec.params[name].shape)
        for own, fused in _views(spec, {name: parts[name]}, tensor):
            own.copy_(fused)
    return parts


def fuse(spec: ModelSpec, module_name: str, tensors: dict[str, Tensor]) -> Tensor:
    """The inverse of `split_fused`: the module parameter that holds the canonical `tensors`."""
    if len(tensors) == 1:
        name, tensor = next(iter(tensors.items()))
        if megatron_place(spec, name).transposed:
            return tensor.t().contiguous()
        return tensor.view(1) if tensor.dim() == 0 else tensor  # modules hold scalars as [1], see ClipModel
    assert sorted(tensors) == sorted(module_to_canonical(spec)[module_name]), (module_name, list(tensors))
    name, first = next(iter(tensors.items()))
    fused_tensor = first.new_empty(megatron_place(spec, name).shape)
    for own, fused in _views(spec, tensors, fused_tensor):
        fused.copy_(own)
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


def _views(spec: ModelSpec, tensors: dict[str, Tensor], fused: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """For each run of rows that canonical `tensors` have in the `fused` one: a view of it in either."""
    for name, tensor in tensors.items():
        place = megatron_place(spec, name)
        own = tensor.t() if place.transposed else tensor
        for run in place.rows.runs(0, own.shape[0]):
            yield own[run.start : run.stop], fused[run.at : run.at + run.stop - run.start]
