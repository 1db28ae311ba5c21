"""Rates by a clock that the test owns, and the devices' peaks; numbers as people read them."""

from __future__ import annotations

import pytest

from compt_megatron.observe import numbers
from compt_megatron.observe.throughput import Throughput, peak_flops


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_interval_and_overall_rates_leave_out_pauses() -> None:
    clock = Clock()
    meter = Throughput(macs_per_sample=1e9, peak_flops=4e12, clock=clock)
    meter.add(100)
    clock.now += 2
    first = meter.read(remaining_samples=500)
    assert first.samples_per_s == 50
    assert first.eta_s == 10
    assert first.macs_per_s == 5e10
    assert first.mfu == pytest.approx(2 * 5e10 / 4e12)
    meter.add(100)
    clock.now += 1
    meter.pause()
    clock.now += 1000  # an evaluation
    meter.resume()
    clock.now += 1
    meter.add(200)
    second = meter.read(remaining_samples=0)
    assert second.samples_per_s == 150
    assert second.overall_samples_per_s == 100
    assert second.eta_s == 0


def test_reading_while_paused_keeps_the_pause() -> None:
    clock = Clock()
    meter = Throughput(1.0, clock=clock)
    meter.add(10)
    clock.now += 1
    meter.pause()
    assert meter.read().samples_per_s == 10
    clock.now += 50
    meter.resume()
    meter.add(10)
    clock.now += 1
    assert meter.read().samples_per_s == 10


def test_no_time_passed_and_no_peak_known() -> None:
    rates = Throughput(1e9, clock=Clock()).read(remaining_samples=5)
    assert rates.samples_per_s == 0
    assert rates.eta_s is None
    assert set(rates.scalars()) == {"samples_per_s", "macs_per_s"}


@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312e12),
        ("NVIDIA H100 80GB HBM3", "bf16", 989e12),
        ("NVIDIA H100 80GB HBM3", "fp32", 67e12),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("NVIDIA H200", "bf16", 989e12),
        ("NVIDIA B200", "bf16", 2250e12),
        ("NVIDIA L40S", "bf16", 362e12),
        ("Tesla V100-SXM2-16GB", "fp16", 125e12),
        ("Tesla V100-SXM2-16GB", "bf16", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16", None),
        ("NVIDIA GeForce RTX 4090", "bf16", None),
        (None, "fp32", None),
    ],
)
def test_peaks(name: str | None, dtype: str, expected: float | None) -> None:
    assert peak_flops(name, dtype) == expected


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (832, "832"),
        (999.6, "1 k"),
        (1_530_000, "1.53 M"),
        (4.2e12, "4.2 T"),
        (999_999, "1 M"),
        (-1.5e3, "-1.5 k"),
        (0.25, "0.25"),
        (float("nan"), "-"),
        (None, "-"),
    ],
)
def test_human(value: float | None, text: str) -> None:
    assert numbers.human(value) == text


def test_durations_percent_and_axis_scales() -> None:
    assert numbers.duration(3725.4) == "1:02:05"
    assert numbers.duration(100 * 3600) == "100:00:00"
    assert numbers.duration(float("inf")) == "-"
    assert numbers.percent(0.1884) == "18.8 %"
    assert numbers.macs(4.2e12) == "4.2 T MACs"
    assert numbers.macs(5) == "5 MACs"
    assert numbers.scale_of(1.42e13) == (1e12, "T ")
    assert numbers.scale_of(1e15) == (1e15, "P ")
    assert numbers.scale_of(20) == (1.0, "")
