"""Transformer Engine's layers on one GPU: the check before use, logits and gradients of a CLIP and a Llama-type model
against torch's layers, runs that change their layers, and the time of a block."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; this machine has none"),
    pytest.mark.skipif(
        importlib.util.find_spec("transformer_engine") is None,
        reason="needs NVIDIA's transformer_engine; this machine has it not",
    ),
]

ROOT = Path(__file__).resolve().parents[2]


def test_against_torch(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu.transformer_engine_cases", str(tmp_path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
