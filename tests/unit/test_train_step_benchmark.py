"""The benchmark of training steps runs: all contenders do the same work."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_engines_and_peers_start_from_the_same_loss() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "train_step.py"), "--smoke"]
    before = {path: path.stat().st_mtime_ns for path in (ROOT / "benchmarks" / "results").glob("train_step.json")}
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    losses = dict(re.findall(r"^task +(.+?) +first loss ([0-9.]+)", done.stdout, re.MULTILINE))
    assert losses.keys() == {"deepspeed", "deepspeed zero 1", "megatron", "bare loop", "open_clip fp32"}
    assert len({round(float(loss), 4) for loss in losses.values()}) == 1, losses
    assert {path: path.stat().st_mtime_ns for path in before} == before, "the smallest case is no result"
