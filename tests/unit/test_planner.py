"""Costs of a chain: the paper's figures, the arithmetic of a plan, and what it refuses before anything starts."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from compt_megatron.chain.member import link_members
from compt_megatron.chain.planner import check_recipe, make_plan
from compt_megatron.errors import UserError
from compt_megatron.recipe.load import load_recipe, recipe_from
from compt_megatron.spec.cost import at_length, head_macs, sample_macs
from compt_megatron.spec.families import load_spec

PAPER = {"compt-ViT-T-16-text256": 128, "compt-ViT-S-16": 24, "compt-ViT-B-16": 18, "compt-ViT-L-16": 15}


def chain(models: dict[str, Any], **changes: Any) -> dict[str, Any]:
    links: list[dict[str, Any]] = [{"model": model, "epochs": epochs} for model, epochs in models.items()]
    for link in links[1:]:
        link |= {"grow": {"operator": "corner"}, "align": {}}
    data = {"train": "shards/x.tar", "batch_size": 1024, "captions": 7, "samples": 2_800_000}
    return {"name": "r", "data": data, "optimizer": {"lr": 0.001}, "links": links, **copy.deepcopy(changes)}


@pytest.mark.parametrize(
    ("epochs", "share", "speed_up"),
    [
        ([128, 24, 18, 15], 0.281, 5.57),
        ([128, 24, 15], 0.359, None),
        ([128, 15], 0.486, None),
    ],
)
def test_the_papers_costs(epochs: list[int], share: float, speed_up: float | None) -> None:
    """A chain that ends in ViT-L as a share of ViT-L alone at the base's epochs: teachers counted, 7 captions."""
    models = dict(zip(list(PAPER)[-len(epochs) :], epochs))
    plan = make_plan(recipe_from(chain(models)))
    assert plan.last_share == pytest.approx(share, abs=6e-4)
    if speed_up is not None:
        assert plan.speed_up == pytest.approx(speed_up, abs=5e-3)


def test_shares_do_not_depend_on_the_size_of_the_data() -> None:
    known = make_plan(recipe_from(chain(PAPER)))
    values = chain(PAPER)
    del values["data"]["samples"]
    unknown = make_plan(recipe_from(values))
    assert unknown.samples_per_epoch is None
    assert any("data.samples" in note for note in unknown.notes)
    assert unknown.last_share == pytest.approx(known.last_share, rel=1e-6)
    assert all(link.steps is None for link in unknown.links)


def test_a_links_compute_is_three_forwards_and_the_teachers() -> None:
    values = chain({"compt-ViT-T-16": 4, "compt-ViT-S-16": 2}, controls=[{"link": "compt-ViT-S-16"}])
    values["data"] |= {"captions": 2, "samples": 10_300}
    values["links"][1]["align"] = {"end": 0.5}
    values["links"][1]["parallel"] = {"micro_batches": 2}
    plan = make_plan(recipe_from(values))
    small, large = (sample_macs(load_spec(f"compt-ViT-{size}-16"), 2) for size in "TS")
    base, link = plan.links
    assert (base.steps, base.samples, link.steps) == (40, 40 * 1024, 20)  # 10 whole steps an epoch
    assert base.macs == {"train": 3 * small * 40960, "teacher": 0, "extra": 0, "total": 3 * small * 40960}
    assert link.macs["train"] == 3 * large * 20480
    assert link.macs["teacher"] == small * 10240
    assert link.macs["extra"] == large * 20480
    assert plan.total_macs == base.macs["total"] + link.macs["train"] + link.macs["teacher"]
    assert plan.alone_macs == 3 * (small + large) * 40960
    control = plan.controls[0]
    assert control.macs["teacher"] == 0
    assert plan.total_macs - 3 * large * 1024 < control.macs["total"] <= plan.total_macs


def test_zero_stages_shard_the_model_states() -> None:
    memory = {}
    for zero in (0, 1, 2, 3):
        values = chain({"compt-ViT-S-16": 1}, parallel={"zero": zero})
        memory[zero] = make_plan(recipe_from(values), world=4).links[0].own.memory
    params = load_spec("compt-ViT-S-16").numel
    assert (memory[0].weights, memory[0].gradients, memory[0].optimizer) == (4 * params, 4 * params, 8 * params)
    # DeepSpeed's sharded optimizer has masters of fp32 weights too, and its update holds reduced gradients twice
    assert (memory[1].gradients, memory[1].optimizer) == (4 * params, 3 * params)
    assert (memory[2].weights, memory[2].gradients) == (4 * params, 2 * params)
    assert (memory[3].weights, memory[3].gradients, memory[3].optimizer) == (params, 2 * params, 3 * params)
    recomputed = (
        make_plan(recipe_from(chain({"compt-ViT-S-16": 1}, parallel={"recompute": "full"}))).links[0].own.memory
    )
    kept = make_plan(recipe_from(chain({"compt-ViT-S-16": 1}))).links[0].own.memory
    assert recomputed.activations < 0.5 * kept.activations


def test_language_models_are_counted_at_the_length_of_their_samples() -> None:
    long, short = (load_recipe("stdlib-lm", [f"data.length={length}", "data.samples=64000"]) for length in (256, 64))
    plan, other = make_plan(long), make_plan(short)
    for link, less, model in zip(plan.links, other.links, "sml"):
        forward = sample_macs(at_length(load_spec(f"llama-stdlib-{model}"), 256))
        assert link.macs["train"] == 3 * forward * link.samples
        assert link.own.memory.activations > 2 * less.own.memory.activations
        assert link.macs["extra"] == 0
        assert 3 < link.macs["train"] / less.macs["train"] < 8, "tokens, and attention on top"
    assert plan.links[1].macs["teacher"] == 0, "the recipe does not align"
    own, teacher = (at_length(load_spec(f"llama-stdlib-{model}"), 256) for model in "ms")
    states, logits = sample_macs(teacher) - head_macs(teacher), sample_macs(teacher) + 3 * head_macs(own)
    for section, taught in (("align", states), ("distill", logits)):
        recipe = load_recipe("stdlib-lm", ["data.length=256", "data.samples=64000", f"links.m.{section}={{end: 0.5}}"])
        link = make_plan(recipe).links[1]
        assert link.macs["teacher"] == taught * link.samples / 2
    assert plan.controls[0].macs["train"] == pytest.approx(plan.total_macs, rel=0.01)


@pytest.mark.parametrize("name", ["emoji", "cc3m", "cc3m-seven", "merged15m"])
def test_packaged_recipes_can_be_planned(name: str) -> None:
    plan = make_plan(load_recipe(name))
    assert plan.speed_up is not None
    assert plan.speed_up > 2
    assert plan.to_dict()["total"]["speed_up"] == plan.speed_up


def test_the_demo_is_counted_on_its_own_data() -> None:
    recipe = load_recipe("emoji")
    plan = make_plan(recipe)
    assert plan.samples_per_epoch is not None
    assert plan.samples_per_epoch > 7000
    steps = plan.samples_per_epoch // recipe.data.batch_size
    assert [link.steps for link in plan.links] == [link.epochs * steps for link in plan.links]


TWO = {"compt-ViT-T-16": 2, "compt-ViT-S-16": 1}


@pytest.mark.parametrize(
    ("changes", "world", "message"),
    [
        (
            {"links.1.parallel": {"tensor": 4}},
            4,
            "links.1 (compt-ViT-S-16): parallel.tensor is 4, which does not fit: its vision tower has 6 heads, which "
            "tensor does not divide; the nearest layout that works on 4 ranks is tensor: 2, pipeline: 1",
        ),
        (
            {"links.1.parallel": {"tensor": 2, "sequence": True}},
            1,
            "the nearest layout that works on 1 rank is tensor: 1, pipeline: 1, sequence: false",
        ),
        (
            {"links.1.parallel": {"tensor": 4}, "links.1.align": {"tensor": 4}},
            2,
            "the nearest layout that works on 2 ranks is tensor: 2, pipeline: 1, align.tensor: 2",
        ),
        (
            {"parallel": {"engine": "megatron", "pipeline": 5}},
            8,
            "parallel.pipeline is 5, which does not fit: its vision tower has 12 layers, which pipeline does not "
            "divide; the nearest layout that works on 8 ranks is tensor: 1, pipeline: 4",
        ),
        (
            {"parallel": {"engine": "megatron", "pipeline": 4, "virtual": 2, "micro_batches": 4}},
            4,
            "parallel.virtual is 2, which does not divide the 3 layers that each of 4 stages has of the vision tower; "
            "the nearest layout that works on 4 ranks is tensor: 1, pipeline: 4, virtual: 1, micro_batches: 4",
        ),
        (
            {"parallel": {"engine": "megatron", "pipeline": 4}},
            6,
            "6 ranks cannot be shared out: parallel.tensor 1 x parallel.pipeline 4 needs a multiple of 4; the nearest "
            "layout that works on 6 ranks is tensor: 1, pipeline: 3",
        ),
        (
            {"parallel": {"micro_batches": 3}},
            1,
            "data.batch_size 1024 is not divisible by 1 data-parallel ranks x 3 micro-batches (parallel.micro_batches)"
            "; the nearest layout that works on 1 rank is tensor: 1, pipeline: 1, micro_batches: 2",
        ),
        (
            {},
            3,
            "data.batch_size 1024 is not divisible by 3 data-parallel ranks x 1 micro-batches (parallel.micro_batches)"
            "; no layout works on 3 ranks; use another number of ranks, or data.batch_size 1023",
        ),
        ({"data.streams": 6}, 2, "data.streams is 6; it must divide data.batch_size 1024"),
        ({"objective": {"name": "siglip"}}, 1, "objective 'siglip' needs \"init_logit_bias\""),
        ({"objective": {"name": "classify"}}, 1, "objective 'classify' needs a model without text_cfg"),
        ({"links.1.model": "ViT-B-32"}, 1, "cannot grow from compt-ViT-T-16"),
        ({"links.0.model": "compt-ViT-B-16"}, 1, "cannot grow from compt-ViT-B-16"),
    ],
)
def test_what_cannot_work_is_refused(changes: dict[str, Any], world: int, message: str) -> None:
    values = chain(TWO)
    for dotted, value in changes.items():
        *parents, last = dotted.split(".")
        here: Any = values
        for part in parents:
            here = here[int(part)] if part.isdigit() else here[part]
        here[last] = value
    with pytest.raises(UserError) as caught:
        make_plan(recipe_from(values), world)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_shards_stop_a_run_but_not_a_plan() -> None:
    recipe = recipe_from(chain(TWO))
    make_plan(recipe)
    with pytest.raises(UserError, match=r"data.train: shards/x.tar does not exist"):
        check_recipe(recipe)


def test_steps_need_to_know_the_data() -> None:
    values = chain(TWO)
    del values["data"]["samples"], values["links"][1]["epochs"]
    values["links"][1]["steps"] = 30
    with pytest.raises(UserError, match=r"set data.samples"):
        make_plan(recipe_from(values))


@pytest.mark.parametrize(
    ("data", "message"),
    [({"augment": {"ratio": [0.9, 1.1]}}, "use_timm"), ({"train": "emoji/tain"}, "emoji has no split 'tain'")],
)
def test_a_run_checks_augmentation_and_sources_first(data: dict[str, Any], message: str) -> None:
    check_recipe(load_recipe("emoji"))
    with pytest.raises(UserError, match=message):
        check_recipe(load_recipe("emoji", [f"data.{key}={value}" for key, value in data.items()]))


def test_a_run_goes_on_after_its_data_have_moved() -> None:
    """What decides the weights is which shards, not where they lie."""
    recipe = load_recipe("cc3m")

    def identity(train: str) -> str:
        return link_members(load_recipe("cc3m", [f"data.train={train}"]), None)[0].identity

    assert link_members(recipe, None)[0].identity
    assert identity("/old/shards/{0..3}.tar") == identity("/new/{0..3}.tar")
    assert identity("/old/shards/{0..3}.tar") != identity("/old/shards/{0..4}.tar")
