"""Chains of language models for a cluster, without weights: growth, layouts, memory, time, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.language_layouts import PAGE, RANKS, RECIPES, RESULTS, SCALES, check_built
from benchmarks.language_memory import kept_bytes, peak_bytes, predicted_kept, predicted_peak, small_spec
from compt_megatron.chain.hardware import Hardware
from compt_megatron.chain.layouts import nearest, obstacle, proposals
from compt_megatron.chain.member import Member, link_members
from compt_megatron.chain.memory import estimate
from compt_megatron.chain.planner import check_recipe, make_plan
from compt_megatron.chain.step_time import step_time
from compt_megatron.chain.workload import ParameterCounts, Workload
from compt_megatron.cli import main
from compt_megatron.errors import UserError
from compt_megatron.recipe.load import load_recipe
from compt_megatron.recipe.parallel_section import ParallelSettings
from compt_megatron.spec.cost import head_macs, sample_macs
from compt_megatron.spec.families import load_spec, spec_from_config
from tests.distributed.spawn import run_ranks
from tests.unit.lm_helpers import gpt2, llama


def layout(**fields: Any) -> ParallelSettings:
    return ParallelSettings.model_validate(fields)


def megatron(**fields: Any) -> ParallelSettings:
    return layout(engine="megatron", **fields)


@pytest.fixture(scope="module")
def chains() -> dict[str, list[Member]]:
    return {name: link_members(load_recipe(name), None) for name in RECIPES}


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RESULTS.read_text())["recipes"]
    return found


def workloads(members: list[Member]) -> dict[str, Workload]:
    before = [None, *(member.spec for member in members)]
    return {
        member.name: Workload.of(member, teacher if member.taught else None) for member, teacher in zip(members, before)
    }


# -- the packaged chains ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_the_chains_grow_and_their_own_layouts_fit(name: str, chains: dict[str, list[Member]]) -> None:
    check_recipe(load_recipe(name), RANKS, data=False)
    links = load_recipe(name).links[1:]
    exactly = [f"links.{link.name}.grow={{operator: exact}}" for link in links]
    check_recipe(load_recipe(name, exactly), RANKS, data=False)
    for link, workload in workloads(chains[name]).items():
        member = next(member for member in chains[name] if member.name == link)
        assert estimate(workload, member.settings.parallel, RANKS).total <= 72e9, link


def test_the_models_are_what_they_are_called(chains: dict[str, list[Member]]) -> None:
    """GPT-3's table 2.1 and Llama 3 8B, whose parameters are published as 8,030,261,248."""
    assert [member.spec.numel for member in chains["llama-8b"]][-1] == 8_030_261_248
    for members, sizes in ((chains["gpt3-6.7b"], (0.125, 0.35, 1.3, 6.7)), (chains["llama-8b"], (1.28, 2, 4, 8))):
        assert [member.spec.numel / 1e9 for member in members] == pytest.approx(sizes, rel=0.05)


@pytest.mark.parametrize("name", RECIPES)
def test_the_recorded_layouts_divide_and_fit_80_gb(
    name: str, chains: dict[str, list[Member]], recorded: dict[str, Any]
) -> None:
    """Every layout of docs/language_giants.md needs the memory and the time that are recorded; the page shows it."""
    page = PAGE.read_text()
    for link, workload in workloads(chains[name]).items():
        assert list(recorded[name][link]["scaling"]) == [str(ranks) for ranks in SCALES]
        for ranks, found in recorded[name][link]["scaling"].items():
            one = layout(**found["overrides"])
            assert obstacle(workload.spec, one, workload.batch, int(ranks)) is None
            memory, time = estimate(workload, one, int(ranks)), step_time(workload, one, int(ranks), Hardware())
            assert memory.total == pytest.approx(found["memory"]["total"])
            assert time.total == pytest.approx(found["time"]["total"])
            assert memory.total <= 72e9
            said = " ".join(f"{key}: {str(value).lower()}" for key, value in found["overrides"].items())
            row = next(line for line in page.splitlines() if line.startswith(f"| {name} {link} | {ranks} | "))
            assert said.replace(" ", "") in row.replace(",", "").replace(" ", "")
            assert f"| {memory.total / 1e9:.0f} | {time.total:.3g} |" in row


def build(rank: int, world: int, cases: list[tuple[dict[str, Any], dict[str, Any]]]) -> int:
    """In a process of its own: it replaces the process groups."""
    for config, parallel in cases:
        check_built(spec_from_config(config, "model"), layout(**parallel))
    return len(cases)


def test_layouts_are_built_without_weights(chains: dict[str, list[Member]], recorded: dict[str, Any]) -> None:
    """First and last stage on no device, their parameters as counted: every recorded way to cut the last links, and
    small models with a padded vocabulary, whose tied head is a copy."""
    cases: list[Any] = []
    for name, members in chains.items():
        ways = {json.dumps(one["overrides"]) for one in recorded[name][members[-1].name]["scaling"].values()}
        cases += [(members[-1].spec.config, json.loads(way)) for way in sorted(ways)]
    pipeline = {"engine": "megatron", "tensor": 2, "pipeline": 2, "micro_batches": 2}
    for config in (gpt2(layers=4), llama(layers=4)):  # tied and untied
        assert config["vocab_size"] % 2, "nothing to pad"
        cases += [(config, pipeline), (config, pipeline | {"virtual": 2, "sequence": True})]
    assert run_ranks(build, 1, cases, timeout=300) == [len(cases)]


# -- memory and time -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama, query groups", "gpt2"])
def test_activations_are_those_of_a_real_model(name: str) -> None:
    spec = small_spec(name)
    assert predicted_kept(spec, "bf16", "none") == pytest.approx(kept_bytes(spec, torch.bfloat16, "none"), rel=0.015)
    assert predicted_peak(spec, "bf16", "none") == pytest.approx(peak_bytes(spec, torch.bfloat16, "none"), rel=0.05)
    assert predicted_peak(spec, "fp32", "full") == pytest.approx(peak_bytes(spec, torch.float32, "full"), rel=0.1)


def test_the_ends_of_a_pipeline() -> None:
    """The last stage has the head, and does its work alone."""
    spec = load_spec("gpt3-350m")
    work = Workload(spec, None, 256, 1, "bf16")
    whole = ParameterCounts.of(spec)
    first, last = (whole.on_rank(megatron(pipeline=4), stage) for stage in (0, 3))
    assert first - last == 2048 * 1024 - 2 * 1024, "positions, for which the last has the final norm"
    forward, head = sample_macs(spec), head_macs(spec)
    alone = step_time(work, megatron(micro_batches=64), 1, Hardware())
    piped = step_time(work, megatron(pipeline=4, micro_batches=64), 4, Hardware())
    assert piped.compute / alone.compute == pytest.approx(((forward - head) / 4 + head) / forward)
    again = step_time(work, megatron(micro_batches=64, recompute="full"), 1, Hardware())
    assert again.recompute / again.compute == pytest.approx((forward - head) / forward / 3)


def test_a_teacher_of_states_makes_no_logits() -> None:
    work = Workload(load_spec("llama-2b"), load_spec("llama-1b"), 64, 1, "bf16")
    teacher = work.teacher
    assert teacher is not None
    assert work.teacher_macs == sample_macs(teacher) - head_macs(teacher)
    distilled = replace(work, distilled=True)
    assert distilled.teacher_macs == sample_macs(teacher) + 3 * head_macs(work.spec)
    one, four = (estimate(work, layout(micro_batches=count), 8).teacher for count in (1, 4))
    states = 64 / 8 * 8192 * 2048 * 2  # of all micro-batches, however many there are
    assert four > states + teacher.numel * 2
    assert (one - states - teacher.numel * 2) == pytest.approx(4 * (four - states - teacher.numel * 2))


def test_the_cheapest_layouts_work(chains: dict[str, list[Member]]) -> None:
    workload = workloads(chains["gpt3-6.7b"])["6B7"]
    found = proposals(workload, 64, Hardware())
    assert {one.layout.engine for one in found} == {"deepspeed", "megatron"}
    for one in found:
        assert one.memory.total <= 72e9
        assert obstacle(workload.spec, layout(**one.layout.model_dump()), workload.batch, 64) is None
    assert found[0].time.total <= 1.02 * min(one.time.total for one in found)
    assert step_time(workload, found[0].layout, 64, Hardware()).mfu > 0.3


# -- the plan --------------------------------------------------------------------------------------------------------


def test_a_plan_in_steps_needs_no_text(capsys: pytest.CaptureFixture[str]) -> None:
    plan = make_plan(load_recipe("gpt3-6.7b"), RANKS)
    assert not plan.relative
    assert any("my-text" in note for note in plan.notes)
    base, last = plan.links[0], plan.links[-1]
    assert base.tokens == 256_000 * 256 * 2048
    assert last.hours == pytest.approx(32_000 * last.own.time.total * RANKS / 3600)
    assert last.alone_macs == pytest.approx(2 * last.macs["train"])
    assert last.alone_hours is not None
    assert last.alone_hours / last.hours == pytest.approx(2), "twice the steps"
    aligned = make_plan(load_recipe("gpt3-6.7b", ["links.6B7.align={weight: 0.3}"]), RANKS).links[-1]
    assert aligned.hours is not None
    assert 1.8 < last.alone_hours / aligned.hours < 2, "and a teacher in the chain"
    assert plan.hours == pytest.approx(sum(link.hours or 0 for link in plan.links))
    assert main(["plan", "gpt3-6.7b", "--ranks", str(RANKS)]) == 0
    shown = capsys.readouterr().out
    assert "134 G" in shown
    assert "GPU-hours" in shown


def test_a_plan_in_epochs_is_relative_without_text() -> None:
    recipe = load_recipe("gpt3-6.7b", ["links.125M.steps=null", "links.125M.epochs=1"])
    with pytest.raises(UserError, match=r"350M is not given in epochs .*set data\.samples"):
        make_plan(recipe)
    links = ("125M", "350M", "1B3", "6B7")
    epochs = [f"links.{link}.{field}" for link in links for field in ("steps=null", "epochs=1")]
    plan = make_plan(load_recipe("gpt3-6.7b", epochs))
    assert plan.relative
    assert plan.hours is None


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["gpt3-6.7b", "links.125M.parallel.tensor=8", "--ranks=8"],
            "links.0 (125M): parallel.tensor is 8, which does not fit: it has 12 heads, which tensor does not divide; "
            "the nearest layout that works on 8 ranks is tensor: 4, pipeline: 1",
        ),
        (
            ["llama-8b", "links.1B.parallel.tensor=16", "--ranks=16"],
            "it has 8 query groups, which tensor does not divide; the nearest layout that works on 16 ranks is "
            "tensor: 8, pipeline: 1",
        ),
        (
            ["llama-8b", "links.8B.parallel.engine=megatron", "links.8B.parallel.pipeline=5", "--ranks=10"],
            "it has 32 layers, which pipeline does not divide; the nearest layout that works on",
        ),
        (
            [
                "llama-8b",
                "links.8B.parallel.engine=megatron",
                "links.8B.parallel.pipeline=8",
                "links.8B.parallel.virtual=3",
                "--ranks=16",
            ],
            "parallel.virtual is 3, which does not divide the 4 layers that each of 8 stages has; the nearest layout "
            "that works on 16 ranks is tensor:",
        ),
        (
            ["gpt3-6.7b", "--ranks=512"],
            "links.0 (125M): data.batch_size 256 is not divisible by 512 data-parallel ranks x 1 micro-batches "
            "(parallel.micro_batches); the nearest layout that works on 512 ranks is tensor: 2, pipeline: 1",
        ),
        (
            ["llama-8b", "links.4B.parallel.micro_batches=3", "--ranks=8"],
            "data.batch_size 512 is not divisible by 4 data-parallel ranks x 3 micro-batches (parallel.micro_batches); "
            "the nearest layout that works on 8 ranks is tensor: 2, pipeline: 1, micro_batches: 2",
        ),
        (
            ["llama-8b", "--ranks=1"],
            "1 ranks cannot be shared out: parallel.tensor 2 x parallel.pipeline 1 needs a multiple of 2; the nearest",
        ),
        (
            ["llama-8b", "links.8B.align={tensor: 3}", "--ranks=64"],
            "align.tensor is 3, which does not divide the 2 ranks of one copy of the student",
        ),
    ],
)
def test_a_layout_that_does_not_divide_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_vocabulary_need_not_divide() -> None:
    """It is padded; only a rank without any entry is refused."""
    spec = spec_from_config(gpt2(64, 16), "small")  # 61 entries
    assert obstacle(spec, layout(tensor=4), 8, 8) is None
    tiny = spec_from_config(gpt2(64, 16) | {"vocab_size": 33}, "tiny")
    reason = obstacle(tiny, layout(tensor=16), 16, 16)
    assert reason is not None
    assert reason.endswith("its vocabulary of 33 entries leaves tensor-parallel ranks without one")
    near = nearest(tiny, layout(tensor=16), 16, 16)
    assert near is not None
    assert near.tensor == 4
