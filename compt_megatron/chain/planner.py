"""What a chain costs before it is run: compute and memory of every link, against training each member alone.

Compute counts, per training sample, the image's forward pass and one text forward for each caption, the backward
pass as twice the forward, and the teacher's forward in full. Second forwards that only save memory (cached gradients,
recomputation) are reported apart.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from compt_megatron.chain.checks import check_recipe, check_sources
from compt_megatron.chain.member import Member, control_members, link_members
from compt_megatron.chain.memory import Memory, memory_per_rank
from compt_megatron.data.tar_reader import is_local
from compt_megatron.errors import UserError
from compt_megatron.recipe.schema import Recipe

__all__ = ["MemberPlan", "Plan", "check_recipe", "make_plan"]


@dataclass(frozen=True)
class MemberPlan:
    """One training of the plan. `macs` are multiply-accumulates of the whole training: `train`, `teacher`, their sum
    `total`, and `extra` for forwards that are done again to save memory (not in the total). Where the size of the data
    is unknown, `samples` and `macs` are those of an epoch of one sample, and `steps` is None.
    """

    name: str
    model: str
    kind: str
    parent: str | None
    parameters: int
    epochs: float | None
    steps: int | None
    samples: float
    macs: dict[str, float]
    alone_macs: float | None  # the same model trained alone for as many samples as the base
    memory: Memory
    layout: dict[str, Any]

    @property
    def share(self) -> float | None:
        """This training's compute as a share of training the model alone."""
        return self.macs["total"] / self.alone_macs if self.alone_macs else None


@dataclass(frozen=True)
class Plan:
    """The plan of a recipe on `world` ranks. All costs are relative where `samples_per_epoch` is None."""

    name: str
    world: int
    samples_per_epoch: int | None
    links: list[MemberPlan]
    controls: list[MemberPlan]
    notes: list[str] = field(default_factory=list)

    @property
    def total_macs(self) -> float:
        """Compute of the whole chain, controls left out."""
        return sum(link.macs["total"] for link in self.links)

    @property
    def alone_macs(self) -> float | None:
        """Compute of training every member alone for as many samples as the base; None without a trained base."""
        parts = [link.alone_macs for link in self.links]
        return None if None in parts else sum(part for part in parts if part is not None)

    @property
    def speed_up(self) -> float | None:
        """How many times cheaper the family is as a chain."""
        return self.alone_macs / self.total_macs if self.alone_macs and self.total_macs else None

    @property
    def last_share(self) -> float | None:
        """The whole chain's compute as a share of training its last member alone: the paper's comparison."""
        alone = self.links[-1].alone_macs
        return self.total_macs / alone if alone else None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for `--json`."""
        values = asdict(self)
        for member, plan in zip((*values["links"], *values["controls"]), (*self.links, *self.controls)):
            member["share_of_alone"] = plan.share
            member["memory"]["total"] = plan.memory.total
        totals = {"macs": self.total_macs, "alone_macs": self.alone_macs}
        return values | {"total": totals | {"speed_up": self.speed_up, "share_of_last_alone": self.last_share}}


def make_plan(recipe: Recipe, world: int = 1) -> Plan:
    """The plan of `recipe` on `world` ranks. Raises UserError for whatever could not work (see `checks`).

    The samples of an epoch are `data.samples`, else those of the local or built-in source; where neither is known,
    costs are relative: multiply them by the number of samples.
    """
    check_recipe(recipe, world, data=False)
    members = link_members(recipe, None)
    controls = control_members(recipe, members)
    notes: list[str] = []
    sizes = {member.name: samples_per_epoch(member, notes) for member in (*members, *controls)}
    relative = None in sizes.values()
    if relative:
        notes.append("the size of data.train is not known here: costs are for one sample an epoch (set data.samples)")
        _refuse_steps(recipe, [*members, *controls])
        sizes = dict.fromkeys(sizes, 1)
    base_samples = _samples(members[0], sizes[members[0].name] or 0, relative)
    links: list[MemberPlan] = []
    for index, member in enumerate(members):
        teacher = members[index - 1] if member.align is not None and index else None
        samples = _samples(member, sizes[member.name] or 0, relative)
        links.append(_plan(member, teacher, samples, base_samples, world, relative))
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
        planned.append(_plan(member, None, samples, base_samples, world, relative))
        _note_warmup(planned[-1], member, notes)
    size = None if relative else sizes[members[0].name]
    return Plan(recipe.name, world, size, links, planned, notes)


def samples_per_epoch(member: Member, notes: list[str]) -> int | None:
    """Samples of one epoch: as the recipe says, else as counted in a local or built-in source, else None and a note."""
    data = member.settings.data
    sources = [data.train] if isinstance(data.train, str) else data.train
    if data.samples is not None:
        return data.samples
    if not all(is_local(source) for source in sources):
        return None
    try:
        check_sources(member, "recipe")
    except UserError as error:
        if str(error) not in notes:
            notes.append(str(error))
        return None
    from compt_megatron.data.source import ShardSource

    return ShardSource.open(data.train).samples


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
    member: Member, teacher: Member | None, samples: float, base_samples: float, world: int, relative: bool
) -> MemberPlan:
    per_sample = member.macs_per_sample(teacher.spec if teacher else None)
    aligned = samples * _aligned_share(member)
    layout = member.settings.parallel
    forward = per_sample["train"] / 3
    extra = forward * ((layout.micro_batches > 1) + (layout.recompute == "full"))
    macs = {
        "train": per_sample["train"] * samples,
        "teacher": per_sample["teacher"] * aligned,
        "extra": extra * samples,
    }
    macs["total"] = macs["train"] + macs["teacher"]
    batch = member.settings.data.batch_size
    return MemberPlan(
        name=member.name,
        model=member.spec.name,
        kind=member.kind,
        parent=member.parent,
        parameters=member.spec.numel,
        epochs=member.epochs,
        steps=None if relative else round(samples / batch),
        samples=samples,
        macs=macs,
        alone_macs=per_sample["train"] * base_samples or None,
        memory=memory_per_rank(member, teacher.spec if teacher else None, world),
        layout=layout.model_dump() | {"precision": member.settings.precision, "batch_size": batch},
    )


def _aligned_share(member: Member) -> float:
    """The share of a link's steps in which the teacher runs: until the alignment's end, and not at weight 0."""
    if member.align is None or member.align.weight == 0:
        return 0.0
    return member.align.end if member.align.end is not None else 1.0


def _note_warmup(plan: MemberPlan, member: Member, notes: list[str]) -> None:
    warmup = member.settings.optimizer.warmup_steps
    if plan.steps and warmup >= plan.steps:
        notes.append(f"{plan.name}: optimizer.warmup_steps {warmup} is not less than its {plan.steps} steps")


def _refuse_steps(recipe: Recipe, members: list[Member]) -> None:
    for member in members:
        if member.steps is not None or isinstance(member.compute, float):
            problem = "is not given in epochs and the size of data.train is unknown"
            raise UserError(f"{recipe.name}: {member.name} {problem}; set data.samples to plan it")
