"""How open_clip's files name and fuse the parameters of the table: q, k and v are rows of one in-projection.

The table has the names of open_clip's `CLIP`. Where the config says `custom_text`, open_clip makes a `CustomTextCLIP`
of the same towers, whose text tower's names begin with `text.`: in files, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from compt_megatron.spec.table import ModelSpec

_PARTS = ("q", "k", "v")
_CUSTOM = "text."
_FIRST = "positional_embedding"  # of the text tower: a name that every model of the kind has


@dataclass(frozen=True)
class FilePlace:
    """Where a parameter lies in an open_clip file: rows [start, start + rows) of tensor `key` (all of it if 0-D)."""

    key: str
    start: int
    rows: int | None


def open_clip_place(spec: ModelSpec, name: str) -> FilePlace:
    """The place of canonical parameter `name` in an open_clip state dict of the same model."""
    found = fused_place(spec, name)
    if spec.config.get("custom_text") and spec.params[name].tower == "text":
        return replace(found, key=_CUSTOM + found.key)
    return found


def fused_place(spec: ModelSpec, name: str) -> FilePlace:
    """The place of canonical parameter `name` in the state dict of open_clip's `CLIP`, whatever the config says."""
    shape = spec.params[name].shape
    for index, part in enumerate(_PARTS):
        for leaf in ("weight", "bias"):
            suffix = f".attn.{part}_proj.{leaf}"
            if name.endswith(suffix):
                return FilePlace(name.removesuffix(suffix) + f".attn.in_proj_{leaf}", index * shape[0], shape[0])
    return FilePlace(name, 0, shape[0] if shape else None)


def open_clip_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Key -> shape of the open_clip state dict, in a stable order (that of the table)."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, param in spec.params.items():
        place = open_clip_place(spec, name)
        if place.rows is None:
            shapes[place.key] = ()
        else:
            rows = place.start + place.rows
            shapes[place.key] = (max(rows, shapes.get(place.key, (0,))[0]), *param.shape[1:])
    return shapes


def with_custom_text(spec: ModelSpec, custom: bool) -> ModelSpec:
    """The same model as open_clip's `CustomTextCLIP` or its `CLIP`. Only its config says which."""
    if bool(spec.config.get("custom_text")) == custom:
        return spec
    rest = {key: value for key, value in spec.config.items() if key != "custom_text"}
    return replace(spec, config={**rest, "custom_text": True} if custom else rest)


def named_as(spec: ModelSpec, keys: Collection[str]) -> ModelSpec:
    """The model `spec` as the names of a state dict have it: users force a `CustomTextCLIP` by a flag of open_clip's
    trainer that no config records."""
    if spec.family != "clip" or (_FIRST in keys) == (_CUSTOM + _FIRST in keys):
        return spec
    return with_custom_text(spec, _FIRST not in keys)
