"""The alignment kernels under the sanitizers and shuffled schedules, and faults that these must notice."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kernels.programs import ADDRESS, PLAIN, THREADS, Fault, program, run

KERNELS = ("align.cu", "scale.cu")


def test_any_order_of_threads_and_blocks_is_right(tmp_path: Path) -> None:
    done = run(program(tmp_path, "align_harness.cpp", KERNELS), "full", "3")
    assert done.returncode == 0, done.stdout + done.stderr


def test_addresses_alignment_and_undefined_behaviour(tmp_path: Path) -> None:
    done = run(program(tmp_path, "align_harness.cpp", KERNELS, ADDRESS), "full", "1")
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_race_between_threads(tmp_path: Path) -> None:
    done = run(program(tmp_path, "align_harness.cpp", KERNELS, THREADS), "few")
    assert done.returncode == 0, done.stdout + done.stderr


FAULTS = {
    "missing barrier": (
        Fault("device.h", "    __syncthreads();  // scratch may still be read from the last sum\n", ""),
        THREADS,
        "data race",
    ),
    "overrun": (
        Fault("align.cu", "if (column < a.features) load8_bits(a.student", "load8_bits(a.student"),
        ADDRESS,
        "heap-buffer-overflow",
    ),
    "unaligned vectors": (
        Fault("align.cu", "(a.inner_rows == 1 || rows.inner * size % 16 == 0)", "true"),
        ADDRESS,
        "misaligned address",
    ),
    "swapped strides": (
        Fault(
            "device.h",
            "index.outer * rows.outer + index.inner * rows.inner",
            "index.outer * rows.inner + index.inner * rows.outer",
        ),
        PLAIN,
        "wrong loss",
    ),
    "lost mask": (
        Fault("align.cu", "if (weight != 0.f) {\n      const RowIndex", "if (true) {\n      const RowIndex"),
        PLAIN,
        "wrong loss",
    ),
    "lost end of a row": (
        Fault("align.cu", "if ((v * THREADS + lane) * 8 < features)", "if (true)"),
        PLAIN,
        "wrong loss",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_noticed(name: str, tmp_path: Path) -> None:
    fault, flags, says = FAULTS[name]
    done = run(program(tmp_path, "align_harness.cpp", KERNELS, flags, fault), "few" if flags == THREADS else "full")
    assert done.returncode != 0
    assert says in done.stdout + done.stderr
