"""Carries a plan out: makes target slices from source slices, streaming, with bytes that no layout changes.

Arithmetic is in fp64 and rounded to the stored dtype at the end; means are sums in a fixed pairwise order over the
whole axis, made of element-wise additions only (the order of `torch.sum` depends on shape and strides).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from math import prod, sqrt

import torch

from compt_megatron.checkpoint.contract import (
    Reader,
    Region,
    TensorInfo,
    Writer,
    region_shape,
    slabs,
    split_name,
    whole,
)
from compt_megatron.errors import UserError
from compt_megatron.growth.plan import (
    Constant,
    Contrast,
    Copy,
    GrowthPlan,
    Part,
    Piece,
    Random,
    Reduce,
    TensorPlan,
    pair_signs,
)
from compt_megatron.spec.random import initial

Read = Callable[[str, Region], torch.Tensor]  # (source boundary name, region) -> CPU tensor of the stored dtype

SLAB_BYTES = 32 << 20  # one written piece; a worker holds a few of these in fp64 at a time


def execute(
    plan: GrowthPlan,
    reader: Reader,
    writer: Writer,
    *,
    shard: tuple[int, int] = (0, 1),
    dtype: torch.dtype | None = None,
) -> None:
    """Write the target's tensors under their boundary names, this worker its share of them.

    `shard`: (index, number of workers); tensors are dealt by size, and each is written in slabs of at most 32 MB.
    `dtype`: of all target tensors (None: as the source stores what they are made from). Declares all tensors in every
    worker and does not commit. Raises UserError if the source lacks a tensor or holds another shape.
    """
    check_source(plan, reader.tensors())
    infos = target_infos(plan, reader.tensors(), dtype)
    writer.declare(infos)
    maker = Maker(plan, reader.read)
    for name in deal(infos, shard[1])[shard[0]]:
        for region in slabs(infos[name], SLAB_BYTES):
            offsets = tuple(part.start for part in region)
            writer.write(name, offsets, maker.make(name, region, infos[name].dtype))


def check_source(plan: GrowthPlan, tensors: dict[str, TensorInfo]) -> None:
    """Raise UserError unless the checkpoint holds every tensor the plan reads, in the source model's shape."""
    for prefix, name in {(prefix, source) for prefix, _, tensor in plan.boundary() for source in tensor.sources()}:
        found = tensors.get(f"{prefix}/{name}")
        if found is None:
            raise UserError(
                f"the source checkpoint has no {name} ({prefix}), which model {plan.source.name} has; name its model "
                "with --from"
            )
        if prefix != "step" and tuple(found.shape) != plan.source.params[name].shape:
            raise UserError(
                f"the source checkpoint's {name} is {list(found.shape)}, {plan.source.name} says "
                f"{list(plan.source.params[name].shape)}; name its model with --from"
            )


def target_infos(plan: GrowthPlan, tensors: dict[str, TensorInfo], dtype: torch.dtype | None) -> dict[str, TensorInfo]:
    """Shape and dtype of every target tensor by its boundary name; `dtype` is for weights.

    Wholly new weights have the dtype that most of the source has, wholly new state that of the source's own.
    """
    sizes: Counter[torch.dtype] = Counter()
    for name in plan.source.params:
        if (info := tensors.get(f"weight/{name}")) is not None:
            sizes[info.dtype] += prod(info.shape)
    common = max(sizes, key=lambda key: sizes[key]) if sizes else torch.float32
    infos = {}
    for prefix, name, tensor in plan.boundary():
        first = next(tensor.sources(), None)
        if dtype is not None and prefix == "weight":
            own = dtype
        elif first is not None:
            own = tensors[f"{prefix}/{first}"].dtype
        else:
            own = common if prefix == "weight" else torch.float32
        infos[f"{prefix}/{name}"] = TensorInfo(tensor.shape, own)
    return infos


def deal(infos: dict[str, TensorInfo], workers: int) -> list[list[str]]:
    """Tensor names of each worker: the largest first, each to the worker that has least so far."""
    shares: list[list[str]] = [[] for _ in range(workers)]
    loads = [0] * workers
    for name in sorted(infos, key=lambda name: (-infos[name].nbytes, name)):
        least = loads.index(min(loads))
        shares[least].append(name)
        loads[least] += infos[name].nbytes
    return shares


class Maker:
    """Makes any slice of any target tensor, by boundary names. Keeps the last means, which neighbouring slabs share."""

    def __init__(self, plan: GrowthPlan, read: Read) -> None:
        self._plan, self._reader = plan, read
        self._tensors = {f"{prefix}/{name}": tensor for prefix, name, tensor in plan.boundary()}
        self._prefix = "weight"
        self._kept: tuple[object, torch.Tensor] | None = None

    def _read(self, source: str, region: Region) -> torch.Tensor:
        return self._reader(f"{self._prefix}/{source}", region)

    def make(self, name: str, region: Region | None = None, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Box `region` (all, if None) of target tensor `name` in `dtype`."""
        tensor, self._prefix = self._tensors[name], split_name(name)[0]
        region = whole(tensor.shape) if region is None else region
        out = torch.empty(region_shape(region), dtype=dtype)
        for part, inside, into in _meetings(tensor, region):
            out[into] = self._piece(tensor, part, inside).to(dtype)
        return out

    def _piece(self, tensor: TensorPlan, part: Part, inside: Region) -> torch.Tensor:
        """The values of the target region `inside`, which lies in the part's box."""
        piece: Piece = part.piece
        if isinstance(piece, Copy):
            value = self._read(piece.source, _source_region(part, piece.start, inside))
            value = value if piece.scale == 1.0 else value.double() * piece.scale
            if piece.noise is not None:
                param = self._plan.target.params[tensor.name]
                fresh = initial(param, self._plan.seed, _source_region(part, piece.noise.start, inside))
                value = value.double() + piece.noise.scale * fresh.double()
            return value
        if isinstance(piece, Reduce):
            return self._reduce(part, piece, inside)
        if isinstance(piece, Random):
            value = initial(self._plan.target.params[tensor.name], self._plan.seed, inside)
            return value if piece.scale == 1.0 else value.double() * piece.scale
        assert isinstance(piece, Constant)
        value = torch.full(region_shape(inside), piece.value, dtype=torch.float64)
        return value / (self._kappa(piece.contrast) * _signs(part, 0, inside)) if piece.contrast else value

    def _reduce(self, part: Part, piece: Reduce, inside: Region) -> torch.Tensor:
        region = list(_source_region(part, piece.start, inside))
        region[piece.dim] = slice(0, piece.size)
        if piece.across is not None:
            region[piece.across[0]] = slice(0, piece.across[1])
        key = (self._prefix, piece, tuple((side.start, side.stop) for side in region))
        if self._kept is None or self._kept[0] != key:
            self._kept = (key, self._means(piece, tuple(region)))
        mean, contrast = self._kept[1]
        if piece.contrast is not None:
            shape = [1] * len(region)
            shape[piece.dim] = -1
            mean = mean + _signs(part, piece.dim, inside).reshape(shape) * (self._kappa(piece.contrast) * contrast)
        return (piece.scale * mean).expand(region_shape(inside))

    def _means(self, piece: Reduce, region: Region) -> torch.Tensor:
        """[2, ...]: mean and contrast along `piece.dim` (of size 1 here), in fp64."""
        weights = self._deviations(piece.contrast) / piece.size if piece.contrast else None
        pieces = []
        for block in _blocks(region, piece.dim):
            rows = self._read(piece.source, block).double()
            mean = tree_sum(rows, piece.dim) / piece.size
            contrast = torch.zeros_like(mean)
            if weights is not None:
                shape = [1] * rows.dim()
                shape[piece.dim] = -1
                contrast = tree_sum(rows * weights.reshape(shape), piece.dim)
            pieces.append(torch.stack([mean, contrast]))
        found = torch.cat(pieces, dim=1 + _block_dim(region, piece.dim)) if len(pieces) > 1 else pieces[0]
        if piece.across is None:
            return found
        dim, size = piece.across
        return tree_sum(found, 1 + dim) / size

    def _deviations(self, contrast: Contrast) -> torch.Tensor:
        """gamma - mean(gamma), in fp64."""
        gamma = self._read(contrast.gamma, (slice(0, contrast.size),)).double()
        return gamma - tree_sum(gamma, 0) / contrast.size

    def _kappa(self, contrast: Contrast) -> float:
        std = sqrt(tree_sum(self._deviations(contrast).square(), 0).item() / contrast.size)
        return min(contrast.ceiling, contrast.ratio / std) if std > 0 else contrast.ceiling


def tree_sum(values: torch.Tensor, dim: int) -> torch.Tensor:
    """Sum along `dim` (kept, of size 1): halves are added to each other until one row is left."""
    while (size := values.shape[dim]) > 1:
        half = size // 2
        total = values.narrow(dim, 0, half) + values.narrow(dim, half, half)
        values = torch.cat([total, values.narrow(dim, 2 * half, 1)], dim) if size % 2 else total
    return values


def _meetings(tensor: TensorPlan, region: Region) -> Iterator[tuple[Part, Region, Region]]:
    """Parts that meet `region`: the part, the meeting in target coordinates, and in those of the region."""
    for part in tensor.parts:
        bounds = [
            (max(low, side.start), min(high, side.stop)) for (low, high), side in zip(part.box, region, strict=True)
        ]
        if all(low < high for low, high in bounds):
            inside = tuple(slice(low, high) for low, high in bounds)
            into = tuple(
                slice(low - side.start, high - side.start) for (low, high), side in zip(bounds, region, strict=True)
            )
            yield part, inside, into


def _source_region(part: Part, start: tuple[int, ...], inside: Region) -> Region:
    return tuple(
        slice(first + side.start - low, first + side.stop - low)
        for first, side, (low, _) in zip(start, inside, part.box, strict=True)
    )


def _signs(part: Part, dim: int, inside: Region) -> torch.Tensor:
    """The pair signs of the rows `inside`, along `dim` of the part's box."""
    low, high = part.box[dim]
    signs = pair_signs(high - low)[inside[dim].start - low : inside[dim].stop - low]
    return torch.tensor(signs, dtype=torch.float64)


def _block_dim(region: Region, dim: int) -> int:
    """The longest dimension other than `dim`, along which a reduction is cut into blocks."""
    others = [index for index in range(len(region)) if index != dim]
    return max(others, key=lambda index: region[index].stop - region[index].start, default=dim)


def _blocks(region: Region, dim: int) -> Iterator[Region]:
    """Cut a region that is reduced along `dim` so that a block of it in fp64 is about a slab."""
    cut = _block_dim(region, dim)
    if cut == dim:
        yield region
        return
    sizes = region_shape(region)
    step = max(SLAB_BYTES * sizes[cut] // (8 * prod(sizes)), 1)
    for start in range(region[cut].start, region[cut].stop, step):
        stop = min(start + step, region[cut].stop)
        yield (*region[:cut], slice(start, stop), *region[cut + 1 :])
