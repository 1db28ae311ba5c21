"""Tensor, pipeline, virtual pipeline, data parallelism and ZeRO: the losses, gradients and weights of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from compt_megatron.spec.families import spec_from_config
from tests.distributed.engine_cases import STEPS, engine_of, joined, pieces_of, whole_batch, write_start
from tests.distributed.spawn import run_ranks

CONFIG: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 32, "layers": 4, "head_width": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 4, "layers": 4},
}
Layout = dict[str, Any]


def train(rank: int, world: int, start: str, layout: Layout, precision: str, aligned: bool) -> Any:
    from compt_megatron.engine.runtime import Runtime

    runtime = Runtime.start()
    engine = engine_of(runtime, layout, precision, aligned, CONFIG)
    engine.load(Path(start))
    place = engine.topology
    losses, norms, first = [], [], []
    for step in range(STEPS):
        result = engine.step(whole_batch(step).split(place.data)[place.data_rank])
        losses.append((result.loss, *result.parts.values()))
        norms.append(result.grad_norm)
        if step == 0:
            first = pieces_of(engine)
    features = engine.eval_features(whole_batch(9).images, whole_batch(9).texts.flatten(0, 1))
    found = losses, norms, first, pieces_of(engine), {key: value.detach() for key, value in features.items()}
    engine.close()
    return found


def outcome(start: Path, layout: Layout, world: int, precision: str, aligned: bool) -> Any:
    """Losses, gradient norms, state after the first and the last step, features: all ranks agree, or this fails."""
    ranks = run_ranks(train, world, str(start), layout, precision, aligned)
    losses, norms, *_ = ranks[0]
    for other in ranks[1:]:
        assert other[0] == losses
        assert other[1] == norms
    spec = spec_from_config(CONFIG, "tiny")
    features = ranks[0][4]
    return losses, norms, joined(spec, [rank[2] for rank in ranks]), joined(spec, [rank[3] for rank in ranks]), features


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_start(tmp_path_factory.mktemp("start") / "start", CONFIG)


_expected: dict[bool, Any] = {}


def expected(start: Path, aligned: bool) -> Any:
    """One process that sees the whole batch at once, itself compared with open_clip's model in test_engine.py."""
    if aligned not in _expected:
        _expected[aligned] = outcome(start, {"zero": 0}, 1, "fp32", aligned)
    return _expected[aligned]


def close(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], limit: float) -> None:
    """Relative L2 error, of what is not a thousandth of the whole; the rest is held to that scale."""
    assert found.keys() == wanted.keys()
    floor = 1e-3 * torch.stack([value.norm() for value in wanted.values()]).norm()
    for name, value in wanted.items():
        error = (found[name] - value).norm() / value.norm().clamp_min(floor)
        assert error < limit, f"{name}: {error}"


def of(state: dict[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
    """One kind of state. A key's bias changes no attention: its gradient is rounding, which Adam makes a whole step."""
    return {name: value for name, value in state.items() if name.startswith(f"{kind}/") and "k_proj.bias" not in name}


def layout(engine: str, tensor: int = 1, pipeline: int = 1, virtual: int = 1, **options: Any) -> Layout:
    options = {"zero": 1, **options}
    return {"engine": engine, "tensor": tensor, "pipeline": pipeline, "virtual": virtual, **options}


LAYOUTS = [
    (layout("deepspeed", 2, zero=0), 2),
    (layout("megatron"), 1),
    (layout("megatron", zero=0, micro_batches=2), 2),
    (layout("megatron", 2, 1, micro_batches=4, sequence=True), 4),
    (layout("megatron", 1, 2), 2),
    (layout("megatron", 2, 2, micro_batches=4), 4),
    (layout("megatron", 1, 2, 2, micro_batches=4), 4),
]


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize(("parallel", "world"), LAYOUTS, ids=str)
def test_every_layout_takes_the_steps_of_one_process(start: Path, parallel: Layout, world: int, aligned: bool) -> None:
    losses, norms, first, last, features = outcome(start, parallel, world, "fp32", aligned)
    wanted = expected(start, aligned)
    assert losses == [pytest.approx(loss, abs=1e-4) for loss in wanted[0]]
    assert norms == pytest.approx(wanted[1], rel=1e-4)
    close(of(first, "exp_avg"), of(wanted[2], "exp_avg"), 1e-5)  # after one step: the gradient itself
    for kind in ("weight", "exp_avg", "exp_avg_sq"):
        close(of(last, kind), of(wanted[3], kind), 1e-3)
    assert features.keys() == wanted[4].keys()
    close(features, wanted[4], 1e-4)
