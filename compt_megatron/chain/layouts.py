"""Which layouts a model, a batch and a number of ranks allow, which of them fit, and which is the cheapest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import isqrt
from typing import Any

from compt_megatron.chain.hardware import Hardware
from compt_megatron.chain.memory import Memory, estimate
from compt_megatron.chain.step_time import StepTime, step_time
from compt_megatron.chain.workload import Workload
from compt_megatron.checkpoint.contract import Layout
from compt_megatron.checkpoint.megatron_layout import MOST_RANKS
from compt_megatron.checkpoint.megatron_layout import obstacle as files_obstacle
from compt_megatron.recipe.parallel_section import ParallelSettings
from compt_megatron.spec.table import ModelSpec

_CHUNKS = (1, 2, 3, 4)  # virtual sizes that are proposed
_EQUAL = 1.02  # steps that take this much of the fastest count as equally fast


@dataclass(frozen=True)
class Proposal:
    """A layout with what it needs and how long its step takes on `ranks` ranks."""

    ranks: int
    layout: ParallelSettings
    memory: Memory
    time: StepTime
    batch: int

    @property
    def samples_per_second(self) -> float:
        return self.batch / self.time.total

    def overrides(self) -> dict[str, Any]:
        """The fields of `parallel` that differ from their defaults: what a recipe must say."""
        return self.layout.model_dump(exclude_defaults=True)

    def describe(self) -> str:
        """The same in words: `tensor: 2, recompute: full`."""
        return ", ".join(f"{name}: {_yaml(value)}" for name, value in self.overrides().items()) or "the default"

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for `--json`."""
        return {
            "ranks": self.ranks,
            "layout": self.layout.model_dump(),
            "memory": asdict(self.memory) | {"total": self.memory.total},
            "time": self.time.to_dict(),
            "samples_per_second": self.samples_per_second,
        }


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def misfit(spec: ModelSpec, layout: ParallelSettings) -> str | None:
    """Why a layout does not fit a model on any number of ranks, naming the field to blame first ("parallel.tensor is
    3, which ..."), or None."""
    for axis in ("tensor", "pipeline"):
        size = getattr(layout, axis)
        reason = _axis_obstacle(spec, Layout(**{axis: size}))
        if reason is not None:
            return f"parallel.{axis} is {size}, which does not fit: {reason}"
    reason = files_obstacle(spec, Layout(layout.tensor, layout.pipeline))
    if reason is not None:
        return f"parallel.tensor {layout.tensor} x parallel.pipeline {layout.pipeline} does not fit: {reason}"
    for tower in spec.towers.values():
        if tower.layers % (layout.pipeline * layout.virtual):
            whose = "" if spec.is_language_model else f" of the {tower.name} tower"
            return (
                f"parallel.virtual is {layout.virtual}, which does not divide the {tower.layers // layout.pipeline} "
                f"layers that each of {layout.pipeline} stages has{whose}"
            )
    return None


def _axis_obstacle(spec: ModelSpec, layout: Layout) -> str | None:
    """Why one of the sizes does not fit a model, or None. A language model's vocabulary is padded, of which every
    tensor-parallel rank must have an entry."""
    if (reason := files_obstacle(spec, layout)) is not None or not spec.is_language_model:
        return reason
    entries = next(iter(spec.params.values())).shape[0]
    if -(-entries // layout.tensor) * (layout.tensor - 1) >= entries:
        return f"its vocabulary of {entries} entries leaves tensor-parallel ranks without one"
    return None


def obstacle(spec: ModelSpec, layout: ParallelSettings, batch: int, world: int) -> str | None:
    """Why a layout cannot work with a batch on `world` ranks, or None."""
    reason = misfit(spec, layout)
    if reason is not None:
        return reason
    parts = layout.tensor * layout.pipeline
    if world % parts:
        return (
            f"{world} ranks cannot be shared out: parallel.tensor {layout.tensor} x parallel.pipeline "
            f"{layout.pipeline} needs a multiple of {parts}"
        )
    ranks = world // parts
    if batch % (ranks * layout.micro_batches):
        return (
            f"data.batch_size {batch} is not divisible by {ranks} data-parallel ranks x {layout.micro_batches} "
            "micro-batches (parallel.micro_batches)"
        )
    return None


def nearest(spec: ModelSpec, layout: ParallelSettings, batch: int, world: int) -> ParallelSettings | None:
    """The layout that works on `world` ranks with the fewest and smallest changes to `layout`; None: there is none."""

    def distance(one: ParallelSettings) -> tuple[float, ...]:
        sizes = [abs(getattr(one, axis) - getattr(layout, axis)) for axis in ("tensor", "pipeline", "virtual")]
        return sum(size > 0 for size in sizes), sum(sizes), abs(one.micro_batches - layout.micro_batches)

    found = []
    for tensor, pipeline in shapes(spec, world):
        if layout.engine == "deepspeed" and pipeline > 1:
            continue
        ranks = world // (tensor * pipeline)
        every = [count for count in divisors(batch // ranks) if batch % ranks == 0]
        for virtual in sorted({1, layout.virtual}) if pipeline > 1 else [1]:
            if any(tower.layers % (pipeline * virtual) for tower in spec.towers.values()):
                continue
            counts = [count for count in every if virtual == 1 or count % pipeline == 0]
            if counts:
                change = {
                    "tensor": tensor,
                    "pipeline": pipeline,
                    "virtual": virtual,
                    "sequence": layout.sequence and tensor > 1,
                    "micro_batches": min(counts, key=lambda count: abs(count - layout.micro_batches)),
                }
                found.append(layout.model_copy(update=change))
    return min(found, key=distance, default=None)


def shapes(spec: ModelSpec, world: int) -> list[tuple[int, int]]:
    """The (tensor, pipeline) sizes that a model allows on `world` ranks."""
    tensors = [size for size in divisors(world) if _axis_obstacle(spec, Layout(tensor=size)) is None]
    pipelines = [size for size in divisors(world) if _axis_obstacle(spec, Layout(pipeline=size)) is None]
    return [
        (tensor, pipeline)
        for tensor in tensors
        for pipeline in pipelines
        if world % (tensor * pipeline) == 0 and tensor * pipeline <= MOST_RANKS
    ]


def proposals(workload: Workload, world: int, hardware: Hardware) -> list[Proposal]:
    """The layouts that fit the memory of `world` ranks, by the time of a step; those within 2 % of the fastest count as
    equal and come first, the simplest before the others.

    Tensor parallelism stays within a node, and under `megatron` it is with sequence parallelism. Offload and
    selective recomputation are left out: the first is slower wherever another layout fits, the second saves next to
    nothing with fused attention.
    """
    room = hardware.memory * hardware.usable
    found = []
    for layout in _candidates(workload, world, hardware.per_node):
        memory = estimate(workload, layout, world)
        if memory.total <= room:
            found.append(Proposal(world, layout, memory, step_time(workload, layout, world, hardware), workload.batch))
    limit = _EQUAL * min((one.time.total for one in found), default=0.0)
    equal = sorted((one for one in found if one.time.total <= limit), key=_complexity)
    return equal + sorted((one for one in found if one.time.total > limit), key=lambda one: one.time.total)


def cheapest(workload: Workload, world: int, hardware: Hardware) -> Proposal | None:
    """The first of `proposals`, or None where nothing fits."""
    return next(iter(proposals(workload, world, hardware)), None)


def _complexity(one: Proposal) -> tuple[Any, ...]:
    layout = one.layout
    sizes = (layout.tensor * layout.pipeline, layout.pipeline, layout.virtual)
    return *sizes, layout.recompute != "none", layout.engine != "deepspeed", layout.zero, layout.micro_batches


def _candidates(workload: Workload, world: int, per_node: int) -> Iterator[ParallelSettings]:
    for tensor, pipeline in shapes(workload.spec, world):
        ranks = world // (tensor * pipeline)
        if tensor > per_node or workload.batch % ranks:
            continue
        for engine, zero, virtual in _engines(workload.spec, pipeline):
            for micro_batches in divisors(workload.batch // ranks):
                if virtual > 1 and micro_batches % pipeline:
                    continue
                for recompute in ("none", "full"):
                    yield ParallelSettings.model_construct(
                        engine=engine,
                        zero=zero,
                        tensor=tensor,
                        pipeline=pipeline,
                        virtual=virtual,
                        sequence=engine == "megatron" and tensor > 1,
                        micro_batches=micro_batches,
                        recompute=recompute,
                        offload="none",
                        offload_path=None,
                    )


def _engines(spec: ModelSpec, pipeline: int) -> Iterator[tuple[str, int, int]]:
    """(engine, ZeRO stage, virtual size) that go with a pipeline of that size."""
    if pipeline == 1:
        yield from (("deepspeed", zero, 1) for zero in (1, 2, 3))
    layers = [tower.layers for tower in spec.towers.values()]
    for virtual in _CHUNKS if pipeline > 1 else (1,):
        if not any(count % (pipeline * virtual) for count in layers):
            yield "megatron", 1, virtual


def divisors(number: int) -> list[int]:
    """All divisors, in order."""
    small = [n for n in range(1, isqrt(number) + 1) if number % n == 0]
    return small + [number // n for n in reversed(small) if n * n != number]
