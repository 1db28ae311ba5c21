"""What every checkpoint format promises: tensors by canonical name, read and written as boxes.

Names on this boundary are a prefix and a canonical name (that of the parameter table): `weight/visual.proj`,
`master/...` (the fp32 copy an optimizer steps), `exp_avg/...`, `exp_avg_sq/...`, `step/...` (0-D), `align/...` (the
projections), `rng/...`, `data/...`. A new format is one module that ends in a `Format`, and one entry in `formats.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from compt_megatron.spec.table import ModelSpec

PREFIXES = ("weight", "master", "exp_avg", "exp_avg_sq", "step", "align", "rng", "data")

# All-gathers one picklable object over the ranks that write together: the list is ordered by rank.
Exchange = Callable[[Any], list[Any]]

Region = tuple[slice, ...]  # one slice a dimension, start and stop explicit, step 1


class TensorInfo(NamedTuple):
    """The global shape and the stored dtype of one tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class Reader(Protocol):
    """An open checkpoint. Opening one never writes; a damaged file raises UserError before any of it is returned."""

    path: Path
    spec: ModelSpec | None

    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor of the checkpoint by its name on the boundary."""
        ...

    def read(self, name: str, region: Region | None = None) -> torch.Tensor:
        """A new CPU tensor with the values of a box (None: all of it), in the stored dtype."""
        ...

    def metadata(self) -> dict[str, Any]:
        """The content of compt.json, or what the format itself knows."""
        ...

    def close(self) -> None: ...


class Writer(Protocol):
    """A checkpoint being written. It exists under its name only after `commit`."""

    def declare(self, tensors: dict[str, TensorInfo]) -> None:
        """Name what will be written, before writing it; may be called again. Checks the free disk space.

        Where several ranks write together all of them must call it; what one rank declares counts for all.
        """
        ...

    def write(self, name: str, offsets: tuple[int, ...], tensor: torch.Tensor) -> None:
        """Write a box of a declared tensor, its first element at `offsets`. No element may be written twice."""
        ...

    def commit(self, metadata: dict[str, Any]) -> Path:
        """Make the checkpoint appear, whole; all ranks call it. `metadata` are the entries of compt.json."""
        ...

    def abort(self) -> None:
        """Remove what was written; the other ranks' next collective call raises. Harmless after a commit."""
        ...


class OpenReader(Protocol):
    def __call__(self, path: Path, spec: ModelSpec | None, trust_pickle: bool) -> Reader: ...


@dataclass(frozen=True)
class Layout:
    """How many model-parallel ranks a written checkpoint is laid out for."""

    tensor: int = 1
    pipeline: int = 1


@dataclass(frozen=True)
class Task:
    """What one rank is asked to write: a checkpoint of `spec` at `path`, together with the other ranks of `world`.

    `request`: what identifies the whole request, so that what a killed run of the same one left is continued (None:
    what is there is replaced).
    """

    path: Path
    spec: ModelSpec
    rank: int = 0
    world: int = 1
    exchange: Exchange | None = None
    overwrite: bool = False
    layout: Layout = Layout()
    request: str | None = None


class OpenWriter(Protocol):
    def __call__(self, task: Task) -> Writer: ...


@dataclass(frozen=True)
class Format:
    """One checkpoint format. `recognises` decides by content; without `open_writer` it is read only; `prefixes` are
    the kinds of tensors that it can hold; `attachments`: whether its folders hold other people's files too, such as a
    tokenizer's, which a reader and a writer pass on as the entry of that name in their metadata ({name: path});
    `layouts`: whether its files are cut for model-parallel ranks."""

    name: str
    recognises: Callable[[Path], bool]
    open_reader: OpenReader
    open_writer: OpenWriter | None
    prefixes: tuple[str, ...] = PREFIXES
    attachments: bool = False
    layouts: bool = False


def split_name(name: str) -> tuple[str, str]:
    """`weight/visual.proj` -> (`weight`, `visual.proj`)."""
    prefix, _, rest = name.partition("/")
    assert prefix in PREFIXES, f"{name!r} is no tensor name of a checkpoint: prefix/name expected"
    return prefix, rest


def whole(shape: tuple[int, ...]) -> Region:
    """The region that is all of a tensor."""
    return tuple(slice(0, size) for size in shape)


def checked_region(name: str, shape: tuple[int, ...], region: Region | None) -> Region:
    """`region`, or all of the tensor if None; asserts that it lies inside `shape` with explicit bounds and step 1."""
    if region is None:
        return whole(shape)
    assert len(region) == len(shape), f"{name}: region {region} of a tensor of shape {shape}"
    for part, size in zip(region, shape, strict=True):
        assert part.step in (None, 1), f"{name}: region {region} has steps"
        assert 0 <= part.start <= part.stop <= size, f"{name}: region {region} outside shape {shape}"
    return region


def region_shape(region: Region) -> tuple[int, ...]:
    return tuple(part.stop - part.start for part in region)


def slabs(info: TensorInfo, limit: int) -> Iterator[Region]:
    """Cut a tensor along its first dimensions into regions of at most `limit` bytes each, in the order of its bytes."""
    sizes = info.shape
    cut = 0  # the dimension that is cut; those before it are taken index by index
    while cut < len(sizes) - 1 and prod(sizes[cut + 1 :]) * info.dtype.itemsize > limit:
        cut += 1
    if not sizes:
        yield ()
        return
    rows = max(1, limit // max(1, prod(sizes[cut + 1 :]) * info.dtype.itemsize))
    for lead in product(*(range(size) for size in sizes[:cut])):
        for start in range(0, sizes[cut], rows):
            first = slice(start, min(start + rows, sizes[cut]))
            yield (*(slice(at, at + 1) for at in lead), first, *(slice(0, size) for size in sizes[cut + 1 :]))


def flat_boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[Region, slice]]:
    """Cut elements [start, stop) of a flattened tensor into boxes of the tensor, as ZeRO's flat partitions need.

    Yields each box and where its elements lie within the range; a matrix gives at most three boxes.
    """
    assert 0 <= start <= stop <= prod(shape), f"elements {start} to {stop} of shape {shape}"
    yield from _flat_boxes(shape, start, stop, 0)


def _flat_boxes(shape: tuple[int, ...], start: int, stop: int, at: int) -> Iterator[tuple[Region, slice]]:
    if stop <= start:
        return
    if not shape:
        yield (), slice(at, at + 1)
        return
    row = prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows
    if first > last:  # inside one row
        parts = _flat_boxes(shape[1:], start - last * row, stop - last * row, at)
        yield from (((slice(last, last + 1), *box), flat) for box, flat in parts)
        return
    for box, flat in _flat_boxes(shape[1:], row - (first * row - start), row if first * row > start else 0, at):
        yield (slice(first - 1, first), *box), flat
    at += first * row - start
    if last > first:
        yield (slice(first, last), *whole(shape[1:])), slice(at, at + (last - first) * row)
        at += (last - first) * row
    for box, flat in _flat_boxes(shape[1:], 0, stop - last * row, at):
        yield (slice(last, last + 1), *box), flat


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.bfloat16` -> `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """The inverse of `dtype_name`; raises ValueError for a name that torch does not know."""
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"unknown dtype {name!r}")
    return found
