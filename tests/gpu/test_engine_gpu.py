"""Both engines on one GPU with nccl at world size 1: every ZeRO stage against the plain PyTorch step on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; this machine has none"),
]

ROOT = Path(__file__).resolve().parents[2]

# A process of its own: the CUDA engine must not share one with tests that chose the CPU accelerator.
SCRIPT = """
import sys
from pathlib import Path
import pytest, torch
from tests.distributed import test_engine as cases

start = cases.write_start(Path(sys.argv[1]))
torch.backends.cuda.matmul.allow_tf32 = False
for precision, tolerance in (("fp32", 1e-4), ("bf16", 3e-2)):
    found = cases.train(0, 1, str(start), [(0, 1), (1, 2), (2, 1), (3, 2)], precision, True)
    for case, (losses, *_) in found.items():
        assert losses == pytest.approx(cases.oracle(True)["losses"], rel=tolerance), (precision, case)
        print(precision, case, losses)
"""

MEGATRON = """
import sys
from pathlib import Path
import pytest, torch
from tests.distributed import test_engine as cases
from tests.distributed.engine_cases import engine_of, rank_batch, STEPS
from compt_megatron.engine.runtime import Runtime

start = cases.write_start(Path(sys.argv[1]))
torch.backends.cuda.matmul.allow_tf32 = False
runtime = Runtime.start()
assert runtime.device.type == "cuda"
for precision, tolerance in (("fp32", 1e-4), ("bf16", 3e-2)):
    for zero, micro_batches, recompute in ((0, 1, "none"), (1, 1, "full"), (0, 2, "selective"), (1, 4, "none")):
        parallel = {"engine": "megatron", "zero": zero, "micro_batches": micro_batches, "recompute": recompute}
        engine = engine_of(runtime, parallel, precision, True)
        engine.load(start)
        losses = [engine.step(rank_batch(step, 0, 1)).loss for step in range(STEPS)]
        engine.save(Path(sys.argv[1]).with_name("saved"), {"step": engine.global_step}, [])
        engine.close()
        assert losses == pytest.approx(cases.oracle(True)["losses"], rel=tolerance), (precision, parallel)
        print(precision, parallel, losses)
"""


@pytest.mark.parametrize("script", [SCRIPT, MEGATRON], ids=["deepspeed", "megatron"])
def test_every_stage_on_one_gpu(tmp_path: Path, script: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "start")],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
