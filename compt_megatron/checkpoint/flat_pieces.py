"""Parameters that lie in pieces of flat tensors, one piece a rank, as ZeRO leaves them; read by boxes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import ceil
from typing import Protocol

import torch

from compt_megatron.checkpoint.contract import Region, flat_boxes, region_shape
from compt_megatron.checkpoint.saved_archive import SavedArchive, StoredTensor
from compt_megatron.checkpoint.saved_tensor import strides
from compt_megatron.errors import UserError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """Elements [start, stop) of a parameter are those from `at` on of a stored tensor."""

    archive: SavedArchive
    tensor: StoredTensor
    start: int
    stop: int
    at: int

    def check(self) -> None:
        """Raise UserError unless the stored tensor holds them all."""
        if len(self.tensor.shape) != 1 or self.at + self.stop - self.start > self.tensor.room:
            raise UserError(
                f"{self.archive.path}: holds {self.tensor.numel} elements of a group where more are expected; use a "
                "checkpoint whose parameters and optimizer state are not offloaded to NVMe"
            )


class Pieces(Protocol):
    """All pieces of one parameter."""

    @property
    def dtype(self) -> torch.dtype: ...

    def meeting(self, low: int, high: int) -> Iterator[Piece]:
        """The pieces that hold any of the elements [low, high)."""
        ...


@dataclass(frozen=True)
class Parts:
    """Pieces that are listed."""

    pieces: tuple[Piece, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.pieces[0].tensor.dtype

    def meeting(self, low: int, high: int) -> Iterator[Piece]:
        return (piece for piece in self.pieces if piece.start < high and low < piece.stop)


@dataclass(frozen=True)
class Shares:
    """A parameter of `numel` elements that is cut into equal shares, one a rank, each at `at` of the rank's tensor.

    `stored`: each rank's tensor and the archive that it is in; it is the same list for all parameters of a group, since
    a thousand ranks times a thousand parameters would fill the memory.
    """

    stored: list[tuple[SavedArchive, StoredTensor]]
    at: int
    numel: int

    @property
    def share(self) -> int:
        return ceil(self.numel / len(self.stored))

    @property
    def dtype(self) -> torch.dtype:
        return self.stored[0][1].dtype

    def meeting(self, low: int, high: int) -> Iterator[Piece]:
        for rank in range(low // self.share, ceil(min(high, self.numel) / self.share)):
            archive, tensor = self.stored[rank]
            piece = Piece(archive, tensor, rank * self.share, min((rank + 1) * self.share, self.numel), self.at)
            piece.check()
            yield piece


@dataclass
class Tensors:
    """What one kind of state (weight, master, exp_avg, exp_avg_sq) holds: parameter -> its pieces, and its dtype."""

    pieces: dict[str, Pieces] = field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)

    def add(self, name: str, pieces: Pieces, dtype: torch.dtype | None = None) -> None:
        """`dtype`: what it is read as, if that is not what is stored."""
        self.pieces[name], self.dtypes[name] = pieces, dtype or pieces.dtype

    def read(self, name: str, shape: Shape, box: Region) -> torch.Tensor:
        """The values of a box of parameter `name`, seen as a tensor of `shape`, in its dtype."""
        out = torch.empty(region_shape(box), dtype=self.dtypes[name])
        if not out.numel():
            return out
        steps = strides(shape)
        first = sum(part.start * step for part, step in zip(box, steps, strict=True))
        last = sum((part.stop - 1) * step for part, step in zip(box, steps, strict=True))
        for piece in self.pieces[name].meeting(first, last + 1):
            if piece.tensor.shape == shape and piece.stop - piece.start == piece.tensor.numel:
                return piece.archive.read(piece.tensor, box).to(out.dtype)
            _fill_from(piece, shape, box, out)
        return out


def _fill_from(piece: Piece, shape: Shape, box: Region, out: torch.Tensor) -> None:
    """Fill in what a piece has of a box."""
    for stored, flat in flat_boxes(shape, piece.start, piece.stop):
        common = [(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(stored, box, strict=True)]
        if any(low >= high for low, high in common):
            continue
        inside = tuple(slice(low - part.start, high - part.start) for (low, high), part in zip(common, stored))
        target = tuple(slice(low - part.start, high - part.start) for (low, high), part in zip(common, box))
        out[target] = piece.archive.read_flat(piece.tensor, piece.at + flat.start, region_shape(stored), inside)
