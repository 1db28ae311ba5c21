"""Finds units that will never separate: MLP units or heads of a layer that are identical, inputs and outputs.

Two such units compute the same and get the same gradient, so every optimizer step moves them alike, unless their
optimizer state differs. Every unit is hashed while its rows (of what feeds it) and columns (of what reads it) stream
past: a polynomial hash of their bits modulo 2^64, one for all units at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from compt_megatron.checkpoint.contract import Reader, TensorInfo, slabs
from compt_megatron.spec.table import ModelSpec, Param, Tower

_SLAB = 8 << 20  # bytes of a tensor in memory at a time
_STATES = ("weight", "exp_avg", "exp_avg_sq")
_BASE = 0x9E3779B97F4A7C15  # odd, so that multiplying by its powers loses nothing modulo 2^64
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

Hashes = npt.NDArray[np.uint64]
Layer = dict[str, Hashes]  # the running hashes of a layer's units, by axis


@dataclass(frozen=True)
class Twins:
    """Units of one kind in one layer of which some are identical: `pairs` of (unit, an earlier one like it)."""

    tower: str
    layer: int
    unit: str  # "MLP unit" or "head"
    pairs: list[tuple[int, int]]

    def __str__(self) -> str:
        second, first = self.pairs[0]
        number = f"{len(self.pairs)} {self.unit}{'s are' if len(self.pairs) > 1 else ' is'} identical to an earlier one"
        return (
            f"{self.tower} layer {self.layer}: {number} (first: {second} to {first}) and will never separate; grow "
            "with --noise 0.01, or with --moments grow"
        )


def find_twins(reader: Reader, spec: ModelSpec) -> list[Twins]:
    """Identical units of every layer of a checkpoint. Memory: some 8 MB slabs."""
    stored = reader.tensors()
    found: list[Twins] = []
    for name, tower in spec.towers.items():
        layers: list[Layer] = [{} for _ in range(tower.layers)]
        for param in spec.params.values():
            if param.tower == name and param.layer is not None:
                for prefix in _STATES:
                    if (info := stored.get(f"{prefix}/{param.name}")) is not None:
                        _take(layers[param.layer], tower, param, info, reader, f"{prefix}/{param.name}")
        for index, layer in enumerate(layers):
            for unit, hashes in _units(layer, tower):
                if pairs := _pairs(hashes):
                    found.append(Twins(name, index, unit, pairs))
    return found


def _take(layer: Layer, tower: Tower, param: Param, info: TensorInfo, reader: Reader, name: str) -> None:
    """Hash the rows or columns that belong to a layer's units."""
    counts = {"mlp": tower.mlp, "heads": tower.heads, "kv_heads": tower.groups}
    for dim, side in enumerate(param.dims):
        if side.axis not in counts:
            continue
        count = counts[side.axis]
        axis = "kv_heads" if side.axis == "heads" and param.part in ("k", "v") else side.axis
        known = layer.setdefault(axis, np.zeros(count, np.uint64))
        hashes = np.zeros(count, np.uint64)
        for region in slabs(info, _SLAB):
            values = reader.read(name, region).movedim(dim, 0)
            size = side.size // count  # entries of a unit: 1, or those of a head
            if dim == 0:  # the slab holds some entries only; each is hashed with its place in the unit
                _mix(hashes, values, np.arange(region[0].start, region[0].stop), size)
            else:
                _mix(hashes, values, np.arange(side.size), size, region[0].start)
        with np.errstate(over="ignore"):
            layer[axis] = known * np.uint64(_BASE) + hashes


def _mix(hashes: Hashes, values: torch.Tensor, entries: npt.NDArray[np.int64], size: int, at: int = 0) -> None:
    """Add the entries' values to the hashes of the units that they are of, wherever slabs cut a unit.

    `at`: where the slab begins on the other dimension.
    """
    bits = values.reshape(len(entries), -1).contiguous().view(_BITS[values.dtype.itemsize]).numpy()
    with np.errstate(over="ignore"):
        powers = np.cumprod(np.full(bits.shape[1], _BASE, np.uint64))
        rows = (bits.astype(np.uint64) * powers).sum(1, dtype=np.uint64) + np.uint64(1 + at)
        places = np.cumprod(np.full(size, _BASE ^ 2, np.uint64))
        rows = (rows ^ (rows >> np.uint64(29))) * places[entries % size]
        np.add.at(hashes, entries // size, rows * (rows ^ (rows >> np.uint64(31))))


def _units(layer: Layer, tower: Tower) -> Iterator[tuple[str, Hashes]]:
    """The hashes of a layer's MLP units and of its heads, each with the key and value of its group."""
    if "mlp" in layer:
        yield "MLP unit", layer["mlp"]
    if "heads" in layer:
        groups = np.repeat(layer["kv_heads"], tower.heads // tower.groups)
        with np.errstate(over="ignore"):
            yield "head", layer["heads"] * np.uint64(_BASE) + groups


def _pairs(hashes: Hashes) -> list[tuple[int, int]]:
    seen: dict[int, int] = {}
    pairs = []
    for unit, value in enumerate(hashes.tolist()):
        if value in seen:
            pairs.append((unit, seen[value]))
        else:
            seen[value] = unit
    return pairs
