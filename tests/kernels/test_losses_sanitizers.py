"""The loss kernels under the sanitizers and shuffled schedules, and faults that these must notice."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kernels.programs import ADDRESS, PLAIN, THREADS, Fault, program, run

HARNESS, KERNELS = "losses_harness.cpp", ("contrastive.cu", "distill.cu")


def test_any_order_of_threads_and_blocks_is_right(tmp_path: Path) -> None:
    done = run(program(tmp_path, HARNESS, KERNELS), "full", "3")
    assert done.returncode == 0, done.stdout + done.stderr


def test_addresses_alignment_and_undefined_behaviour(tmp_path: Path) -> None:
    done = run(program(tmp_path, HARNESS, KERNELS, ADDRESS), "full", "1")
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_race_between_threads(tmp_path: Path) -> None:
    done = run(program(tmp_path, HARNESS, KERNELS, THREADS), "few")
    assert done.returncode == 0, done.stdout + done.stderr


FAULTS = {
    "missing barrier": (
        Fault("contrastive.cu", "    __syncthreads();\n    if (start + static_cast", "    if (start + static_cast"),
        THREADS,
        "data race",
    ),
    "overrun of a row": (
        Fault("contrastive.cu", "row < a.rows ? a.columns - column : 0, x", "a.columns - column, x"),
        ADDRESS,
        "heap-buffer-overflow",
    ),
    "overrun of a vocabulary": (
        Fault("distill.cu", "load4<VECTOR>(row + column, columns - column, x", "load4<VECTOR>(row + column, 4, x"),
        ADDRESS,
        "heap-buffer-overflow",
    ),
    "swapped strides": (
        Fault(
            "contrastive.cu",
            "row * slope.stride + column, slope.dtype, end - column, out + half * 4);\n      }\n    }\n  }",
            "row * a.stride + column, slope.dtype, end - column, out + half * 4);\n      }\n    }\n  }",
        ),
        PLAIN,
        "wrong slopes",
    ),
    "lost mask": (Fault("distill.cu", "if (weight == 0.f) {", "if (false) {"), PLAIN, "wrong losses"),
    "lost bound": (Fault("distill.cu", "a.bound && t[j] < bound ? 0.f", "false ? 0.f"), PLAIN, "wrong losses"),
    "own pair among the others": (Fault("contrastive.cu", "there & ~own : 0", "there : 0"), PLAIN, "wrong sums"),
    "labels forgotten": (
        Fault("contrastive.cu", "if (LABELS && same >> j & 1) g -=", "if (false) g -="),
        PLAIN,
        "wrong slopes",
    ),
    "a part merged twice": (
        Fault("contrastive.cu", "part < m.count; part += WARPS", "part < m.count; part += WARPS - 1"),
        PLAIN,
        "wrong sums",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_noticed(name: str, tmp_path: Path) -> None:
    fault, flags, says = FAULTS[name]
    done = run(program(tmp_path, HARNESS, KERNELS, flags, fault), "few" if flags == THREADS else "full")
    assert done.returncode != 0
    assert says in done.stdout + done.stderr
