"""One layout after another on the same start and batches, and how near to one process they come.

What the tests of parallel training and `benchmarks/layouts.py` share.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from compt_megatron.spec.families import spec_from_config
from tests.distributed.engine_cases import BETAS, Pieces, engine_of, joined, pieces_of, whole_batch
from tests.distributed.spawn import run_ranks

CONFIG: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 32, "layers": 4, "head_width": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 4, "layers": 4},
}
PLAIN: dict[str, Any] = {key: value for key, value in CONFIG.items() if key != "text_cfg"}
LINEAR = torch.nn.functional.linear
Layout = dict[str, Any]
State = dict[str, torch.Tensor]


def layout(engine: str, tensor: int = 1, pipeline: int = 1, virtual: int = 1, **options: Any) -> Layout:
    """A recipe's section `parallel`."""
    options = {"zero": 1, **options}
    return {"engine": engine, "tensor": tensor, "pipeline": pipeline, "virtual": virtual, **options}


@dataclass(frozen=True)
class Case:
    """A run of `steps` steps: a model, a layout of it, whether it has a teacher (and projections), and a precision."""

    parallel: Layout
    steps: int
    aligned: bool = False
    precision: str = "fp32"
    config: dict[str, Any] = field(default_factory=lambda: CONFIG)
    optimizer: dict[str, Any] = field(default_factory=dict)
    factors: dict[str, tuple[float, float]] = field(default_factory=dict)  # on learning rate and weight decay


@dataclass
class Ran:
    """What came of a case: losses with their parts, gradient norms, masters and moments after the first and the last
    step by canonical names (`weight/...`, `exp_avg/...`; `exp_avg_sq/...` after the last alone), features of a batch,
    optimizer steps counted."""

    losses: list[tuple[float, ...]]
    norms: list[float]
    first: Any
    last: Any
    features: State
    count: int
    seconds: float = 0.0


def train(rank: int, world: int, start: str, cases: list[Case]) -> list[Ran]:
    """One rank's part of every case: states are its pieces."""
    from compt_megatron.engine.runtime import Runtime

    runtime = Runtime.start()
    return [_train_one(runtime, Path(start), case) for case in cases]


def _train_one(runtime: Any, start: Path, case: Case) -> Ran:
    from time import perf_counter

    engine = engine_of(
        runtime, case.parallel, case.precision, case.aligned, case.config, case.factors, **case.optimizer
    )
    assert torch.nn.functional.linear is LINEAR, "ZeRO 3 has replaced torch's linear for the whole process"
    engine.load(start)
    place, began = engine.topology, perf_counter()
    losses, norms, first = [], [], []
    for step in range(case.steps):
        result = engine.step(whole_batch(step, case.config).split(place.data)[place.data_rank])
        losses.append((result.loss, *(result.parts[name] for name in sorted(result.parts))))
        norms.append(result.grad_norm)
        if step == 0:
            first = pieces_of(engine, ["weight", "exp_avg"])
    seconds = perf_counter() - began
    features = _features(engine, whole_batch(99, case.config))
    found = Ran(losses, norms, first, pieces_of(engine), features, engine._state.step, seconds)
    engine.close()
    return found


def _features(engine: Any, probe: Any) -> State:
    """Features of a batch; of a language model its loss."""
    if engine.spec.is_language_model:
        own = probe.split(engine.topology.data)[engine.topology.data_rank]
        return {name: torch.tensor(value) for name, value in engine.eval_loss(own).items()}
    features = engine.eval_features(probe.images, None if probe.texts is None else probe.texts.flatten(0, 1))
    return {key: value.detach().clone() for key, value in features.items()}


def outcomes(start: Path, cases: list[Case], world: int, timeout: float = 120) -> list[Ran]:
    """Every case in one job of `world` ranks, states joined. Fails where ranks do not agree in every bit."""
    ranks = run_ranks(train, world, str(start), cases, timeout=timeout)
    return [_joined(case, [rank[index] for rank in ranks]) for index, case in enumerate(cases)]


def _joined(case: Case, ranks: list[Ran]) -> Ran:
    spec, ran = spec_from_config(case.config, "tiny"), ranks[0]
    for other in ranks[1:]:
        assert other.losses == ran.losses, f"{case.parallel}: the ranks report different losses"
        assert other.norms == ran.norms, f"{case.parallel}: the ranks report different gradient norms"
        assert other.count == ran.count, f"{case.parallel}: the ranks count different steps"
    pieces: list[list[Pieces]] = [[rank.first for rank in ranks], [rank.last for rank in ranks]]
    first, last = (joined(spec, of_ranks) for of_ranks in pieces)
    return Ran(ran.losses, ran.norms, first, last, ran.features, ran.count, max(rank.seconds for rank in ranks))


def uneven(engine: Any) -> list[str]:
    """Parameters whose weight in the model is not the optimizer's fp32 copy in the model's dtype."""
    found = []
    for held in engine._checkpoint._held:
        if getattr(held.param, "ds_tensor", None) is not None:
            continue  # ZeRO 3 holds a piece; the next forward pass gathers it
        master = engine._state.master(held.param)
        if not torch.equal(held.param.detach(), master.to(held.param.dtype)):
            found.append(held.names[0])
    return found


def of(state: State, kind: str) -> State:
    """One kind of state. A key's bias changes no attention: its gradient is rounding, which Adam makes a whole step."""
    return {name: value for name, value in state.items() if name.startswith(f"{kind}/") and "k_proj.bias" not in name}


def gradient(ran: Ran) -> State:
    """The gradient of the first step: its moment began at zero."""
    return {name: value / (1 - BETAS[0]) for name, value in of(ran.first, "exp_avg").items()}


def distance(found: State, wanted: State) -> float:
    """The worst relative L2 error of a tensor; of those below a thousandth of the whole, relative to that scale."""
    assert found.keys() == wanted.keys(), found.keys() ^ wanted.keys()
    floor = 1e-3 * torch.stack([value.norm() for value in wanted.values()]).norm()
    return max(float((found[name] - value).norm() / value.norm().clamp_min(floor)) for name, value in wanted.items())


def loss_distance(found: Ran, wanted: Ran) -> float:
    """The largest difference of a loss, or of a part of one, in any step."""
    rows = zip(found.losses, wanted.losses, strict=True)
    return max(abs(a - b) for mine, theirs in rows for a, b in zip(mine, theirs, strict=True))
