"""What a chain costs before it is run: compute and memory of every link, against training each member alone.

Compute counts, per training sample, the image's forward pass and one text forward for each caption, the backward
pass as twice the forward, and the teacher's forward in full. Second forwards that only save memory (cached gradients,
recomputation) are reported apart.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import lcm

from compt_megatron.chain.checks import check_recipe, check_sources
from compt_megatron.chain.communication import forwards, traffic
from compt_megatron.chain.hardware import Hardware
from compt_megatron.chain.layouts import Proposal, cheapest
from compt_megatron.chain.member import Member, control_members, link_members
from compt_megatron.chain.memory import estimate
from compt_megatron.chain.plan import MemberPlan, Plan
from compt_megatron.chain.step_time import step_time
from compt_megatron.chain.text import open_training_text, samples_per_pass
from compt_megatron.chain.workload import Workload
from compt_megatron.data.tar_reader import is_local
from compt_megatron.errors import UserError
from compt_megatron.recipe.schema import Recipe

__all__ = ["MemberPlan", "Plan", "check_recipe", "make_plan"]

SCALES = (8, 16, 32, 64, 128, 256, 512)  # ranks for which layouts are proposed where scaling is asked for
_MOST_RANKS = 1_000_000


def make_plan(
    recipe: Recipe, world: int | None = None, hardware: Hardware | None = None, *, scaling: bool = False
) -> Plan:
    """The plan of `recipe` on `world` ranks (None: the fewest that its layouts allow) of `hardware`.

    `scaling`: propose layouts for 8 to 512 ranks too. Raises UserError for whatever could not work (see `checks`).
    The samples of an epoch are `data.samples`, else those of the local or built-in source; where neither is known, and
    the recipe counts in epochs, costs are relative: multiply them by the number of samples.
    """
    members = link_members(recipe, None)
    controls = control_members(recipe, members)
    if world is None:
        layouts = [member.settings.parallel for member in (*members, *controls)]
        world = lcm(*(layout.tensor * layout.pipeline for layout in layouts))
    if world > _MOST_RANKS:
        raise UserError(f"{recipe.name}: a plan is for at most {_MOST_RANKS:,} ranks, not {world:,}; give fewer")
    check_recipe(recipe, world, data=False)
    place = _Place(world, hardware or Hardware(), SCALES if scaling else ())
    notes: list[str] = []
    sizes = {member.name: samples_per_epoch(member, notes) for member in (*members, *controls)}
    relative = any(member.epochs is not None and sizes[member.name] is None for member in (*members, *controls))
    if relative:
        notes.append("the size of data.train is not known here: costs are for one sample an epoch (set data.samples)")
        _refuse_steps(recipe, [*members, *controls])
        sizes = dict.fromkeys(sizes)
    base_samples = _samples(members[0], sizes[members[0].name] or 0, relative)
    links: list[MemberPlan] = []
    for index, member in enumerate(members):
        teacher = members[index - 1] if member.taught and index else None
        samples = _samples(member, sizes[member.name] or 0, relative)
        links.append(_plan(member, teacher, samples, base_samples, place, relative))
        _note_warmup(links[-1], member, notes)
    planned = []
    for control, member in zip(recipe.controls, controls):
        per_sample = member.macs_per_sample(None)["train"]
        samples = _samples(member, sizes[member.name] or 0, relative)
        if member.compute is not None:
            upto = recipe.link_index(control.link) + 1
            budget = sum(link.macs["total"] for link in links[:upto]) if member.compute == "chain" else member.compute
            batch = member.settings.data.batch_size
            samples = float(budget) / per_sample
            samples = samples if relative else max(1, int(samples // batch)) * batch
        planned.append(_plan(member, None, samples, base_samples, place, relative))
        _note_warmup(planned[-1], member, notes)
    for plan in (*links, *planned):
        _note_memory(plan, place, notes)
    size = sizes[members[0].name]
    return Plan(recipe.name, world, place.hardware, size, links, planned, notes, relative)


@dataclass(frozen=True)
class _Place:
    """Where the plan is for."""

    world: int
    hardware: Hardware
    scales: tuple[int, ...]


def samples_per_epoch(member: Member, notes: list[str]) -> int | None:
    """Samples of one epoch: as the recipe says, else as counted in a local or built-in source, else None and a note."""
    data = member.settings.data
    sources = [data.train] if isinstance(data.train, str) else data.train
    if data.samples is not None:
        return data.samples
    if not all(is_local(source) for source in sources if isinstance(source, str)):
        return None
    try:
        check_sources(member, "recipe")
    except UserError as error:
        if str(error) not in notes:
            notes.append(str(error))
        return None
    if member.spec.is_language_model:
        return samples_per_pass(open_training_text(member), member.length)
    from compt_megatron.data.source import ShardSource

    return ShardSource.open(data.shards).samples


def _samples(member: Member, size: int, relative: bool) -> float:
    """Samples that the member trains on: whole steps, as the runner counts them; epochs where costs are relative."""
    if not member.train or (member.epochs is None and member.steps is None):
        return 0
    if relative:
        return member.epochs or 0
    batch = member.settings.data.batch_size
    steps = member.steps if member.steps is not None else max(1, round((member.epochs or 0) * (size // batch)))
    return steps * batch


def _plan(
    member: Member, teacher: Member | None, samples: float, base_samples: float, place: _Place, relative: bool
) -> MemberPlan:
    per_sample = member.macs_per_sample(teacher.spec if teacher else None)
    workload = Workload.of(member, teacher.spec if teacher else None)
    aligned = samples * workload.teacher_share
    layout, world, hardware = member.settings.parallel, place.world, place.hardware
    forward = per_sample["train"] / 3 - workload.head_macs  # of which nothing is done again
    extra = forward * (forwards(workload, layout) - 1)
    macs = {
        "train": per_sample["train"] * samples,
        "teacher": per_sample["teacher"] * aligned,
        "extra": extra * samples,
    }
    macs["total"] = macs["train"] + macs["teacher"]
    batch = member.settings.data.batch_size
    own = step_time(workload, layout, world, hardware)
    untaught = step_time(replace(workload, teacher=None), layout, world, hardware)
    return MemberPlan(
        name=member.name,
        model=member.spec.name,
        kind=member.kind,
        parent=member.parent,
        parameters=member.spec.numel,
        epochs=member.epochs,
        steps=None if relative else round(samples / batch),
        samples=samples,
        tokens=samples * member.length if member.spec.is_language_model and not relative else None,
        macs=macs,
        alone_macs=per_sample["train"] * base_samples or None,
        alone_hours=None if relative else base_samples / batch * untaught.total * world / 3600 or None,
        precision=member.settings.precision,
        own=Proposal(world, layout, estimate(workload, layout, world), own, batch),
        traffic=traffic(workload, layout, world),
        cheapest=cheapest(workload, world, hardware),
        scaling={ranks: cheapest(workload, ranks, hardware) for ranks in place.scales},
    )


def _note_memory(plan: MemberPlan, place: _Place, notes: list[str]) -> None:
    """Say what does not fit, and what would."""
    need, room = plan.own.memory.total, place.hardware.memory * place.hardware.usable
    if need <= room:
        return
    wants = f"{plan.name}: its layout needs {need / 1e9:.0f} GB a rank of the {room / 1e9:.0f} GB that are usable"
    if plan.cheapest is None:
        notes.append(f"{wants}, and no layout fits {place.world} ranks; use more, or offload")
    else:
        notes.append(f"{wants}; the cheapest that fits is {plan.cheapest.describe()}")


def _note_warmup(plan: MemberPlan, member: Member, notes: list[str]) -> None:
    warmup = member.settings.optimizer.warmup_steps
    if plan.steps and warmup >= plan.steps:
        notes.append(f"{plan.name}: optimizer.warmup_steps {warmup} is not less than its {plan.steps} steps")


def _refuse_steps(recipe: Recipe, members: list[Member]) -> None:
    for member in members:
        if member.steps is not None or isinstance(member.compute, float):
            problem = "is not given in epochs and the size of data.train is unknown"
            raise UserError(f"{recipe.name}: {member.name} {problem}; set data.samples to plan it")
