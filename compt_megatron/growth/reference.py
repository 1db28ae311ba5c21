"""Operator `reference`: bit for bit what the published code of CoM-PT (arXiv 2604.12391) does, for comparison.

On the state dicts of open_clip's CLIP, for every source tensor: 1-D and 2-D values go to the leading corner of the
target tensor of the same name, 4-D ones along the first axis, 3-D ones are skipped, 0-D ones copied. That includes the
*fused* in-projection [3d, d]: its leading 3n rows lie in the target's first 3n, so the teacher's K rows land among the
student's Q rows and its V rows among Q and K. Where the visual depth doubles, and depth "interleave" is asked for,
visual layer l goes to layers 2l and 2l + 1; all other layers go to the layer of the same name. The rest is a fresh
model. Not exact. Refused: other depth ratios, other families, other axis modes.
"""

from __future__ import annotations

from collections.abc import Iterator

from compt_megatron.errors import UserError
from compt_megatron.growth.plan import Box, Copy, Exactness, GrowthPlan, Part, Random, TensorPlan
from compt_megatron.growth.request import Request
from compt_megatron.spec.open_clip_names import fused_place
from compt_megatron.spec.table import ModelSpec, Param


class ReferenceOperator:
    """The published rule; see the module's docstring."""

    name = "reference"

    def plan(self, request: Request) -> GrowthPlan:
        source, target = request.source, request.target
        _check(request)
        names = _FileIndex(source)
        tensors = {name: self._tensor(request, names, param) for name, param in target.params.items()}
        return GrowthPlan(
            source=source,
            target=target,
            operator=self.name,
            axes={},
            depth=request.depth or "by_name",
            seed=request.seed,
            allow_approximate=request.allow_approximate,
            tensors=tensors,
        )

    def _tensor(self, request: Request, names: _FileIndex, param: Param) -> TensorPlan:
        place = fused_place(request.target, param.name)
        key = self._source_key(request, param, place.key)
        copies = [] if key is None else list(names.corner(key, place.start, param.shape))
        boxes = [part.box for part in copies]
        fresh = [Part(box, Random()) for box in uncovered(param.shape, boxes)]
        plain = not fresh and [part.piece for part in copies] == [Copy(param.name, (0,) * len(param.shape))]
        exactness: Exactness = "exact" if plain else "approximate" if copies else "new"
        return TensorPlan(param.name, param.shape, exactness, (*copies, *fresh))

    def _source_key(self, request: Request, param: Param, key: str) -> str | None:
        """The source's file key that a target's file key takes its values from."""
        old, new = (spec.towers["vision"] for spec in (request.source, request.target))
        if request.depth == "interleave" and param.tower == "vision" and param.layer is not None:
            layer = param.layer * old.layers // new.layers
            return key.replace(f"{new.block_prefix}.{param.layer}.", f"{old.block_prefix}.{layer}.", 1)
        layers = request.source.towers[param.tower].layers if param.layer is not None else 0
        return key if param.layer is None or param.layer < layers else None


class _FileIndex:
    """Which canonical parameters the rows of the source's open_clip tensors are."""

    def __init__(self, spec: ModelSpec) -> None:
        self.rows: dict[str, list[tuple[int, str, Param]]] = {}
        for name, param in spec.params.items():
            place = fused_place(spec, name)
            self.rows.setdefault(place.key, []).append((place.start, name, param))

    def corner(self, key: str, start: int, shape: tuple[int, ...]) -> Iterator[Part]:
        """What the leading corner puts into the target rows from `start` on: boxes of a parameter of `shape`."""
        if len(shape) == 3:
            return
        for first, name, param in self.rows[key]:
            if not shape:
                yield Part((), Copy(name, ()))
                continue
            low, high = max(first, start), min(first + param.shape[0], start + shape[0])
            if low < high:
                box: Box = ((low - start, high - start), *((0, size) for size in param.shape[1:]))
                yield Part(box, Copy(name, (low - first, *(0,) * (len(shape) - 1))))


def uncovered(shape: tuple[int, ...], boxes: list[Box]) -> list[Box]:
    """Boxes that cover what `boxes` leave of a tensor; these follow one another along dimension 0 from 0 on and have
    the same leading extent in the other dimensions."""
    if not boxes:
        return [tuple((0, size) for size in shape)]
    rows, inner = max(box[0][1] for box in boxes) if shape else 0, boxes[0][1:]
    left: list[Box] = []
    for dim, ((_, stop), size) in enumerate(zip(inner, shape[1:], strict=True) if shape else []):
        if stop < size:
            left.append(((0, rows), *inner[:dim], (stop, size), *((0, s) for s in shape[2 + dim :])))
    if shape and rows < shape[0]:
        left.append(((rows, shape[0]), *((0, size) for size in shape[1:])))
    return left


def _check(request: Request) -> None:
    source, target = request.source, request.target
    pair = f"{source.name} -> {target.name}: operator 'reference'"
    if source.family != "clip":
        raise UserError(f"{pair} is the published code for CLIP models, not for family {source.family!r}; use 'corner'")
    if request.moments != "fresh":
        raise UserError(f"{pair} has no rule for optimizer state; use --moments fresh")
    if request.axes:
        raise UserError(f"{pair} has one rule for every axis; leave --set {next(iter(request.axes))}=... out")
    if request.depth not in (None, "by_name", "interleave"):
        raise UserError(f"{pair} knows only depth 'interleave' (or none), not {request.depth!r}")
    for name, tower in target.towers.items():
        old = source.towers[name].layers
        if tower.layers not in (old, 2 * old):
            raise UserError(
                f"{pair} keeps or doubles the depth, the {name} tower goes from {old} to {tower.layers} layers"
            )
