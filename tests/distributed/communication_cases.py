"""One training step of a layout, traced, beside what the planner's formulas say of it.

What the test of communication and `benchmarks/communication.py` share.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import lcm
from pathlib import Path
from typing import Any

import torch.distributed as dist

from compt_megatron.chain.communication import Traffic, ring, traffic
from compt_megatron.chain.workload import BYTES, Workload, data_ranks
from compt_megatron.models.part import ModelPart
from compt_megatron.recipe.parallel_section import ParallelSettings
from compt_megatron.recipe.section import Precision
from compt_megatron.spec.cost import at_length
from compt_megatron.spec.families import spec_from_config
from compt_megatron.spec.table import ModelSpec
from tests.distributed.communication_trace import CommunicationTrace
from tests.distributed.engine_cases import CAPTIONS, ROWS, TEACHER, engine_of, whole_batch
from tests.distributed.layout_cases import CONFIG

LEARNING = 1  # steps before the one that is counted: in the first a pipeline agrees on the names of its losses,
LEARNING_ZERO_3 = 2  # and DeepSpeed's stage 3 learns its order in the first two
GRADIENTS, WEIGHTS = ("all_reduce", "reduce_scatter"), ("all_gather",)


@dataclass(frozen=True)
class Counted:
    """A layout (a recipe's section `parallel`) of a model, on a number of ranks."""

    world: int
    parallel: dict[str, Any]
    precision: Precision = "fp32"
    aligned: bool = False
    config: dict[str, Any] = field(default_factory=lambda: CONFIG)


Found = dict[str, tuple[float, int]]  # tensor, pipeline, gradients, weights, features, teacher -> bytes sent, calls


def count(rank: int, world: int, starts: list[str], cases: list[Counted]) -> list[Found]:
    """What this rank sent in a step of each case, each from its checkpoint."""
    from compt_megatron.engine.runtime import Runtime

    runtime = Runtime.start()
    return [_count_one(runtime, Path(start), case) for start, case in zip(starts, cases, strict=True)]


def _count_one(runtime: Any, start: Path, case: Counted) -> Found:
    engine = engine_of(runtime, case.parallel, case.precision, case.aligned, case.config)
    engine.load(start)
    place = engine.topology
    batch = whole_batch(0, case.config).split(place.data)[place.data_rank]
    for _ in range(LEARNING_ZERO_3 if case.parallel["zero"] == 3 else LEARNING):
        engine.step(batch)
    with CommunicationTrace() as trace:
        engine.step(batch)
    tensor, pipeline, data, model = (
        tuple(dist.get_process_group_ranks(group))
        for group in (place.tensor_group, place.pipeline_group, place.data_group, place.model_group)
    )
    found = {
        "tensor": trace.total(tensor) if len(tensor) > 1 else (0.0, 0),
        "pipeline": trace.total(pipeline) if len(pipeline) > 1 else (0.0, 0),
        "gradients": trace.total(data, kinds=GRADIENTS) if len(data) > 1 else (0.0, 0),
        "weights": trace.total(data, kinds=WEIGHTS) if len(data) > 1 else (0.0, 0),
        "features": trace.total(data, "features"),
        "teacher": trace.total(model, "teacher"),
    }
    engine.close()
    return {name: value for name, value in found.items() if value[0]}


def predicted(case: Counted) -> dict[str, tuple[float, float]]:
    """The same by the planner's formulas, for the rank that sends most of each; with the padding that the engines add
    to parameters, which the formulas leave out."""
    spec = spec_from_config(case.config, "tiny")
    layout = ParallelSettings.model_validate(case.parallel)
    if spec.is_language_model:
        workload = Workload(at_length(spec, whole_batch(0, case.config).tokens.shape[1]), None, ROWS, 1, case.precision)
    else:
        teacher = spec_from_config({**TEACHER, **case.config, "embed_dim": TEACHER["embed_dim"]}, "teacher")
        workload = Workload(spec, teacher if case.aligned else None, ROWS, CAPTIONS, case.precision)
    found: dict[str, tuple[float, float]] = {}
    for part in traffic(workload, layout, case.world):
        name = {"data": part.purpose, "model": "teacher"}.get(part.group, part.group)
        sent, calls = found.get(name, (0.0, 0.0))
        found[name] = (sent + part.bytes + padding(case, spec, layout, part), calls + part.calls)
    return {name: (round(sent), calls) for name, (sent, calls) in found.items()}


def padding(case: Counted, spec: ModelSpec, layout: ParallelSettings, part: Traffic) -> float:
    """Bytes that a rank of the first stage sends of the padding of gradients or weights (see the engines' own code)."""
    if part.group != "data" or part.purpose not in ("gradients", "weights") or layout.zero == 0:
        return 0.0
    ranks = data_ranks(layout, case.world)
    own = ModelPart(spec, layout.tensor, 0, layout.pipeline, 0, layout.virtual)
    chunks = [
        {names[0]: sum(_numel(own.shape(name)) for name in names) for names in own.names(chunk).values()}
        for chunk in range(layout.virtual)
    ]
    sizes = chunks[0]  # all there is, but for a virtual pipeline
    total = sum(sum(chunk.values()) for chunk in chunks)
    if layout.engine == "megatron":  # each parameter begins at a multiple of 64, each chunk's buffer ends at one of 128
        whole = sum(_up(sum(_up(size, 64) for size in chunk.values()), lcm(ranks, 128)) for chunk in chunks)
    elif layout.zero == 3:  # each is cut evenly
        whole = sum(_up(size, ranks) for size in sizes.values())
        if part.purpose == "weights":  # what does not divide is small, and gathered once
            return (whole - total) * BYTES[case.precision] * ring(ranks)
    elif part.purpose == "gradients" and (case.precision, layout.zero) != ("bf16", 1):
        whole = total
    else:  # each parameter group is cut evenly, at multiples of two
        groups = {True: 0, False: 0}
        for name, size in sizes.items():
            groups[spec.params[name].decays] += size
        whole = sum(_up(size, 2 * ranks) for size in groups.values())
    return part.bytes * (whole / total - 1)


def _numel(shape: tuple[int, ...]) -> int:
    found = 1
    for size in shape:
        found *= size
    return found


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
