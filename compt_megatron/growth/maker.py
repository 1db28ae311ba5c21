"""Makes slices of target tensors from slices of source tensors, with bytes that no layout and no slicing changes.

Arithmetic is in fp64, in small blocks that stay in the processor's cache, and rounded to the stored dtype at the end.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from math import prod

import torch

from compt_megatron.checkpoint.contract import (
    Region,
    TensorInfo,
    dtype_name,
    region_shape,
    slabs,
    split_name,
    whole,
)
from compt_megatron.errors import UserError
from compt_megatron.growth.means import sums, tree_sum
from compt_megatron.growth.plan import (
    Copy,
    GrowthPlan,
    Level,
    Part,
    Random,
    Reduce,
    TensorPlan,
    pair_signs,
)
from compt_megatron.growth.vectors import Vectors
from compt_megatron.spec.random import initial
from compt_megatron.spec.table import Param

Read = Callable[[str, Region], torch.Tensor]  # (source boundary name, region) -> CPU tensor of the stored dtype

_BLOCK = 2**17  # elements that are computed at a time
_NARROW = (torch.bfloat16, torch.float16, torch.float32)
_KEPT = 8  # means that are remembered: neighbouring slabs share them


class Maker:
    """Makes any slice of any target tensor, by boundary names."""

    def __init__(self, plan: GrowthPlan, read: Read, threads: int = 1) -> None:
        """`threads` make fresh values, which take much longer than everything else."""
        self._plan, self._reader = plan, read
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, "fresh") if threads > 1 else None
        self._tensors = {f"{prefix}/{name}": tensor for prefix, name, tensor in plan.boundary()}
        self._prefix = "weight"
        self._means: OrderedDict[object, torch.Tensor] = OrderedDict()
        self._vectors = Vectors(read)
        self._scratch = torch.empty(2, _BLOCK, dtype=torch.float64)

    def make(self, name: str, region: Region | None = None, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Box `region` (all, if None) of target tensor `name` in `dtype`. Raises UserError if a value is not finite."""
        made = self._make(name, region, dtype)
        if made.numel() and not all(bound.isfinite() for bound in torch.aminmax(made)):
            raise UserError(
                f"{name}: has values that are not finite in {dtype_name(dtype)}; the source has such values, or larger "
                "ones than this dtype holds"
            )
        return made

    def _make(self, name: str, region: Region | None, dtype: torch.dtype) -> torch.Tensor:
        tensor, self._prefix = self._tensors[name], split_name(name)[0]
        region = whole(tensor.shape) if region is None else region
        met = list(meetings(tensor, region))
        sources = _Sources(self._read, met)
        part, inside, _ = met[0]
        if len(met) == 1 and isinstance(part.piece, Copy) and _is_plain(part.piece):
            return sources.read(part, inside).to(dtype)
        out = torch.empty(region_shape(region), dtype=dtype)
        for part, inside, into in met:
            self._fill(out[into], tensor, part, inside, sources)
        return out

    def _read(self, source: str, region: Region) -> torch.Tensor:
        return self._reader(f"{self._prefix}/{source}", region)

    def _fill(self, out: torch.Tensor, tensor: TensorPlan, part: Part, inside: Region, sources: _Sources) -> None:
        """Fill `out` with the values of the target region `inside`, which lies in the part's box."""
        piece, param = part.piece, self._plan.target.params.get(tensor.name)
        if isinstance(piece, Copy):
            values = sources.read(part, inside)
            if _is_plain(piece):
                out.copy_(values)
            elif piece.noise is None:
                self._scale(out, values, piece.scale)
            else:
                assert param is not None
                fresh = self._fresh(param, source_region(part, piece.noise.start, inside))
                self._scale(out, values, piece.scale, fresh, piece.noise.scale)
        elif isinstance(piece, Reduce):
            self._reduce(out, part, piece, inside)
        elif isinstance(piece, Level):
            out.fill_(self._vectors.level(self._prefix, piece.source, piece.size)[1])
        elif isinstance(piece, Random):
            assert param is not None
            fresh = self._fresh(param, inside)
            if piece.scale == 1.0:
                out.copy_(fresh)
            else:
                self._scale(out, fresh, piece.scale)
        elif piece.contrast is None:
            out.fill_(piece.value)
        else:
            out.copy_(piece.value / (self._vectors.contrast(self._prefix, piece.contrast)[1] * _signs(part, 0, inside)))

    def _fresh(self, param: Param, region: Region) -> torch.Tensor:
        """A parameter's fresh values in a region, fp32."""
        step = -(-(region[0].stop - region[0].start) // self._threads) if region else 0
        if self._pool is None or step < 1 or _size(region) < _BLOCK:
            return initial(param, self._plan.seed, region)
        out = torch.empty(region_shape(region))

        def work(start: int) -> None:
            rows = slice(start, min(start + step, region[0].stop))
            values = initial(param, self._plan.seed, (rows, *region[1:]))
            out[rows.start - region[0].start : rows.stop - region[0].start] = values

        list(self._pool.map(work, range(region[0].start, region[0].stop, step)))
        return out

    def _scale(
        self,
        out: torch.Tensor,
        values: torch.Tensor,
        scale: float,
        noise: torch.Tensor | None = None,
        noise_scale: float = 0.0,
    ) -> None:
        """out = scale * values + noise_scale * noise."""
        if noise is None and _is_single(scale, values.dtype) and out.dtype == values.dtype:
            torch.mul(values, scale, out=out)
            return
        for block in _blocks(out.shape):
            part = values[block]
            wide = self._scratch[0, : part.numel()].view(part.shape)
            wide.copy_(part)
            if scale != 1.0:
                wide.mul_(scale)
            if noise is not None:
                more = self._scratch[1, : part.numel()].view(part.shape)
                wide.add_(more.copy_(noise[block]).mul_(noise_scale))
            out[block].copy_(wide)

    def _reduce(self, out: torch.Tensor, part: Part, piece: Reduce, inside: Region) -> None:
        mean, contrast = self._mean(piece, _reduced(part, piece, inside))
        if piece.contrast is None:
            out.copy_(piece.scale * mean)
            return
        shape = [1] * len(inside)
        shape[piece.dim] = -1
        signs = _signs(part, piece.dim, inside).reshape(shape)
        contrast = self._vectors.contrast(self._prefix, piece.contrast)[1] * contrast
        mean, contrast, signs = (each.expand(out.shape) for each in (mean, contrast, signs))
        for block in _blocks(out.shape):
            out[block].copy_(piece.scale * (mean[block] + signs[block] * contrast[block]))

    def _mean(self, piece: Reduce, region: Region) -> torch.Tensor:
        """[2, ...]: mean and contrast of a source region along `piece.dim` (of size 1 here), in fp64."""
        key = (self._prefix, piece, tuple((side.start, side.stop) for side in region))
        if key not in self._means:
            weights = torch.zeros(piece.size, dtype=torch.float64)
            if piece.contrast is not None:
                weights = self._vectors.contrast(self._prefix, piece.contrast)[0] / piece.size
            elif piece.weights is not None:
                weights = self._vectors.level(self._prefix, piece.weights, piece.size)[0]
            found = sums(lambda box: self._read(piece.source, box), region, piece.dim, weights)
            if piece.weights is not None:
                found[0] = found[1]
            found[0] /= piece.size
            if piece.across is not None:
                dim, size = piece.across
                found = tree_sum(found, 1 + dim) / size
            self._means[key] = found
            if len(self._means) > _KEPT:
                self._means.popitem(last=False)
        return self._means[key]


# a part, and where it meets a region of the target: in the target's coordinates, and in the region's own
Meeting = tuple[Part, Region, Region]


def needs(tensor: TensorPlan, region: Region) -> Iterator[tuple[str, Region]]:
    """The boxes of source tensors that are read to make a region of a target tensor."""
    met = list(meetings(tensor, region))
    yield from _Sources(lambda name, box: torch.empty(0), met).boxes()
    for part, inside, _ in met:
        if isinstance(part.piece, Reduce):
            yield part.piece.source, _reduced(part, part.piece, inside)
            if part.piece.weights is not None:
                yield part.piece.weights, (slice(0, part.piece.size),)
        if isinstance(part.piece, Level):
            yield part.piece.source, (slice(0, part.piece.size),)
        contrast = getattr(part.piece, "contrast", None)
        if contrast is not None:
            yield contrast.gamma, (slice(0, contrast.size),)


def _reduced(part: Part, piece: Reduce, inside: Region) -> Region:
    """The source region whose means a target region shows."""
    region = list(source_region(part, piece.start, inside))
    region[piece.dim] = slice(0, piece.size)
    if piece.across is not None:
        region[piece.across[0]] = slice(0, piece.across[1])
    return tuple(region)


class _Sources:
    """Reads what the copies of one slab need. Where they tile one box of a source, that box is read once."""

    def __init__(self, read: Read, met: list[Meeting]) -> None:
        self._read = read
        self._needs: dict[str, list[Region]] = {}
        for part, inside, _ in met:
            if isinstance(part.piece, Copy):
                self._needs.setdefault(part.piece.source, []).append(source_region(part, part.piece.start, inside))
        hulls = {name: _hull(regions) for name, regions in self._needs.items() if len(regions) > 1}
        self._hulls = {name: box for name, box in hulls.items() if _size(box) <= sum(map(_size, self._needs[name]))}
        self._values: dict[str, torch.Tensor] = {}

    def boxes(self) -> Iterator[tuple[str, Region]]:
        """All that will be read."""
        for name, regions in self._needs.items():
            yield from ((name, box) for box in ([self._hulls[name]] if name in self._hulls else regions))

    def read(self, part: Part, inside: Region) -> torch.Tensor:
        piece = part.piece
        assert isinstance(piece, Copy)
        region = source_region(part, piece.start, inside)
        box = self._hulls.get(piece.source)
        if box is None:
            return self._read(piece.source, region)
        if piece.source not in self._values:
            self._values[piece.source] = self._read(piece.source, box)
        return self._values[piece.source][
            tuple(slice(own.start - all_.start, own.stop - all_.start) for own, all_ in zip(region, box, strict=True))
        ]


def _is_plain(piece: Copy) -> bool:
    return piece.scale == 1.0 and piece.noise is None


def _is_single(scale: float, dtype: torch.dtype) -> bool:
    """Whether torch's own product, made in fp32 and rounded, has the bytes of the one made in fp64 and rounded: the
    product of two numbers of 24 bits is exact in fp64, so that both round the same number."""
    return dtype in _NARROW and float(torch.tensor(scale, dtype=torch.float32)) == scale


def _hull(regions: list[Region]) -> Region:
    return tuple(slice(min(s.start for s in sides), max(s.stop for s in sides)) for sides in zip(*regions, strict=True))


def _size(region: Region) -> int:
    return prod(region_shape(region))


def _blocks(shape: torch.Size) -> Iterator[Region]:
    """Boxes of at most _BLOCK elements that tile a shape."""
    return slabs(TensorInfo(tuple(shape), torch.uint8), _BLOCK)


def meetings(tensor: TensorPlan, region: Region) -> Iterator[Meeting]:
    """The parts of a target tensor that meet a region of it."""
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


def source_region(part: Part, start: tuple[int, ...], inside: Region) -> Region:
    """Where the target region `inside` of a part lies in the source tensor, the part's box beginning at `start`."""
    return tuple(
        slice(first + side.start - low, first + side.stop - low)
        for first, side, (low, _) in zip(start, inside, part.box, strict=True)
    )


def _signs(part: Part, dim: int, inside: Region) -> torch.Tensor:
    """The pair signs of the rows `inside`, along `dim` of the part's box."""
    low, high = part.box[dim]
    signs = pair_signs(high - low)[inside[dim].start - low : inside[dim].stop - low]
    return torch.tensor(signs, dtype=torch.float64)
