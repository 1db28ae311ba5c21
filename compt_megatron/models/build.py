"""Builds the model of a spec, or a rank's part of it, without values: `load_canonical` (state.py) fills it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from compt_megatron.models.block import Recompute, transformer_config
from compt_megatron.models.clip import ClipModel
from compt_megatron.models.groups import ensure_groups, have_groups, model_groups
from compt_megatron.models.part import ModelPart
from compt_megatron.models.towers import TextTower, TowerPlace, VisionTower
from compt_megatron.spec.megatron_names import megatron_place
from compt_megatron.spec.table import ModelSpec

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection


def build_model(
    spec: ModelSpec,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    recompute: Recompute = "none",
    sequence: bool = False,
    meta: bool = False,
    part: ModelPart | None = None,
    chunk: int = 0,
    groups: ProcessGroupCollection | None = None,
) -> ClipModel:
    """A chunk of `part` of the model of `spec` (None: this rank's part in the current groups, all of it where it is not
    split), with uninitialised parameters of `dtype` on `device`, or on no device with `meta`.

    Uses the current process groups (or `groups`, which must fit `part`) and makes those of one unsplit model where
    there are none. `recompute`: the activations that the backward pass computes again (in training mode only);
    `sequence`: sequence parallelism.
    """
    if not have_groups():
        ensure_groups()
    build = _Builder(spec, dtype, recompute, sequence, part or ModelPart.current(spec), chunk, groups or model_groups())
    with torch.device("meta" if meta else device):
        model = ClipModel(build.vision(), build.text())
        for name in ("logit_scale", "logit_bias"):
            if name in spec.params and build.part.is_last(chunk):
                setattr(model, name, nn.Parameter(torch.empty(1, dtype=dtype)))
    _mark_split(model, build.part, chunk)
    return model


def _mark_split(model: nn.Module, part: ModelPart, chunk: int) -> None:
    """Say of every parameter whether tensor-parallel ranks have different parts of it, in megatron's words: gradient
    norms count the others once. (megatron-core marks weights where it initialises them, which it does not do here.)"""
    parameters: dict[str, Any] = dict(model.named_parameters())
    for module_name, names in part.names(chunk).items():
        split = part.is_split(names[0])
        parameters[module_name].tensor_model_parallel = split
        parameters[module_name].partition_dim = megatron_place(part.spec, names[0]).split if split else -1
        parameters[module_name].partition_stride = 1


@dataclass(frozen=True)
class _Builder:
    spec: ModelSpec
    dtype: torch.dtype
    recompute: Recompute
    sequence: bool
    part: ModelPart
    chunk: int
    groups: ProcessGroupCollection

    def _place(self) -> TowerPlace:
        stage = self.chunk if self.part.virtual > 1 else None
        return TowerPlace(self.part.is_first(self.chunk), self.part.is_last(self.chunk), stage, self.groups)

    def vision(self) -> VisionTower:
        tower = self.spec.towers["vision"]
        patch = self.spec.params["visual.conv1.weight"].shape[-1]
        config = transformer_config(tower, self.dtype, self.recompute, self.part, self.sequence)
        return VisionTower(tower, config, self._place(), patch=patch, joint=self.spec.joint)

    def text(self) -> TextTower | None:
        if "text" not in self.spec.towers:
            return None
        tower = self.spec.towers["text"]
        vocab = self.spec.params["token_embedding.weight"].shape[0]
        eos = int(self.spec.config["text_cfg"].get("eos_id", 2))  # open_clip's default
        config = transformer_config(tower, self.dtype, self.recompute, self.part, self.sequence)
        return TextTower(tower, config, self._place(), vocab=vocab, eos=eos, joint=self.spec.joint)
