"""How far two checkpoints' outputs are apart, run by the ecosystem's own code: open_clip's models or transformers'.

Neither shares a line with our own towers, so that what they compute is what a user of the checkpoint gets.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from compt_megatron.checkpoint.contract import Reader, dtype_name
from compt_megatron.errors import UserError
from compt_megatron.evaluate.memory import available_memory
from compt_megatron.spec.table import ModelSpec

_WIDEST = 8  # bytes of an element of the model that is run in fp64
_MARGIN = 2**28  # bytes for activations and outputs

Outputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Parity:
    """`errors`: name of an output -> relative error ||b - a|| / ||a|| of both run in fp32. `noise`: what the first
    model's outputs, run in `dtype`, are off by from the same run in fp64; `dtype` is the coarser one of those that the
    weights are stored in. `note`: why nothing was measured (both are empty then)."""

    errors: Mapping[str, float]
    noise: Mapping[str, float]
    dtype: str
    note: str = ""


def measure(reader_a: Reader, reader_b: Reader, seed: int = 0) -> Parity:
    """The relative errors between two checkpoints on one seeded probe batch, beside the noise of their dtype.

    Raises UserError for a checkpoint without a model and for models that do not take the same input.
    """
    a, b = spec_of(reader_a), spec_of(reader_b)
    dtype = _coarser(reader_a, reader_b)
    family = _family(a)
    if obstacle := hindrance(a, b):
        return Parity({}, {}, dtype_name(dtype), f"parity was not measured: {obstacle}")
    probe = family.probe(reader_a, reader_b, seed)
    model = family.build(reader_a)
    first = _run(family, model, probe, torch.float32)
    exact = _run(family, model, probe, torch.float64)
    rounded = first if dtype == torch.float32 else _run(family, model, probe, dtype)
    del model
    second = _run(family, family.build(reader_b), probe, torch.float32)
    return Parity(_errors(first, second), _errors(exact, rounded), dtype_name(dtype))


def hindrance(a: ModelSpec, b: ModelSpec) -> str:
    """Why the outputs of two models cannot be compared on this machine, "" where they can."""
    library = _family(a).LIBRARY
    if importlib.util.find_spec(library) is None:
        return f"{library} is not installed"
    needed, free = _WIDEST * max(a.numel, b.numel) + _MARGIN, available_memory()
    if needed > free:
        return f"it needs {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free"
    return ""


def parity(reader_a: Reader, reader_b: Reader, seed: int = 0) -> dict[str, float]:
    """The errors alone: "image" and "text" are un-normalised features of open_clip's towers, "logits" the
    cosine similarities between the batch's images and texts, or a language model's logits.

    Where b's joint embedding is wider, its leading entries are compared: growth puts a's features there.
    """
    family = _family(spec_of(reader_a))
    probe = family.probe(reader_a, reader_b, seed)
    a, b = (_run(family, family.build(reader), probe, torch.float32) for reader in (reader_a, reader_b))
    return _errors(a, b)


def spec_of(reader: Reader) -> ModelSpec:
    """The checkpoint's model. Raises UserError where it is not recorded."""
    if reader.spec is None:
        raise UserError(f"{reader.path}: does not record its model config; name it with --from")
    return reader.spec


def _family(spec: ModelSpec) -> ModuleType:
    """The module that runs models of a family: LIBRARY, probe(a, b, seed), build(reader), run(model, probe)."""
    from compt_megatron.evaluate import parity_clip, parity_lm

    return parity_lm if spec.is_language_model else parity_clip


def _run(family: ModuleType, model: torch.nn.Module, probe: Any, dtype: torch.dtype) -> Outputs:
    """The model's outputs with its parameters in `dtype`, in which it is left: fp32 comes back from fp64 unchanged.

    Buffers keep theirs: the tables of rotary positions are fp32 in every model.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.float().to(dtype)
    with torch.no_grad():
        outputs: Outputs = family.run(model, probe)
    return outputs


def _coarser(*readers: Reader) -> torch.dtype:
    """The dtype with the largest rounding error among those of the weights; fp32 at least, as models run in it."""
    dtypes = {info.dtype for reader in readers for name, info in reader.tensors().items() if name.startswith("weight/")}
    return max((torch.float32, *dtypes), key=lambda dtype: torch.finfo(dtype).eps)


def _errors(a: Outputs, b: Outputs) -> dict[str, float]:
    return {name: _relative(value, b[name][..., : value.shape[-1]]) for name, value in a.items()}


def _relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((b.double() - a.double()).norm() / a.double().norm())
