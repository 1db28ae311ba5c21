"""Optimizer state and weights kept outside the device change no loss, after a resume neither."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from compt_megatron.engine.zero_disk import DiskFolder
from compt_megatron.errors import UserError
from compt_megatron.recipe.parallel_section import ParallelSettings
from compt_megatron.recipe.sections import OptimizerSettings
from tests.distributed.engine_cases import engine_of, rank_batch, write_start
from tests.distributed.spawn import run_ranks

LAYOUTS: list[dict[str, Any]] = [
    {"zero": 0},
    {"zero": 1, "offload": "optimizer"},
    {"zero": 2, "offload": "optimizer"},
    {"zero": 3, "offload": "optimizer"},
    {"zero": 3, "offload": "parameters"},
]


def train(rank: int, world: int, start: str, saved: str) -> list[list[float]]:
    from compt_megatron.engine.runtime import Runtime

    runtime, found = Runtime.start(), []
    for layout in LAYOUTS:
        losses = []
        engine = engine_of(runtime, layout)
        engine.load(Path(start))
        losses += [engine.step(rank_batch(step, rank, world)).loss for step in range(3)]
        engine.save(Path(saved), {"step": engine.global_step}, [])
        engine.close()
        engine = engine_of(runtime, layout)
        engine.load(Path(saved))
        losses.append(engine.step(rank_batch(3, rank, world)).loss)
        engine.close()
        found.append(losses)
    return found


def test_offload_changes_nothing(tmp_path: Path) -> None:
    write_start(tmp_path / "start")
    plain, *offloaded = run_ranks(train, 2, str(tmp_path / "start"), str(tmp_path / "saved"))[0]
    for layout, losses in zip(LAYOUTS[1:], offloaded, strict=True):
        assert losses == pytest.approx(plain, abs=1e-6), layout


def test_a_disk_needs_libaio(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("deepspeed")
    from deepspeed.ops.op_builder import AsyncIOBuilder

    from compt_megatron.engine.zero_config import deepspeed_config

    parallel = ParallelSettings(zero=3, offload="parameters", offload_path="/nvme")
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose=False: False)
    with pytest.raises(UserError, match=r"parallel\.offload_path: DeepSpeed needs libaio"):
        deepspeed_config(parallel, OptimizerSettings(lr=1.0), "fp32", 1, 4, largest=1001)
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose=False: True)
    zero = deepspeed_config(parallel, OptimizerSettings(lr=1.0), "fp32", 1, 4, largest=1001)["zero_optimization"]
    assert zero["offload_optimizer"] == {"device": "nvme", "nvme_path": "/nvme"}
    assert zero["offload_param"] == {"device": "nvme", "nvme_path": "/nvme", "buffer_size": 251}


def test_processes_share_a_disk(tmp_path: Path) -> None:
    """Each has a folder of its own; one that was killed leaves nothing behind for ever."""
    root = tmp_path / "nvme"
    one, two = DiskFolder(str(root)), DiskFolder(str(root))
    assert one.path != two.path
    (one.path / "state").write_text("of one")
    killed = "import os, sys; from compt_megatron.engine.zero_disk import DiskFolder\n"
    killed += "(DiskFolder(sys.argv[1]).path / 'state').write_text('left'); os._exit(9)"
    assert subprocess.run([sys.executable, "-c", killed, str(root)]).returncode == 9
    assert len([*root.glob("*/state")]) == 2
    three = DiskFolder(str(root))
    assert [path.parent for path in root.glob("*/state")] == [one.path], "what was left, and that alone"
    for folder in (one, two, three):
        folder.remove()
    assert [*root.iterdir()] == []
    root.rmdir()
    root.write_text("a file")
    with pytest.raises(
        UserError, match=rf"parallel\.offload_path: {root} cannot be written to \(File exists\); name a"
    ):
        DiskFolder(str(root))
