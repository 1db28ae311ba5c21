"""Builds the model of a spec, without values: `load_canonical` (state.py) fills it."""

from __future__ import annotations

import torch
from torch import nn

from compt_megatron.models.block import transformer_config
from compt_megatron.models.clip import ClipModel
from compt_megatron.models.groups import ensure_groups, have_groups
from compt_megatron.models.towers import TextTower, VisionTower
from compt_megatron.spec.table import ModelSpec


def build_model(
    spec: ModelSpec,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    recompute: bool = False,
    meta: bool = False,
) -> ClipModel:
    """The model of `spec` with uninitialised parameters of `dtype` on `device`, or on no device with `meta`.

    Uses the current process groups and makes those of one unsplit model where there are none. With `recompute` the
    activations inside each block are computed again in the backward pass (in training mode only).
    """
    if not have_groups():
        ensure_groups()
    with torch.device("meta" if meta else device):
        model = ClipModel(_vision(spec, dtype, recompute), _text(spec, dtype, recompute))
        for name in ("logit_scale", "logit_bias"):
            if name in spec.params:
                setattr(model, name, nn.Parameter(torch.empty(1, dtype=dtype)))
    return model


def _vision(spec: ModelSpec, dtype: torch.dtype, recompute: bool) -> VisionTower:
    tower = spec.towers["vision"]
    patch = spec.params["visual.conv1.weight"].shape[-1]
    return VisionTower(tower, transformer_config(tower, dtype, recompute), patch=patch, joint=spec.joint)


def _text(spec: ModelSpec, dtype: torch.dtype, recompute: bool) -> TextTower | None:
    if "text" not in spec.towers:
        return None
    tower = spec.towers["text"]
    vocab = spec.params["token_embedding.weight"].shape[0]
    eos = int(spec.config["text_cfg"].get("eos_id", 2))  # open_clip's default
    return TextTower(tower, transformer_config(tower, dtype, recompute), vocab=vocab, eos=eos, joint=spec.joint)
