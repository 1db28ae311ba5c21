"""The cheapest layouts of the packaged chains of language models on 8 to 512 GPUs of 80 GB, every link, and their cost.

    python benchmarks/language_layouts.py

Predictions, nothing is measured. Every layout is built without weights: the first and the last stage on no device, in
process groups that send nothing, and their parameters counted against the planner's. Writes
benchmarks/results/language_layouts.json and the tables of docs/language_giants.md; a test checks every layout of that
file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from compt_megatron.chain.hardware import Hardware
from compt_megatron.chain.layouts import Proposal
from compt_megatron.chain.planner import SCALES, MemberPlan, Plan, make_plan
from compt_megatron.chain.workload import ParameterCounts
from compt_megatron.observe.numbers import human
from compt_megatron.recipe.load import load_recipe
from compt_megatron.recipe.parallel_section import ParallelSettings
from compt_megatron.spec.families import load_spec
from compt_megatron.spec.table import ModelSpec

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "language_layouts.json"
PAGE = ROOT / "docs" / "language_giants.md"
RECIPES = ("gpt3-6.7b", "llama-8b")
RANKS = 64  # what the recipes' own layouts are for


def built_parameters(spec: ModelSpec, layout: ParallelSettings, stage: int) -> int:
    """Parameters of the first tensor-parallel rank of a pipeline stage, built on no device in groups that send nothing.
    Replaces torch's and megatron's process groups of this process."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from compt_megatron.models.build import build_language_model

    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    world = layout.tensor * layout.pipeline
    dist.init_process_group("fake", store=FakeStore(), rank=stage * layout.tensor, world_size=world)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual if layout.virtual > 1 else None,
        create_gloo_process_groups=False,
    )
    chunks = [
        build_language_model(spec, dtype=torch.bfloat16, sequence=layout.sequence, chunk=chunk, meta=True)
        for chunk in range(layout.virtual)
    ]
    return sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters())


def shapes_of(plan: Plan) -> Iterator[tuple[str, ParallelSettings]]:
    """(model, layout) of a plan: its own and all that it proposes, one of each way to cut the model."""
    seen = set()
    for link in plan.links:
        for one in (link.own, *link.scaling.values()):
            assert one is not None, f"{link.name}: nothing fits"
            key = (link.model, one.layout.tensor, one.layout.pipeline, one.layout.virtual, one.layout.sequence)
            if key not in seen:
                seen.add(key)
                yield link.model, one.layout


def check_built(spec: ModelSpec, layout: ParallelSettings) -> None:
    """Assert that the first and the last stage have as many parameters as the planner counts."""
    for stage in {0, layout.pipeline - 1}:
        said, built = ParameterCounts.of(spec).on_rank(layout, stage), built_parameters(spec, layout, stage)
        assert built == said, f"{spec.name} {layout}: stage {stage} has {built} parameters, the planner counts {said}"


def cost_table(plans: list[Plan]) -> str:
    """What each link costs, and each model alone."""
    lines = [
        "| link | parameters | tokens | MACs, train + teacher | GPU-hours | alone, MACs | alone, GPU-hours | share |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for plan in plans:
        for link in plan.links:
            cells = (
                f"{plan.name} {link.name}", f"{link.parameters:,}", human(link.tokens), human(link.macs["total"]),
                human(link.hours), human(link.alone_macs), human(link.alone_hours), _percent(link.share),
            )  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
        total = (
            f"**{plan.name}, all**", "", "", human(plan.total_macs), human(plan.hours), human(plan.alone_macs),
            human(plan.alone_hours), _percent(plan.total_macs / (plan.alone_macs or 1)),
        )  # fmt: skip
        lines.append("| " + " | ".join(total) + " |")
    return "\n".join(lines) + "\n"


def _percent(share: float | None) -> str:
    return f"{100 * (share or 0):.0f} %"


def layout_table(plans: list[Plan]) -> str:
    """Efficiency: tokens/s of a GPU against those on the fewest GPUs."""
    lines = [
        "| link | GPUs | `parallel` | GB a GPU | step, s | MFU | tokens/s | efficiency |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for plan in plans:
        for link in plan.links:
            lines += [f"| {plan.name} {link.name} | {cells} |" for cells in _scaling(link)]
    return "\n".join(lines) + "\n"


def _scaling(link: MemberPlan) -> Iterator[str]:
    length = (link.tokens or 0) / link.samples
    found = {ranks: one for ranks, one in link.scaling.items() if one is not None}
    first = next(iter(found.values()))
    for ranks, one in found.items():
        share = one.samples_per_second / ranks / (first.samples_per_second / first.ranks)
        yield " | ".join(
            (
                str(ranks), f"`{one.describe()}`", f"{one.memory.total / 1e9:.0f}", f"{one.time.total:.3g}",
                _percent(one.time.mfu), human(one.samples_per_second * length), _percent(share),
            )
        )  # fmt: skip


def _plain(one: Proposal | None) -> dict[str, Any] | None:
    return None if one is None else one.to_dict() | {"overrides": one.overrides()}


def recorded(plan: Plan) -> dict[str, Any]:
    """What is kept of a plan: of each link its cost, its own layout, and the cheapest for each number of GPUs."""
    costs = ("model", "parameters", "tokens", "macs", "hours", "alone_macs", "alone_hours")
    return {
        link.name: {name: getattr(link, name) for name in costs}
        | {"own": _plain(link.own), "scaling": {ranks: _plain(one) for ranks, one in link.scaling.items()}}
        for link in plan.links
    }


def _between(page: str, name: str, table: str) -> str:
    mark, end = f"<!-- {name}: written by `python benchmarks/language_layouts.py` -->\n", f"<!-- end of {name} -->"
    before, _, rest = page.partition(mark)
    return f"{before}{mark}\n{table}\n{end}{rest.partition(end)[2]}"


def main() -> None:
    plans = []
    for name in RECIPES:
        plans.append(make_plan(load_recipe(name), RANKS, scaling=True))
        for link in plans[-1].links:
            assert list(link.scaling) == list(SCALES)
            print(link.name, *(f"{n}: {one.describe()};" for n, one in link.scaling.items() if one), flush=True)
    built = 0
    for plan in plans:
        for model, layout in shapes_of(plan):
            check_built(load_spec(model), layout)
            built += 1
    print(f"{built} ways to cut a model built without weights, parameters of first and last stage as counted")
    plain = {"hardware": asdict(Hardware()), "ranks": RANKS, "recipes": {plan.name: recorded(plan) for plan in plans}}
    RESULTS.write_text(json.dumps(plain, indent=1) + "\n")
    page = _between(PAGE.read_text(), "costs", cost_table(plans))
    PAGE.write_text(_between(page, "layouts", layout_table(plans)))


if __name__ == "__main__":
    main()
