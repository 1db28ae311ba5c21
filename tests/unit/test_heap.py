"""What a process settles with glibc: freed memory comes back without fresh pages."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource
from compt_megatron import heap
{settle}
for _ in range(3):
    bytes(bytearray(48 * 2**20))
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    bytes(bytearray(48 * 2**20))
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(settle: str) -> int:
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(settle=settle)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_a_training_process_takes_no_fresh_pages_for_what_it_had_before() -> None:
    assert faults("heap.kept_heap()") < 100 < faults("") / 10
