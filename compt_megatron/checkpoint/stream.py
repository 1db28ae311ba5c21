"""Streams tensors into a checkpoint that is being written: each worker its share, in pieces that bound its memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
import xxhash

from compt_megatron import __version__
from compt_megatron.checkpoint.contract import Region, TensorInfo, Writer, region_shape, slabs
from compt_megatron.checkpoint.guard import Checks
from compt_megatron.checkpoint.manifest import manifest_path
from compt_megatron.checkpoint.workers import Place
from compt_megatron.checkpoint.writing import KEEP, BoxWriter, Unit
from compt_megatron.errors import UserError

Make = Callable[[str, Region], torch.Tensor]  # (boundary name, region) -> its values, in the declared dtype
Cost = Callable[[str, Region], float]

SLAB = 8 * 2**20  # bytes of a tensor that are made at a time


def stream(
    writer: Writer,
    infos: dict[str, TensorInfo],
    make: Make,
    place: Place,
    *,
    cost: Cost | None = None,
    ahead: float = 0.0,
    checks: Checks | None = None,
) -> None:
    """Write this worker's share of the declared tensors, `make` giving their values.

    `cost`: of a box, in any unit (None: its bytes); `ahead`: what the first worker has to do besides. `checks` of the
    source go on beside. What an earlier run of the same request has written is left as it is.
    """
    nbytes = _bytes_of(infos)
    mine = share(list(_units(writer, infos)), cost or nbytes, place.shard, ahead)
    kept = writer.recover() if isinstance(writer, BoxWriter) else set()
    done, total = 0, sum(nbytes(name, region) for unit in mine for name, region in unit)
    before = sum(torch.Size(sizes).numel() * infos[name].dtype.itemsize for name, (_, sizes) in kept)
    if checks is not None:
        checks.begin()

    def wanted(name: str, region: Region) -> bool:
        return (name, (tuple(side.start for side in region), region_shape(region))) not in kept

    with closing(_made_ahead(make, [[box for box in unit if wanted(*box)] for unit in mine])) as made:
        for unit, boxes in zip(mine, made, strict=True):
            for name, region, values in boxes:
                writer.write(name, tuple(side.start for side in region), values)
            done += sum(nbytes(name, region) for name, region in unit)
            if isinstance(writer, BoxWriter):
                writer.keep()
            if place.progress is not None:
                place.progress(done, total, before)
            if checks is not None:
                checks.pace.reach(done / total)
                checks.look()


def _made_ahead(make: Make, units: list[Unit]) -> Generator[list[tuple[str, Region, torch.Tensor]], None, None]:
    """The units with their values: a thread makes the next one while the caller writes this one.

    Torch has no threads of its own meanwhile: there are enough that read, make, hash and write.
    """

    def work(unit: Unit) -> list[tuple[str, Region, torch.Tensor]]:
        return [(name, region, make(name, region)) for name, region in unit]

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(1, "make") as thread:
            ahead = [thread.submit(work, unit) for unit in units[:1]]
            for index in range(len(units)):
                found = ahead.pop().result()
                if index + 1 < len(units):
                    ahead.append(thread.submit(work, units[index + 1]))
                yield found
                del found
    finally:
        torch.set_num_threads(before)


def settle(writer: Writer, checks: Checks) -> None:
    """Wait for the checks of all workers. If something was damaged, all of them raise UserError."""
    writer.party.share(checks.settle) if isinstance(writer, BoxWriter) else checks.settle()


def _units(writer: Writer, infos: dict[str, TensorInfo]) -> Iterator[Unit]:
    if isinstance(writer, BoxWriter):
        yield from writer.units(SLAB)
        return
    for name, info in infos.items():
        yield from ([(name, region)] for region in slabs(info, SLAB))


def _bytes_of(infos: dict[str, TensorInfo]) -> Callable[[str, Region], int]:
    def count(name: str, region: Region) -> int:
        return torch.Size(region_shape(region)).numel() * infos[name].dtype.itemsize

    return count


def share(units: list[Unit], cost: Cost, shard: tuple[int, int], ahead: float = 0.0) -> list[Unit]:
    """The units of one worker: a run of them, so that neighbours stay together, of about the cost of the others'."""
    rank, world = shard
    if world == 1:
        return units
    costs = [sum(cost(name, region) for name, region in unit) for unit in units]
    total = ahead + sum(costs)
    mine, at = [], ahead
    for unit, own in zip(units, costs, strict=True):
        if min(int((at + own / 2) * world / total), world - 1) == rank:
            mine.append(unit)
        at += own
    return mine


@contextmanager
def unfinished(writer: Writer) -> Iterator[None]:
    """Where a checkpoint is written: an error removes what was written, an interruption leaves it to be continued."""
    try:
        yield
    except Exception:
        writer.abort()
        raise
    except BaseException:
        writer.leave() if isinstance(writer, BoxWriter) else writer.abort()
        raise


def identity(place: Place, src: Path, *request: Any) -> str:
    """What a request to make a checkpoint from `src` is known by: its files, `request` (by its repr), and the number of
    workers. Files are the same if none was replaced or touched since.
    """
    text = json.dumps([__version__, SLAB, KEEP, place.world, file_states(src), [repr(part) for part in request]])
    found = str(xxhash.xxh3_128(text.encode()).hexdigest())
    return found if place.exchange is None else str(place.exchange(found)[0])


def file_states(src: Path) -> list[tuple[str, int, int, int, int]]:
    """The files of a checkpoint: path, bytes, times of change, inode."""
    inside = sorted(path for path in src.rglob("*") if path.is_file()) if src.is_dir() else [src, manifest_path(src)]
    return [(str(path.resolve()), *_state(path)) for path in inside if path.is_file()]


@contextmanager
def unchanged(src: Path) -> Iterator[Callable[[], None]]:
    """A check that `src` still has the files it has now; it raises UserError if one was replaced or written to."""
    before = file_states(src)

    def check() -> None:
        changed = sorted(set(before) ^ set(file_states(src)))
        if changed:
            raise UserError(f"{changed[0][0]}: was changed while it was read; start again when nothing writes to it")

    yield check


def _state(path: Path) -> tuple[int, int, int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino
