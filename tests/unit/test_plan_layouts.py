"""Layouts: what the planner proposes divides and fits, its memory is that of real towers, its formulas are closed."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.giant_layouts import RECIPES, RESULTS, SCALES
from benchmarks.memory_model import kept_bytes, predicted_kept, shape_spec
from compt_megatron.chain.communication import traffic
from compt_megatron.chain.hardware import Hardware
from compt_megatron.chain.layouts import cheapest, divisors, nearest, obstacle, proposals
from compt_megatron.chain.member import Member, link_members
from compt_megatron.chain.memory import chunks_in_flight, estimate
from compt_megatron.chain.planner import check_recipe, make_plan
from compt_megatron.chain.step_time import step_time
from compt_megatron.chain.workload import ParameterCounts, Workload, data_ranks
from compt_megatron.errors import UserError
from compt_megatron.recipe.load import load_recipe, recipe_from
from compt_megatron.recipe.parallel_section import ParallelSettings
from compt_megatron.spec.families import load_spec
from compt_megatron.spec.megatron_names import place_on_rank


def layout(**fields: Any) -> ParallelSettings:
    return ParallelSettings.model_validate(fields)


def megatron(**fields: Any) -> ParallelSettings:
    return layout(engine="megatron", **fields)


@pytest.fixture(scope="module")
def giants() -> dict[str, list[Member]]:
    return {name: link_members(load_recipe(name), None) for name in RECIPES}


@pytest.fixture(scope="module")
def small() -> Workload:
    return Workload(load_spec("compt-ViT-B-16"), load_spec("compt-ViT-S-16"), 1024, 2, "bf16")


# -- the giant models ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vit-e", "vit-22b"])
def test_giant_chains_grow_exactly(name: str, giants: dict[str, list[Member]]) -> None:
    """Every link from the one before it, without weights. The other recipes are the beginnings of these two."""
    check_recipe(load_recipe(name), 64, data=False)
    assert all(member.grow is not None and member.grow.operator == "exact" for member in giants[name][1:])
    for shorter in ("vit-h", "vit-g", "vit-bigg"):
        models = [member.spec.name for member in giants[shorter]]
        assert models == [member.spec.name for member in giants[name]][: len(models)]


@pytest.mark.parametrize("name", RECIPES)
def test_the_giants_own_layouts_fit(name: str, giants: dict[str, list[Member]]) -> None:
    room = Hardware().memory * Hardware().usable
    for index, member in enumerate(giants[name]):
        workload = Workload.of(member, giants[name][index - 1].spec if index else None)
        assert obstacle(member.spec, member.settings.parallel, workload.batch, 64) is None, member.name
        assert estimate(workload, member.settings.parallel, 64).total <= room, member.name


@pytest.mark.parametrize("name", RECIPES)
def test_the_recorded_layouts_divide_and_fit_80_gb(name: str, giants: dict[str, list[Member]]) -> None:
    """Every layout of docs/giants.md, from 8 to 512 GPUs, needs the memory that is recorded."""
    member, previous = giants[name][-1], giants[name][-2]
    workload = Workload.of(member, previous.spec)
    recorded = json.loads(RESULTS.read_text())["recipes"][name]
    assert [int(ranks) for ranks in recorded] == list(SCALES)
    for ranks, found in recorded.items():
        one = layout(**found["overrides"])
        assert one.model_dump() == found["layout"]
        assert obstacle(member.spec, one, workload.batch, int(ranks)) is None
        memory = estimate(workload, one, int(ranks)).total
        assert memory == pytest.approx(found["memory"]["total"])
        assert memory <= 0.9 * 80e9


def test_the_page_shows_the_recorded_layouts() -> None:
    from benchmarks.giant_layouts import PAGE

    page = PAGE.read_text()
    for name, found in json.loads(RESULTS.read_text())["recipes"].items():
        for ranks, one in found.items():
            assert f"| {name} | {ranks} | " in page
            assert f"| {one['memory']['total'] / 1e9:.0f} | {one['time']['total']:.3g} |" in page


# -- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["narrow", "deep"])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_activations_are_those_of_a_real_tower(shape: str, recompute: str) -> None:
    spec = shape_spec(shape)
    measured = kept_bytes(spec, torch.float32, recompute)
    assert predicted_kept(spec, "fp32", recompute) == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 1), (4, 4), (2, 12)])
def test_a_ranks_parameters_are_those_of_its_shards(tensor: int, pipeline: int) -> None:
    """Against the shapes that megatron's ranks have; fused tensors have one place for their parts."""
    spec = load_spec("compt-ViT-B-16")
    for stage in {0, pipeline - 1}:
        own = 0.0
        for name, param in spec.params.items():
            where = 0 if param.stage == "pre" else pipeline - 1
            if param.layer is not None:
                where = param.layer * pipeline // spec.towers[param.tower].layers
            if where == stage:
                parts = 3 if param.part is not None else 1
                own += torch.Size(place_on_rank(spec, name, tensor).shape).numel() / parts
        counted = ParameterCounts.of(spec).on_rank(megatron(tensor=tensor, pipeline=pipeline), stage)
        assert counted == pytest.approx(own)


def test_what_each_kind_of_parallelism_saves(small: Workload) -> None:
    def total(world: int, one: ParallelSettings) -> Any:
        return estimate(small, one, world)

    whole = total(1, megatron())
    split = total(2, megatron(tensor=2))
    sequence = total(2, megatron(tensor=2, sequence=True))
    assert whole.weights / 2 < split.weights < 0.53 * whole.weights
    assert sequence.activations < split.activations < whole.activations
    assert total(8, megatron(zero=1)).optimizer == pytest.approx(whole.optimizer / 8)
    assert total(1, megatron(recompute="full")).activations < 0.3 * whole.activations
    assert total(1, megatron(micro_batches=8)).activations < 0.2 * whole.activations
    assert total(4, layout(zero=3, offload="parameters")).weights == 0
    cut = megatron(tensor=2, micro_batches=256)
    assert estimate(replace(small, teacher_ranks=2), cut, 2).teacher < 0.6 * total(2, cut).teacher
    # a pipeline's first stage has as many micro-batches in flight as there are stages: about all layers of one
    one = estimate(small, megatron(pipeline=4, micro_batches=16), 4).activations
    many = estimate(small, megatron(pipeline=4, micro_batches=64), 4).activations
    assert many == pytest.approx(one / 4, rel=0.35)


@pytest.mark.parametrize(
    ("one", "stage", "expected"),
    [
        (megatron(pipeline=4, micro_batches=8), 0, 4),
        (megatron(pipeline=4, micro_batches=8), 3, 1),
        (megatron(pipeline=4, micro_batches=2), 0, 2),
        (megatron(pipeline=4, micro_batches=8, virtual=2), 0, 11),
        (megatron(pipeline=4, micro_batches=8, virtual=2), 3, 5),
    ],
)
def test_chunks_in_flight(one: ParallelSettings, stage: int, expected: int) -> None:
    assert chunks_in_flight(one, stage) == expected


# -- communication and time ------------------------------------------------------------------------------------------


def sent(workload: Workload, one: ParallelSettings, world: int) -> dict[str, float]:
    return {part.purpose: part.bytes for part in traffic(workload, one, world)}


def test_one_rank_sends_nothing(small: Workload) -> None:
    assert traffic(small, layout(), 1) == []


def test_tensor_parallel_volume_is_four_all_reduces_a_block(small: Workload) -> None:
    tower = small.spec.towers["vision"]
    stream = 1024 * tower.tokens * tower.width * 2
    assert sent(small, megatron(tensor=2), 2)["vision blocks"] == 12 * 4 * 2 * (1 / 2) * stream
    # full recomputation does the forward pass's two again, cached gradients too
    again = sent(small, megatron(tensor=2, recompute="full", micro_batches=2), 2)["vision blocks"]
    assert again == 12 * 8 * 2 * (1 / 2) * stream


def test_data_parallel_volumes(small: Workload) -> None:
    params = small.spec.numel
    share = 3 / 4
    assert sent(small, megatron(zero=0), 4)["gradients"] == 2 * share * 4 * params
    distributed = sent(small, megatron(zero=1), 4)
    assert (distributed["gradients"], distributed["weights"]) == (share * 4 * params, share * 2 * params)
    assert sent(small, layout(zero=2, micro_batches=4), 4)["gradients"] == 4 * 2 * share * 2 * params
    assert sent(small, layout(zero=3, micro_batches=4), 4)["gradients"] == 4 * share * 2 * params


def test_pipeline_volume_and_bubble(small: Workload) -> None:
    one = megatron(pipeline=4, virtual=1, micro_batches=8)
    tower = small.spec.towers["vision"]
    stream = 1024 / 8 * tower.tokens * tower.width * 2
    assert sent(small, one, 4)["vision stages"] == 3 * 8 * stream
    plain = step_time(small, one, 4, Hardware())
    chunked = step_time(small, megatron(pipeline=4, virtual=3, micro_batches=8), 4, Hardware())
    piped = plain.compute + plain.recompute + plain.tensor + plain.pipeline
    assert plain.bubble == pytest.approx(piped * 3 / 8, rel=0.01)
    assert chunked.bubble < 0.5 * plain.bubble
    assert chunked.pipeline > plain.pipeline


# -- proposals -------------------------------------------------------------------------------------------------------


def test_proposals_work_and_are_sorted(small: Workload) -> None:
    found = proposals(small, 16, Hardware(memory=20e9))
    assert len(found) > 50
    best = min(one.time.total for one in found)
    assert found[0].time.total <= 1.02 * best
    for one in found:
        assert one.memory.total <= 18e9
        checked = layout(**one.layout.model_dump())  # the section's own rules
        assert obstacle(small.spec, checked, small.batch, 16) is None
        assert data_ranks(checked, 16) * checked.tensor * checked.pipeline == 16
    assert {one.layout.engine for one in found} == {"deepspeed", "megatron"}
    assert cheapest(small, 16, Hardware(memory=1e8)) is None


def test_nearest_layouts_work() -> None:
    spec = load_spec("compt-ViT-B-16")
    for world in (1, 6, 8, 24):
        for tensor, pipeline, micro_batches in ((5, 1, 1), (1, 5, 1), (3, 2, 7), (8, 8, 4)):
            wrong = megatron(tensor=tensor, pipeline=pipeline, micro_batches=micro_batches)
            near = nearest(spec, wrong, 1536, world)
            assert near is not None
            assert obstacle(spec, near, 1536, world) is None


def test_a_teacher_larger_than_its_student_is_refused() -> None:
    values = {
        "name": "r",
        "data": {"train": "emoji/train", "batch_size": 64},
        "optimizer": {"lr": 0.001},
        "links": [
            {"model": "compt-ViT-S-16", "epochs": 1},
            {"model": "compt-ViT-T-16", "epochs": 1, "grow": None, "align": {}},
        ],
    }
    with pytest.raises(UserError, match=r"its teacher compt-ViT-S-16 has .* parameters, more than its own"):
        check_recipe(recipe_from(values), data=False)


def test_the_plan_says_what_does_not_fit_and_holds_everything() -> None:
    plan = make_plan(load_recipe("vit-h", ["links.H.parallel.zero=0", "links.H.parallel.recompute=none"]), 8)
    assert any(note.startswith("H: its layout needs ") and "the cheapest that fits is " in note for note in plan.notes)
    link = json.loads(json.dumps(plan.to_dict()))["links"][1]
    assert link["memory"]["total"] > 80e9
    assert {"layout", "memory", "time", "traffic", "cheapest", "scaling", "samples_per_second"} <= set(link)
    assert link["cheapest"]["memory"]["total"] <= 72e9


def test_a_plan_takes_the_fewest_ranks_that_its_layouts_allow() -> None:
    """The least common multiple of tensor x pipeline over the links."""
    values = {
        "name": "r",
        "data": {"train": "emoji/train", "batch_size": 96, "samples": 960},
        "optimizer": {"lr": 0.001},
        "links": [
            {"model": "clip-emoji-s", "epochs": 1, "parallel": {"engine": "megatron", "tensor": 2, "pipeline": 2}},
            {"model": "clip-emoji-m", "epochs": 1, "grow": {}, "align": {}, "parallel": {"micro_batches": 2}},
        ],
    }
    assert make_plan(recipe_from(values)).world == 4


def test_divisors() -> None:
    for number in (1, 12, 16, 97, 360):
        assert divisors(number) == [n for n in range(1, number + 1) if number % n == 0]


def test_the_link_whose_layout_fits_nowhere_is_to_blame() -> None:
    """Not the one before it, whose batch cannot be shared out over the ranks that the impossible layout asks for."""
    recipe = load_recipe("vit-g", ["links.1.parallel.tensor=3"])
    with pytest.raises(UserError, match=r"links\.1 \(H\): parallel\.tensor is 3.*on 2 ranks is tensor: 2"):
        check_recipe(recipe, 3, data=False)
