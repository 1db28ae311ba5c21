"""Small open_clip models, and an in-memory checkpoint, for tests and benchmarks of growth."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

from compt_megatron.checkpoint.contract import Region, TensorInfo
from compt_megatron.growth.execute import execute
from compt_megatron.growth.plan import GrowthPlan
from compt_megatron.spec.families import spec_from_config
from compt_megatron.spec.open_clip_names import open_clip_place, open_clip_shapes
from compt_megatron.spec.table import ModelSpec
from compt_megatron.torchvision_mend import ensure_torchvision

State = dict[str, torch.Tensor]


def clip_config(
    width: int = 48, layers: int = 2, text: int = 32, text_layers: int = 2, head: int = 16, joint: int = 24, **more: Any
) -> dict[str, Any]:
    """A small CLIP: 32 px, patch 8. `more`: quick_gelu, and vision_cfg fields by name."""
    vision = {"image_size": 32, "patch_size": 8, "width": width, "layers": layers, "head_width": head}
    texts = {"context_length": 9, "vocab_size": 60, "width": text, "heads": text // 16, "layers": text_layers}
    config = {"embed_dim": joint, "vision_cfg": vision, "text_cfg": texts, "quick_gelu": more.pop("quick_gelu", False)}
    vision.update(more)
    return config


def make_spec(config: dict[str, Any], name: str = "small") -> ModelSpec:
    return spec_from_config(deepcopy(config), name)


def open_clip_model(config: dict[str, Any]) -> torch.nn.Module:
    """open_clip's own model of a config; with `vision_cfg` alone, its vision tower as attribute `visual`."""
    ensure_torchvision()
    from open_clip import model as open_clip

    config = deepcopy(config)
    if "text_cfg" in config:
        kind = open_clip.CustomTextCLIP if config.pop("custom_text", False) else open_clip.CLIP
        return kind(**config).eval()
    model = torch.nn.Module()
    model.visual = open_clip._build_vision_tower(
        config["embed_dim"], config["vision_cfg"], config.get("quick_gelu", False)
    )
    return model.eval()


def perturbed(config: dict[str, Any], seed: int = 0, norm: float = 0.3, rest: float = 0.05) -> torch.nn.Module:
    """A model in which no bias is zero, no norm trivial and no statistic zero, as after training."""
    torch.manual_seed(seed)
    model = open_clip_model(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = norm if "ln_" in name else rest
            if parameter.dim():
                parameter.add_(torch.randn_like(parameter) * scale)
    return model


def split_state(spec: ModelSpec, state: State) -> State:
    """Canonical tensors of an open_clip state dict."""
    found = {}
    for name in spec.params:
        place = open_clip_place(spec, name)
        whole = state[place.key]
        found[name] = whole if place.rows is None else whole[place.start : place.start + place.rows]
    return found


def fuse_state(spec: ModelSpec, tensors: State) -> State:
    """The open_clip state dict of canonical tensors."""
    state = {key: torch.full(shape, float("nan")) for key, shape in open_clip_shapes(spec).items()}
    for name, value in tensors.items():
        place = open_clip_place(spec, name)
        state[place.key] = state[place.key].to(value.dtype)
        if place.rows is None:
            state[place.key] = value
        else:
            state[place.key][place.start : place.start + place.rows] = value
    return state


class MemoryCheckpoint:
    """A Reader and a Writer over a dictionary; it refuses overlapping and undeclared writes."""

    def __init__(self, spec: ModelSpec | None, tensors: State | None = None) -> None:
        self.path, self.spec = Path("memory"), spec
        self.values = {f"weight/{name}": value.clone() for name, value in (tensors or {}).items()}
        self.written = {name: torch.ones(value.shape, dtype=torch.bool) for name, value in self.values.items()}
        self.meta: dict[str, Any] = {}
        self.largest_read = 0

    def tensors(self) -> dict[str, TensorInfo]:
        return {name: TensorInfo(tuple(value.shape), value.dtype) for name, value in self.values.items()}

    def read(self, name: str, region: Region | None = None) -> torch.Tensor:
        value = self.values[name] if region is None else self.values[name][region]
        self.largest_read = max(self.largest_read, value.numel())
        return value.clone()

    def metadata(self) -> dict[str, Any]:
        return self.meta

    def close(self) -> None:
        pass

    def declare(self, tensors: dict[str, TensorInfo]) -> None:
        for name, info in tensors.items():
            if name not in self.values:
                self.values[name] = torch.full(info.shape, float("nan"), dtype=info.dtype)
                self.written[name] = torch.zeros(info.shape, dtype=torch.bool)

    def write(self, name: str, offsets: tuple[int, ...], tensor: torch.Tensor) -> None:
        region = tuple(slice(start, start + size) for start, size in zip(offsets, tensor.shape, strict=True))
        assert tensor.dtype == self.values[name].dtype, name
        assert not self.written[name][region].any(), f"{name} {region} written twice"
        self.values[name][region] = tensor
        self.written[name][region] = True

    def commit(self, metadata: dict[str, Any]) -> Path:
        assert all(written.all() for written in self.written.values())
        self.meta = metadata
        return self.path

    def abort(self) -> None:
        self.values.clear()

    def state(self) -> State:
        """Canonical tensors."""
        return {name.removeprefix("weight/"): value for name, value in self.values.items()}


def carried_out(plan: GrowthPlan, tensors: State, workers: int = 1, dtype: torch.dtype | None = None) -> State:
    """The canonical target tensors that `execute` makes of canonical source tensors."""
    reader, writer = MemoryCheckpoint(plan.source, tensors), MemoryCheckpoint(plan.target)
    for worker in range(workers):
        execute(plan, reader, writer, shard=(worker, workers), dtype=dtype)
    writer.commit({})
    return writer.state()


def grown_model(plan: GrowthPlan, model: torch.nn.Module) -> torch.nn.Module:
    """The open_clip model that the plan makes of an open_clip model, in its dtype."""
    state = {name: value.detach() for name, value in model.state_dict().items()}
    grown = open_clip_model(plan.target.config).to(next(model.parameters()).dtype)
    grown.load_state_dict(fuse_state(plan.target, carried_out(plan, split_state(plan.source, state))), strict=True)
    return grown


def features(model: torch.nn.Module, seed: int = 1, batch: int = 8) -> dict[str, torch.Tensor]:
    """Un-normalised features of a random probe batch, by tower."""
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    size = model.visual.image_size[0]
    images = torch.randn(batch, 3, size, size, generator=generator).to(dtype)
    with torch.no_grad():
        found = {"image": model.visual(images)}
        if hasattr(model, "encode_text"):
            words = torch.randint(1, model.vocab_size - 1, (batch, model.context_length), generator=generator)
            words[:, -2] = model.vocab_size - 1  # the end of the text
            found["text"] = model.encode_text(words)
    return found


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """|found - wanted| / |wanted| over the whole batch."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())
