"""What a link's transformer blocks are made of: torch's layers, or NVIDIA Transformer Engine's where they are there and
have shown on this device that they compute the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from compt_megatron.errors import UserError
from compt_megatron.models import transformer_engine
from compt_megatron.models.block import LayerKind
from compt_megatron.models.part import ModelPart
from compt_megatron.recipe.parallel_section import ParallelSettings
from compt_megatron.spec.table import ModelSpec

_DEVICE = "cuda"  # where Transformer Engine works
_checked: dict[tuple[object, ...], str | None] = {}  # what the check found, once a process for each kind of block


@dataclass(frozen=True)
class Layers:
    """What was chosen, and in words for the log."""

    kind: LayerKind
    name: str


def choose_layers(spec: ModelSpec, parallel: ParallelSettings, dtype: torch.dtype, device: torch.device) -> Layers:
    """The layers for this model in the current process groups, the same on all ranks. Collective.

    Raises UserError where `parallel.layers` names Transformer Engine and it cannot be used.
    """
    if parallel.layers == "torch":
        return Layers("torch", "layers of torch")
    reason = _obstacle(spec, parallel, dtype, device)
    if reason is None:
        return Layers("transformer_engine", "layers of Transformer Engine")
    if parallel.layers == "auto":
        return Layers("torch", f"layers of torch ({reason})")
    raise UserError(
        f"parallel.layers: 'transformer_engine' cannot be had for '{spec.name}' here: {reason}; use auto or torch"
    )


def check_layers(parallel: ParallelSettings, device: torch.device) -> None:
    """Raise UserError if `parallel.layers` names Transformer Engine, and it is plain before a model is made that it
    cannot be used."""
    reason = _plain_obstacle(parallel, device) or transformer_engine.absence()
    if parallel.layers == "transformer_engine" and reason is not None:
        raise UserError(f"parallel.layers: 'transformer_engine' cannot be had here: {reason}; use auto or torch")


def _plain_obstacle(parallel: ParallelSettings, device: torch.device) -> str | None:
    if device.type != _DEVICE:
        return "no CUDA device"
    return "zero 3 was never tried with Transformer Engine" if parallel.zero == 3 else None


def _obstacle(spec: ModelSpec, parallel: ParallelSettings, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why Transformer Engine's layers are not used, in words, or None."""
    if (reason := _plain_obstacle(parallel, device)) is not None:
        return reason
    if (reason := _of_any_rank(transformer_engine.absence)) is not None:
        return reason
    part = ModelPart.current(spec)
    key = (spec.digest, part.tensor, parallel.sequence, dtype)
    if key not in _checked:
        _checked[key] = _of_any_rank(lambda: _checked_block(spec, part, dtype, device, parallel.sequence))
    return _checked[key]


def _checked_block(
    spec: ModelSpec, part: ModelPart, dtype: torch.dtype, device: torch.device, sequence: bool
) -> str | None:
    from compt_megatron.models.layer_check import disagreement

    try:
        return disagreement(spec, part, dtype, device, sequence)
    except Exception as error:  # whatever a compiled extension may raise: torch's layers are there
        return f"Transformer Engine's layers fail: {transformer_engine.in_one_line(error)}"
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()  # of the block


def _of_any_rank(find: Callable[[], str | None]) -> str | None:
    """The first rank's reason that has one. Collective."""
    own = find()
    if dist.get_world_size() == 1:
        return own
    reasons: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(reasons, own)
    return next((reason for reason in reasons if reason is not None), None)
