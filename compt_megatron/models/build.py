"""Builds the model of a spec, or a rank's part of it, without values: `load_canonical` (state.py) fills it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from compt_megatron.checkpoint.contract import Layout
from compt_megatron.checkpoint.megatron_layout import obstacle
from compt_megatron.errors import UserError
from compt_megatron.models.block import (
    ACTIVATIONS,
    LINEARS,
    LayerKind,
    Recompute,
    block_layers,
    transformer_config,
)
from compt_megatron.models.clip import ClipModel
from compt_megatron.models.groups import ensure_groups, have_groups, model_groups
from compt_megatron.models.language import LanguageModel
from compt_megatron.models.part import ModelPart
from compt_megatron.models.rotary import Rotary
from compt_megatron.models.towers import TextTower, TowerPlace, VisionTower
from compt_megatron.spec.huggingface_names import embedding_key
from compt_megatron.spec.megatron_names import megatron_place
from compt_megatron.spec.table import ModelSpec, Tower

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.transformer_config import TransformerConfig

_Model = TypeVar("_Model", bound=nn.Module)


def build_model(
    spec: ModelSpec,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    recompute: Recompute = "none",
    sequence: bool = False,
    layers: LayerKind = "torch",
    meta: bool = False,
    part: ModelPart | None = None,
    chunk: int = 0,
    groups: ProcessGroupCollection | None = None,
) -> ClipModel:
    """A chunk of `part` of the model of `spec` (None: this rank's part in the current groups, all of it where it is not
    split), with uninitialised parameters of `dtype` on `device`, or on no device with `meta`.

    Uses the current process groups (or `groups`, which must fit `part`) and makes those of one unsplit model where
    there are none. `recompute`: the activations that the backward pass computes again (in training mode only);
    `sequence`: sequence parallelism; `layers`: what its blocks are made of.
    """
    build = _builder(spec, dtype, recompute, sequence, layers, part, chunk, groups)
    with torch.device("meta" if meta else device):
        model = ClipModel(build.vision(), build.text())
        for name in ("logit_scale", "logit_bias"):
            if name in spec.params and build.part.is_last(chunk):
                setattr(model, name, nn.Parameter(torch.empty(1, dtype=dtype)))
    return _finished(model, build, meta, device)


def build_language_model(
    spec: ModelSpec,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    recompute: Recompute = "none",
    sequence: bool = False,
    layers: LayerKind = "torch",
    meta: bool = False,
    part: ModelPart | None = None,
    chunk: int = 0,
    groups: ProcessGroupCollection | None = None,
) -> LanguageModel:
    """Like `build_model`, for the spec of a language model.

    Raises UserError where the layout does not suit it (fewer query groups than tensor-parallel ranks, say), or for an
    activation or a rotary scaling that is not supported.
    """
    build = _builder(spec, dtype, recompute, sequence, layers, part, chunk, groups)
    _check(build.part)
    with torch.device("meta" if meta else device):
        model = build.language()
    return _finished(model, build, meta, device)


def _builder(
    spec: ModelSpec,
    dtype: torch.dtype,
    recompute: Recompute,
    sequence: bool,
    layers: LayerKind,
    part: ModelPart | None,
    chunk: int,
    groups: ProcessGroupCollection | None,
) -> _Builder:
    if not have_groups():
        ensure_groups()
    part, groups = part or ModelPart.current(spec), groups or model_groups()
    return _Builder(spec, dtype, recompute, sequence, layers, part, chunk, groups)


def _finished(model: _Model, build: _Builder, meta: bool, device: torch.device | str) -> _Model:
    if build.layers == "transformer_engine":
        assert not meta, "Transformer Engine's layers are built with memory"
        model.to(device)  # they come on the CPU
    _mark_split(model, build.part, build.chunk)
    return model


def _check(part: ModelPart) -> None:
    """Raise UserError if a language model cannot be built, or not split as `part` says."""
    spec, activation = part.spec, part.spec.towers["text"].activation
    if activation not in ACTIVATIONS:
        raise UserError(
            f"'{spec.name}': activation '{activation}' is not supported in training; those supported: "
            f"{', '.join(ACTIVATIONS)}"
        )
    reason = obstacle(spec, Layout(part.tensor, part.pipeline))
    layers, vocab = spec.towers["text"].layers, spec.params[embedding_key(spec)].shape[0]
    if reason is None and layers % (part.pipeline * part.virtual):
        reason = f"it has {layers} layers, which pipeline {part.pipeline} x virtual {part.virtual} does not divide"
    if reason is None and -(-vocab // part.tensor) * (part.tensor - 1) >= vocab:
        reason = f"its vocabulary of {vocab} leaves tensor-parallel ranks without an entry"
    if reason is not None:
        raise UserError(
            f"'{spec.name}' cannot be laid out for tensor {part.tensor}, pipeline {part.pipeline}: {reason}; "
            "use another layout"
        )


def _mark_split(model: nn.Module, part: ModelPart, chunk: int) -> None:
    """Say of every parameter whether tensor-parallel ranks have different parts of it, in megatron's words: gradient
    norms count the others once. (megatron-core marks weights where it initialises them, which it does not do here.)"""
    parameters: dict[str, Any] = dict(model.named_parameters())
    for module_name, names in part.names(chunk).items():
        split = part.is_split(names[0])
        parameters[module_name].tensor_model_parallel = split
        parameters[module_name].partition_dim = megatron_place(part.spec, names[0]).split if split else -1
        parameters[module_name].partition_stride = 1


def biased_linears(spec: ModelSpec) -> list[str]:
    """Those of LINEARS that have a bias in a language model."""
    modules = {megatron_place(spec, name).module for name, param in spec.params.items() if not param.layer}
    return [name for name in LINEARS if f"decoder.layers.0.{name}.bias" in modules]


@dataclass(frozen=True)
class _Builder:
    spec: ModelSpec
    dtype: torch.dtype
    recompute: Recompute
    sequence: bool
    layers: LayerKind
    part: ModelPart
    chunk: int
    groups: ProcessGroupCollection

    def _place(self, tower: Tower, config: TransformerConfig, window: int | None = None) -> TowerPlace:
        stage = self.chunk if self.part.virtual > 1 else None
        layers = block_layers(self.layers, tower, config, window)
        return TowerPlace(self.part.is_first(self.chunk), self.part.is_last(self.chunk), stage, self.groups, layers)

    def vision(self) -> VisionTower:
        tower = self.spec.towers["vision"]
        patch = self.spec.params["visual.conv1.weight"].shape[-1]
        config = transformer_config(tower, self.dtype, self.recompute, self.part, self.sequence)
        return VisionTower(tower, config, self._place(tower, config), patch=patch, joint=self.spec.joint)

    def text(self) -> TextTower | None:
        if "text" not in self.spec.towers:
            return None
        tower = self.spec.towers["text"]
        vocab = self.spec.params["token_embedding.weight"].shape[0]
        eos = int(self.spec.config["text_cfg"].get("eos_id", 2))  # open_clip's default
        config = transformer_config(tower, self.dtype, self.recompute, self.part, self.sequence)
        return TextTower(tower, config, self._place(tower, config), vocab=vocab, eos=eos, joint=self.spec.joint)

    def language(self) -> LanguageModel:
        tower = self.spec.towers["text"]
        rotary = None if tower.rope is None else Rotary(self.spec)
        attention = 1.0 if rotary is None else rotary.attention
        config = transformer_config(tower, self.dtype, self.recompute, self.part, self.sequence, attention)
        window = self.spec.identity.get("window")
        return LanguageModel(
            tower,
            config,
            self._place(tower, config, window),
            vocab=self.spec.params[embedding_key(self.spec)].shape[0],
            biased=biased_linears(self.spec),
            rotary=rotary,
            window=window,
            layers=self.part.layers("text", self.chunk),
        )
