"""How the benchmark measures: times by CUDA events, memory, launches, and the floors of the machine it runs on."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Step = Callable[[], Any]


@dataclass(frozen=True)
class Effort:
    """How long to measure: at least `repeats` times and `seconds` seconds of one implementation."""

    repeats: int = 10
    seconds: float = 0.5


@dataclass(frozen=True)
class Floors:
    """What the machine does at best, measured in the same run: bytes copied and operations multiplied, a second."""

    bandwidth: float
    rate: float


def median_seconds(steps: list[Step], effort: Effort) -> float:
    """The median time of one step. `steps` do the same on different buffers, in turn, so that caches do not help."""
    for step in steps[:3]:
        step()
    times: list[float] = []
    if not torch.cuda.is_available():
        for index in range(min(effort.repeats, 3)):
            start = time.perf_counter()
            steps[index % len(steps)]()
            times.append(time.perf_counter() - start)
        return statistics.median(times)
    torch.cuda.synchronize()
    started = time.perf_counter()
    while len(times) < effort.repeats or time.perf_counter() - started < effort.seconds:
        marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(10)]
        for index, (begin, end) in enumerate(marks):
            begin.record()
            steps[(len(times) + index) % len(steps)]()
            end.record()
        torch.cuda.synchronize()
        times += [begin.elapsed_time(end) / 1e3 for begin, end in marks]
    return statistics.median(times)


def extra_bytes(step: Step) -> int:
    """Bytes allocated at the peak of a step beside what was there, the gradients it returns among them."""
    step()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def launches(step: Step) -> int:
    """How many kernels a step starts on the GPU."""
    from torch.profiler import ProfilerActivity, profile

    step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        step()
        torch.cuda.synchronize()
    names = (event.name for event in found.events() if event.device_type == torch.autograd.DeviceType.CUDA)
    return sum(not name.startswith(("Memcpy", "Memset")) for name in names)


def floors(device: torch.device, small: bool, effort: Effort) -> Floors:
    """Copy bandwidth of 1 GiB, and the bf16 rate of a square product of 8192."""
    count, side = (1 << 12, 64) if small else (1 << 29, 8192)
    source = [torch.zeros(count, dtype=torch.bfloat16, device=device) for _ in range(2)]
    copy = median_seconds([lambda: source[0].copy_(source[1])], effort)
    a, b = (torch.randn(side, side, dtype=torch.bfloat16, device=device) for _ in range(2))
    product = median_seconds([lambda: torch.mm(a, b)], effort)
    return Floors(2 * 2 * count / copy, 2 * side**3 / product)
