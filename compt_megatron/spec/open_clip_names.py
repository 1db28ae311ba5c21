"""How open_clip's files name and fuse the parameters of the table: q, k and v are rows of one in-projection."""

from __future__ import annotations

from dataclasses import dataclass

from compt_megatron.spec.table import ModelSpec

_PARTS = ("q", "k", "v")


@dataclass(frozen=True)
class FilePlace:
    """Where a parameter lies in an open_clip file: rows [start, start + rows) of tensor `key` (all of it if 0-D)."""

    key: str
    start: int
    rows: int | None


def open_clip_place(spec: ModelSpec, name: str) -> FilePlace:
    """The place of canonical parameter `name` in an open_clip state dict of the same model."""
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
