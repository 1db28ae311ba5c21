"""How fast a job trains: samples/s, MACs/s, the fraction of the device's peak (MFU), the time left."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

# Dense peaks in FLOP/s as the vendors' data sheets state them ("with sparsity" halved), per device. fp32 is the plain
# CUDA-core figure: TF32 is a different arithmetic and is not what "fp32" means here. First match wins, so the slower
# variants of a chip stand before the chip.
_PEAKS: tuple[tuple[str, dict[str, float]], ...] = (
    ("A100", {"bf16": 312e12, "fp16": 312e12, "fp32": 19.5e12}),
    ("H100 PCIE", {"bf16": 756e12, "fp16": 756e12, "fp32": 51e12}),
    ("H100 NVL", {"bf16": 835e12, "fp16": 835e12, "fp32": 60e12}),
    ("H100", {"bf16": 989e12, "fp16": 989e12, "fp32": 67e12}),
    ("H200 NVL", {"bf16": 835e12, "fp16": 835e12, "fp32": 60e12}),
    ("H200", {"bf16": 989e12, "fp16": 989e12, "fp32": 67e12}),
    ("B200", {"bf16": 2250e12, "fp16": 2250e12, "fp32": 75e12}),
    ("L40S", {"bf16": 362e12, "fp16": 362e12, "fp32": 91.6e12}),
    ("V100", {"fp16": 125e12, "fp32": 15.7e12}),
)


def peak_flops(device_name: str | None, dtype: str = "bf16") -> float | None:
    """Dense peak of one device in FLOP/s by its CUDA name and "bf16", "fp16" or "fp32"; None where it is not known.

    None on a CPU, for an unlisted card, for a slice of a card (MIG) and for a number format the card has no figure for.
    """
    name = (device_name or "").upper()
    if " MIG " in f" {name} " or "GB200" in name or "GH200" in name:
        return None
    return next((peaks.get(dtype) for key, peaks in _PEAKS if key in name), None)


@dataclass(frozen=True)
class Rates:
    """One reading: samples/s and MACs/s of the last interval, samples/s overall, MFU in [0, 1], seconds left."""

    samples_per_s: float
    overall_samples_per_s: float
    macs_per_s: float
    mfu: float | None
    eta_s: float | None

    def scalars(self) -> dict[str, float]:
        """The known fields under the names that metrics.jsonl uses."""
        known = {"samples_per_s": self.samples_per_s, "macs_per_s": self.macs_per_s}
        if self.mfu is not None:
            known["mfu"] = self.mfu
        if self.eta_s is not None:
            known["eta_s"] = self.eta_s
        return known


class Throughput:
    """Counts global samples against a clock that can be paused for evaluation and checkpoints.

    `macs_per_sample`: training MACs of one sample (student forward and backward, teacher forward).
    `peak_flops`: FLOP/s of ALL devices of the job together, or None. A MAC is two FLOPs.
    """

    def __init__(
        self,
        macs_per_sample: float,
        peak_flops: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.macs_per_sample = macs_per_sample
        self.peak_flops = peak_flops
        self._clock = clock
        self._since: float | None = clock()
        self._interval_s = 0.0
        self._interval_samples = 0
        self._total_s = 0.0
        self._total_samples = 0

    def add(self, samples: int) -> None:
        """Count `samples` more (of the global batch, over all ranks)."""
        self._interval_samples += samples

    def pause(self) -> None:
        """Stop the clock: what follows is not training."""
        if self._since is not None:
            self._interval_s += self._clock() - self._since
            self._since = None

    def resume(self) -> None:
        """Start the clock again after `pause`."""
        if self._since is None:
            self._since = self._clock()

    def read(self, remaining_samples: int | None = None) -> Rates:
        """The rates since the last reading; begins a new interval. The time left assumes the overall rate."""
        running = self._since is not None
        self.pause()
        self._total_s += self._interval_s
        self._total_samples += self._interval_samples
        rate = _ratio(self._interval_samples, self._interval_s)
        overall = _ratio(self._total_samples, self._total_s)
        self._interval_s, self._interval_samples = 0.0, 0
        if running:
            self.resume()
        macs_per_s = rate * self.macs_per_sample
        return Rates(
            samples_per_s=rate,
            overall_samples_per_s=overall,
            macs_per_s=macs_per_s,
            mfu=2 * macs_per_s / self.peak_flops if self.peak_flops else None,
            eta_s=remaining_samples / overall if remaining_samples is not None and overall > 0 else None,
        )


def _ratio(amount: float, seconds: float) -> float:
    return amount / seconds if seconds > 0 else 0.0
