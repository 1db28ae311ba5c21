"""Under which names a training module holds the parameters of the table.

A DeepSpeed folder has the names of its user's module. Three kinds are known: open_clip's (its `CLIP`'s or its
`CustomTextCLIP`'s), transformers', and those of this project's own (megatron-core's) modules; each may stand behind a
prefix (`module.`, `model.`, ...). `trainer_names` are those that a user's trainer has, `find_names` recognises the kind
from the names that are stored.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch

from compt_megatron.checkpoint.contract import Region, region_shape
from compt_megatron.errors import Defects
from compt_megatron.spec.huggingface_names import hf_place, hf_shapes
from compt_megatron.spec.megatron_names import Rows, megatron_place
from compt_megatron.spec.open_clip_names import open_clip_place, open_clip_shapes, with_custom_text
from compt_megatron.spec.table import ModelSpec

_PROJECTIONS = "projections.layers."  # the parameters beside the model in this project's training module: align/


@dataclass(frozen=True)
class ModulePlace:
    """Where a parameter lies: in the module's tensor `key`, as `rows` along its dimension `dim`; `transposed`: as the
    transpose of the parameter. A 0-D parameter is all of a tensor that may have one dimension."""

    key: str
    dim: int
    rows: Rows
    transposed: bool = False

    def boxes(self, region: Region) -> Iterator[tuple[Region, Region]]:
        """The boxes of the module's tensor that hold a region of the parameter, and where each one's values belong in a
        tensor of the region's shape (of its transpose if `transposed`)."""
        turned = region[::-1] if self.transposed else region
        if not turned:
            yield (), ()
            return
        asked = turned[self.dim]
        for run in self.rows.runs(asked.start, asked.stop):
            stored, inside = list(turned), [slice(0, part.stop - part.start) for part in turned]
            stored[self.dim] = slice(run.at, run.at + run.stop - run.start)
            inside[self.dim] = slice(run.start - asked.start, run.stop - asked.start)
            yield tuple(stored), tuple(inside)

    def read(self, region: Region, dtype: torch.dtype, read: Callable[[Region], torch.Tensor]) -> torch.Tensor:
        """A region of the parameter; `read` gives boxes of the module's tensor."""
        boxes = list(self.boxes(region))
        if len(boxes) == 1 and not self.transposed:
            return read(boxes[0][0]).to(dtype)
        out = torch.empty(region_shape(region[::-1] if self.transposed else region), dtype=dtype)
        for stored, inside in boxes:
            out[inside] = read(stored)
        return out.t().contiguous() if self.transposed else out


@dataclass(frozen=True)
class ModuleNames:
    """The names of one kind of module. `places`: canonical name -> place; `shapes`: key -> shape of the module's
    tensor, in the order of the model; `prefix` stands before every key where it is stored."""

    kind: str
    places: dict[str, ModulePlace]
    shapes: dict[str, tuple[int, ...]]
    prefix: str = ""

    def stored(self, key: str) -> str:
        return self.prefix + key


def trainer_names(spec: ModelSpec) -> ModuleNames:
    """The names in a user's own trainer: open_clip's for CLIP and ViT, transformers' for language models."""
    return _transformers(spec) if spec.is_language_model else _open_clip(spec)


def find_names(
    path: Path, spec: ModelSpec, stored: Mapping[str, tuple[int, ...] | None]
) -> tuple[ModuleNames, list[str]]:
    """The names under which a checkpoint at `path` holds the parameters of `spec`, and notes on what else it holds.

    `stored`: the shape of everything in it by name (flattened ones are taken as well), or None where it need not be
    checked. Raises Defects if it holds another model.
    """
    names = _best(path, spec, stored)
    wrong = [
        f"'{names.stored(key)}' has shape {found}, the model needs {shape}"
        for key, shape in names.shapes.items()
        if (found := stored[names.stored(key)]) not in (None, shape, (prod(shape),))
    ]
    known = {names.stored(key) for key in names.shapes}
    others = [name for name in stored if name not in known and projection(name) is None]
    wrong += [f"it also has '{name}'" for name in others if name.startswith(names.prefix)]
    if wrong:
        another = f"{path}: checkpoint of another model than '{spec.name}'"
        raise Defects([f"{another}: {line}; name the right model config with --from" for line in wrong])
    beside = f"left out: {len(others)} parameters beside the model, such as '{others[0]}'" if others else ""
    return names, [beside] if beside else []


def projection(stored: str) -> str | None:
    """`image.weight` for a projection of the alignment, stored beside the model; None for anything else."""
    name = stored.removeprefix("module.")
    return name.removeprefix(_PROJECTIONS) if name.startswith(_PROJECTIONS) else None


def projection_key(name: str) -> str:
    """The inverse of `projection`."""
    return _PROJECTIONS + name


def _best(path: Path, spec: ModelSpec, stored: Collection[str]) -> ModuleNames:
    nearest = (-1, [""])  # how many keys are there, which ones are not
    custom = bool(spec.config.get("custom_text"))
    others = [_open_clip(with_custom_text(spec, not custom))] if spec.family == "clip" else []
    for names in (trainer_names(spec), *others, _megatron(spec)):
        for prefix in _prefixes(names, stored):
            missing = [key for key in names.shapes if prefix + key not in stored]
            if not missing:
                return replace(names, prefix=prefix)
            nearest = max(nearest, (len(names.shapes) - len(missing), [prefix + key for key in missing]))
    another = f"{path}: checkpoint of another model than '{spec.name}', or of a module with other names"
    raise Defects([f"{another}: it has no '{key}'; name the right model config with --from" for key in nearest[1]])


def _prefixes(names: ModuleNames, stored: Collection[str]) -> list[str]:
    """What stands before the model's first key in `stored`, the shortest first; the empty prefix is always tried."""
    first = next(iter(names.shapes))
    found = {name.removesuffix(first) for name in stored if name.endswith(f".{first}")}
    return ["", *sorted(found, key=len)]


def _open_clip(spec: ModelSpec) -> ModuleNames:
    places = {}
    for name in spec.params:
        found = open_clip_place(spec, name)
        places[name] = ModulePlace(found.key, 0, Rows(found.rows or 1, found.rows or 1, found.start))
    return ModuleNames("open_clip", places, open_clip_shapes(spec))


def _transformers(spec: ModelSpec) -> ModuleNames:
    places = {}
    for name, param in spec.params.items():
        found, last = hf_place(spec, name), param.shape[-1]
        places[name] = ModulePlace(found.key, len(param.shape) - 1, Rows(last, last, found.start))
    return ModuleNames("transformers", places, hf_shapes(spec))


def _megatron(spec: ModelSpec) -> ModuleNames:
    found = {name: megatron_place(spec, name) for name in spec.params}
    places = {name: ModulePlace(place.module, 0, place.rows, place.transposed) for name, place in found.items()}
    return ModuleNames("megatron", places, {place.module: place.shape for place in found.values()})
