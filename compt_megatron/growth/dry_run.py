"""What a growth would read, write, need and take, without carrying it out."""

from __future__ import annotations

import os
import resource
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, fields
from math import prod
from pathlib import Path
from typing import Any

from compt_megatron.checkpoint.contract import Layout, TensorInfo, region_shape, slabs
from compt_megatron.checkpoint.formats import FORMATS
from compt_megatron.checkpoint.hashed_file import HashedFile
from compt_megatron.checkpoint.out_file import BLOCK_BYTES
from compt_megatron.checkpoint.stream import SLAB
from compt_megatron.growth.maker import needs
from compt_megatron.growth.plan import GrowthPlan, Random
from compt_megatron.spec.random import normal

_PROBE = 64 * 2**20  # bytes written to and read from the disk to learn its speed
_FRESH_PROBE = 2**18  # elements that are made to learn the speed of the generator


@dataclass(frozen=True)
class Forecast:
    """Bytes unless a name says otherwise. `read`, `written`: by tensor; the source's weights are read once more for
    their hash. `peak_memory`: at most, of one worker. `files`: what the result consists of, without what describes it.
    Speeds are measured where the result would go."""

    read: dict[str, int]
    written: dict[str, int]
    hashed: int
    peak_memory: int
    files: dict[str, int]
    workers: int
    write_bytes_per_second: float
    read_bytes_per_second: float
    fresh_elements_per_second: float
    seconds: float

    def lines(self) -> list[str]:
        """For people."""
        files = [f"{name} ({_size(count)})" if count else name for name, count in list(self.files.items())[:4]]
        more = len(self.files) - len(files)
        disk = f"writes {_size(self.write_bytes_per_second)}/s and reads {_size(self.read_bytes_per_second)}/s"
        return [
            f"reads {_size(sum(self.read.values()))}, and {_size(self.hashed)} for the source's hash; writes "
            f"{_size(sum(self.written.values()))}",
            f"files: {', '.join(files)}{f' and {more} more' if more > 0 else ''}",
            f"memory: at most {_size(self.peak_memory)} a worker ({self.workers})",
            f"time: about {self.seconds:.0f} s; the disk there {disk}, as measured now",
        ]


@dataclass(frozen=True)
class DryRun(GrowthPlan):
    """A plan with its forecast."""

    forecast: Forecast | None = None

    def describe(self) -> str:
        """The plan as text; every tensor's line also says what is read and written for it."""
        assert self.forecast is not None
        lines = super().describe().splitlines()
        head, tensors = lines[: -len(self.tensors)], lines[-len(self.tensors) :]
        read, written = self.forecast.read, self.forecast.written
        sizes = [f"reads {_size(read[f'weight/{n}'])}, writes {_size(written[f'weight/{n}'])}" for n in self.tensors]
        body = [f"{line}; {size}" for line, size in zip(tensors, sizes, strict=True)]
        return "\n".join([*head, *self.forecast.lines(), *body])

    def to_dict(self) -> dict[str, Any]:
        assert self.forecast is not None
        return {**super().to_dict(), "forecast": asdict(self.forecast)}


def dry_run(
    plan: GrowthPlan,
    source: dict[str, TensorInfo],
    target: dict[str, TensorInfo],
    dst: Path,
    format: str,
    layout: Layout,
    workers: int,
) -> DryRun:
    """The plan with a forecast. `source`, `target`: all tensors of the two checkpoints.

    Writes 64 MiB beside `dst` to learn the speed of the disk, and removes them again.
    """
    read, fresh, largest = {}, 0, 0
    for prefix, name, tensor in plan.boundary():
        key, seen, count = f"{prefix}/{name}", set(), 0
        for region in slabs(target[key], SLAB):
            for origin, box in needs(tensor, region):
                size = prod(region_shape(box)) * source[f"{prefix}/{origin}"].dtype.itemsize
                place = (origin, tuple((side.start, side.stop) for side in box))
                if place not in seen:  # means are kept
                    count += size
                seen.add(place)
        read[key] = count
        fresh += sum(part.numel for part in tensor.parts if isinstance(part.piece, Random))
        largest = max(largest, target[key].dtype.itemsize)
    written = {name: info.nbytes for name, info in target.items()}
    hashed = sum(info.nbytes for name, info in source.items() if name.startswith("weight/"))
    disk_writes, disk_reads = _disk_speed(dst)
    generator = _generator_speed() if fresh else 0.0
    making = (sum(read.values()) + hashed) / disk_reads + (fresh / generator if fresh else 0.0)
    forecast = Forecast(
        read=read,
        written=written,
        hashed=hashed,
        peak_memory=_peak_memory(),
        files=_files(plan, target, dst, format, layout, workers),
        workers=workers,
        write_bytes_per_second=disk_writes,
        read_bytes_per_second=disk_reads,
        fresh_elements_per_second=generator,
        seconds=max(sum(written.values()) / disk_writes, making / workers),
    )
    return DryRun(**{entry.name: getattr(plan, entry.name) for entry in fields(GrowthPlan)}, forecast=forecast)


def _files(
    plan: GrowthPlan, target: dict[str, TensorInfo], dst: Path, format: str, layout: Layout, workers: int
) -> dict[str, int]:
    describe = getattr(FORMATS[format].open_writer, "file_sizes", None)
    if describe is None:
        return {dst.name: sum(info.nbytes for info in target.values())}
    found: dict[str, int] = describe(dst, plan.target, target, layout, workers)
    return found


def _peak_memory() -> int:
    """What this process has needed so far (the interpreter and torch, mostly), the blocks on their way to the disk, and
    a slab's source, result and fp32 values in between."""
    return _memory() + BLOCK_BYTES + 24 * SLAB


def _memory() -> int:
    """What this process has, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS"))
        return 1024 * int(line.split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _disk_speed(dst: Path) -> tuple[float, float]:
    """Bytes a second, written and made durable, and read again, on the disk where `dst` would be."""
    folder = next(parent for parent in dst.absolute().parents if parent.is_dir())
    with tempfile.TemporaryDirectory(prefix=".compt-probe-", dir=folder) as inside:
        path, block = Path(inside) / "probe", os.urandom(2**20)
        started = time.perf_counter()
        file = HashedFile(path)
        for _ in range(_PROBE // len(block)):
            file.write(block)
        file.finish()
        written = time.perf_counter() - started
        buffer = bytearray(8 * 2**20)
        with open(path, "rb", buffering=0) as source:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(source.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            started = time.perf_counter()
            while source.readinto(buffer):
                pass
            return _PROBE / written, _PROBE / (time.perf_counter() - started)


def _generator_speed() -> float:
    """Elements a second, the best of a few."""
    seconds = []
    for index in range(4):
        started = time.perf_counter()
        normal(index, "probe", (_FRESH_PROBE,))
        seconds.append(time.perf_counter() - started)
    return _FRESH_PROBE / min(seconds)


def _size(count: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.0f} B"
