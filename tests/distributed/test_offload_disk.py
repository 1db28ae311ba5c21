"""Optimizer state and weights that are on a disk train, are saved and loaded like those in memory, to the bit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from compt_megatron.spec.families import spec_from_config
from tests.distributed.engine_cases import engine_of, joined, pieces_of, whole_batch, write_start
from tests.distributed.layout_cases import CONFIG
from tests.distributed.spawn import run_ranks

# Pieces of at least 1 MiB go to the disk: of the image tower most matrices, more than the five that DeepSpeed has
# buffers for; of the text tower none.
WIDE: dict[str, Any] = {**CONFIG, "vision_cfg": {**CONFIG["vision_cfg"], "width": 768, "layers": 3, "head_width": 64}}
SUB_GROUP = 1_500_000  # elements of a rank: several sub-groups, some with state on the disk and some without
CASES: list[tuple[str, str]] = [("optimizer", "fp32"), ("parameters", "fp32"), ("parameters", "bf16")]


@dataclass
class Ran:
    losses: list[float]
    saved: Any  # the state when it was saved: pieces of one rank, then whole
    loaded: Any  # the state of another engine that has loaded that
    files: dict[str, int]  # of optimizer state and weights, on the disk between steps: bytes
    left: list[str]  # after the end


def train(rank: int, world: int, start: str, folder: str, offload: str, precision: str) -> Ran:
    from compt_megatron.engine import zero_config
    from compt_megatron.engine.runtime import Runtime

    original = zero_config._offload

    def small(*args: Any) -> dict[str, Any]:
        found = {**original(*args), "sub_group_size": SUB_GROUP}
        if "offload_param" in found and "nvme_path" in found["offload_param"]:
            found["offload_param"]["max_in_cpu"] = 0
        return found

    zero_config._offload = small
    runtime, disk, saved = Runtime.start(), Path(folder) / "disk", Path(folder) / "saved"
    layout = {"zero": 3, "micro_batches": 2}
    layout |= {} if offload == "none" else {"offload": offload, "offload_path": str(disk)}

    def go_on(engine: Any, first: int, count: int) -> list[float]:
        return [engine.step(whole_batch(n, WIDE).split(world)[rank]).loss for n in range(first, first + count)]

    engine = engine_of(runtime, layout, precision, False, WIDE)
    engine.load(Path(start))
    losses = go_on(engine, 0, 2)
    before = pieces_of(engine)
    engine._state.rest()
    engine.save(saved, {"step": 2}, [])
    files = {str(path.relative_to(disk)): path.stat().st_size for path in disk.rglob("*.swp")}
    losses += go_on(engine, 2, 1)
    engine.close()
    engine = engine_of(runtime, layout, precision, False, WIDE)
    engine.load(saved)
    probe = whole_batch(9, WIDE).split(world)[rank]
    losses += [float(value.sum()) for value in engine.eval_features(probe.images).values()]
    after = pieces_of(engine)
    engine._state.rest()
    losses += go_on(engine, 2, 1)
    engine.close()
    return Ran(losses, before, after, files, [str(path) for path in disk.rglob(f"rank{rank}/*")])


@pytest.fixture(scope="module", autouse=True)
def libaio() -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        pytest.skip("DeepSpeed writes to disks with libaio, which is not installed (Debian: libaio-dev)")


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_start(tmp_path_factory.mktemp("start") / "start", WIDE)


@pytest.fixture(scope="module")
def in_memory(start: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    folder = str(tmp_path_factory.mktemp("memory"))
    return {name: run_ranks(train, 2, str(start), folder, "none", name)[0].losses for name in ("fp32", "bf16")}


@pytest.mark.parametrize(("offload", "precision"), CASES)
def test_what_is_on_a_disk_trains_like_what_is_in_memory(
    start: Path, tmp_path: Path, in_memory: dict[str, list[float]], offload: str, precision: str
) -> None:
    (tmp_path / "disk").mkdir()
    # the first time DeepSpeed compiles its file access
    ranks = run_ranks(train, 2, str(start), str(tmp_path), offload, precision, timeout=600)
    assert ranks[0].losses == pytest.approx(in_memory[precision], abs=1e-6)
    assert ranks[0].losses[2] == ranks[0].losses[-1], "it goes on where it was saved"
    states = [
        joined(spec_from_config(WIDE, "tiny"), [getattr(one, kind) for one in ranks]) for kind in ("saved", "loaded")
    ]
    assert states[0].keys() == states[1].keys()
    assert [name for name, value in states[0].items() if not torch.equal(value, states[1][name])] == []
    sizes = {
        kind: sum(size for name, size in ranks[0].files.items() if kind in name) for kind in ("optimizer", "params")
    }
    assert sizes["optimizer"] > 40e6, "the masters and both moments of most parameters"
    assert (sizes["params"] > 10e6) == (offload == "parameters"), sizes
    assert [one.left for one in ranks] == [[], []]
