"""What a recipe alone cannot know: whether models, layouts and data fit together. Checked before a start."""

from __future__ import annotations

from math import gcd
from typing import Any

from compt_megatron.chain.layouts import misfit, nearest, obstacle
from compt_megatron.chain.member import Member, control_members, link_members
from compt_megatron.chain.text import check_language_teacher, check_text
from compt_megatron.chain.workload import data_ranks
from compt_megatron.checkpoint.contract import Layout
from compt_megatron.checkpoint.megatron_layout import obstacle as layout_obstacle
from compt_megatron.data.source import built_in, is_built_in
from compt_megatron.data.tar_reader import is_local
from compt_megatron.errors import UserError
from compt_megatron.growth.operators import plan as growth_plan
from compt_megatron.recipe.files import expanded
from compt_megatron.recipe.schema import Recipe
from compt_megatron.spec.table import ModelSpec


def check_recipe(recipe: Recipe, world: int = 1, *, data: bool = True) -> None:
    """Raise UserError, naming the recipe's field, for the first thing that could not work on `world` ranks.

    `data`: whether the sources and what prepares their samples (open_clip) must be on this machine.
    """
    links = link_members(recipe, None)
    controls = control_members(recipe, links)
    groups = (("links", links), ("controls", controls))
    named = {
        (group, index): f"{recipe.name}: {group}.{index} ({member.name})"
        for group, members in groups
        for index, member in enumerate(members)
    }
    for group, members in groups:  # a layout that fits nowhere is to blame before those that it leaves no ranks
        for index, member in enumerate(members):
            if misfit(member.spec, member.settings.parallel) is not None:
                check_layout(member, world, named[group, index])
    for group, members in groups:
        for index, member in enumerate(members):
            where = named[group, index]
            _check_objective(member, where)
            check_layout(member, world, where)
            if group == "links" and index:
                _check_connection(member, links[index - 1].spec, where)
            if data:
                check_sources(member, where)
                _check_preparation(member, where)


def check_layout(member: Member, world: int, where: str) -> None:
    """Raise UserError if the member's layout does not fit its model, its batch or `world` ranks; the message names the
    nearest layout that does."""
    layout, batch = member.settings.parallel, member.settings.data.batch_size
    reason = obstacle(member.spec, layout, batch, world)
    if reason is not None:
        raise UserError(f"{where}: {reason}; {_advice(member, world)}")
    ranks = data_ranks(layout, world)
    streams = member.settings.data.streams
    if streams is not None and (batch % streams or streams % ranks):
        raise UserError(
            f"{where}: data.streams is {streams}; it must divide data.batch_size {batch} and be a multiple of the "
            f"{ranks} data-parallel ranks"
        )


def _advice(member: Member, world: int) -> str:
    """What to write instead of a layout that does not work."""
    layout, batch = member.settings.parallel, member.settings.data.batch_size
    near = nearest(member.spec, layout, batch, world)
    if near is None and misfit(member.spec, layout) is not None:
        worlds = sorted(range(1, 2 * world), key=lambda other: (abs(other - world), other))
        found = ((nearest(member.spec, layout, batch, other), other) for other in worlds)
        near, world = next(((one, other) for one, other in found if one is not None), (None, world))
    ranks = f"{world} rank{'s' * (world > 1)}"
    if near is None:
        fitting = max(1, round(batch / world)) * world
        return f"no layout works on {ranks}; use another number of ranks, or data.batch_size {fitting}"
    names = ["tensor", "pipeline", "virtual", "micro_batches"]
    shown = [name for name in names if name in names[:2] or getattr(near, name) != 1 or getattr(layout, name) != 1]
    said = ", ".join(f"{name}: {getattr(near, name)}" for name in shown)
    if near.sequence != layout.sequence:
        said += ", sequence: false"
    copy = near.tensor * near.pipeline
    if member.taught and copy % member.teacher_tensor:
        said += f", {'align' if member.align is not None else 'distill'}.tensor: {gcd(copy, member.teacher_tensor)}"
    return f"the nearest layout that works on {ranks} is {said}"


def _check_objective(member: Member, where: str) -> None:
    name = member.settings.objective.name
    if member.spec.is_language_model:
        if name != "causal_lm":
            raise UserError(
                f"{where}: {member.spec.name} is a language model, objective {name!r} is for images; use "
                "objective: {name: causal_lm}"
            )
        positions = member.spec.towers["text"].tokens
        if member.length > positions:
            raise UserError(
                f"{where}: data.length is {member.length}, the model has {positions} positions; use at most {positions}"
            )
        return
    if name == "causal_lm":
        raise UserError(
            f"{where}: objective 'causal_lm' is for language models, {member.spec.name} is none; use 'clip', 'siglip' "
            "or 'classify'"
        )
    two_towers = "text" in member.spec.towers
    if name == "classify" and two_towers:
        raise UserError(f"{where}: objective 'classify' needs a model without text_cfg; use objective 'clip'")
    if name != "classify" and not two_towers:
        raise UserError(f"{where}: objective {name!r} needs a text tower; add text_cfg to the model or use 'classify'")
    if name == "siglip" and "logit_bias" not in member.spec.params:
        raise UserError(f"{where}: objective 'siglip' needs \"init_logit_bias\" in the model config; add it (-10)")


def _check_connection(member: Member, previous: ModelSpec, where: str) -> None:
    """Whether the previous link can be grown into this one and teach it."""
    if member.grow is not None:
        grow = member.grow
        try:
            growth_plan(
                previous,
                member.spec,
                grow.operator,
                depth=grow.depth,
                axes=dict(grow.axes) or None,
                seed=member.settings.seed,
                allow_approximate=grow.allow_approximate,
            )
        except UserError as error:
            raise UserError(f"{where}: cannot grow from {previous.name}: {error}") from error
    if not member.taught:
        return
    if previous.numel > member.spec.numel:
        raise UserError(
            f"{where}: its teacher {previous.name} has {previous.numel:,} parameters, more than its own "
            f"{member.spec.numel:,}; put the links in order of size, or remove 'align'"
        )
    _check_teacher_layout(member, previous, where)
    if member.spec.is_language_model:
        check_language_teacher(member, previous, where)
        return
    if member.distill is not None:
        raise UserError(f"{where}: distill is for language models, {member.spec.name} is none; use align")
    assert member.align is not None
    if not member.align.hidden or member.align.layers:
        raise UserError(f"{where}: align.hidden and align.layers are for language models; remove them")
    for tower in member.align.towers:
        name = "vision" if tower == "image" else "text"
        if name in member.spec.towers and name not in previous.towers:
            raise UserError(f"{where}: align.towers names {tower!r}, which the previous link has not; remove it")
    for field, student, teacher in (
        (
            "vision_cfg.image_size",
            _field(member.spec, "vision", "image_size"),
            _field(previous, "vision", "image_size"),
        ),
        ("text_cfg.context_length", _tokens(member.spec), _tokens(previous)),
        ("text_cfg.vocab_size", _field(member.spec, "text", "vocab_size"), _field(previous, "text", "vocab_size")),
    ):
        if student is not None and teacher is not None and student != teacher:
            raise UserError(f"{where}: {field} is {student}, the previous link's is {teacher}: it could not teach it; "
                            "make them equal or remove 'align'")  # fmt: skip


def _check_teacher_layout(member: Member, teacher: ModelSpec, where: str) -> None:
    """Whether the ranks of one copy of the student can split the teacher as asked, each part with rows of its own."""
    given = [section.tensor for section in (member.align, member.distill) if section is not None]
    if len({*given}) > 1:
        raise UserError(f"{where}: align.tensor is {given[0]}, distill.tensor {given[1]}: they have one teacher; "
                        "make them equal")  # fmt: skip
    parallel, split = member.settings.parallel, member.teacher_tensor
    copy = parallel.tensor * parallel.pipeline
    fitting = [n for n in range(1, copy + 1) if copy % n == 0 and layout_obstacle(teacher, Layout(tensor=n)) is None]
    near = min(fitting, key=lambda n: (abs(n - split), n))
    if copy % split:
        raise UserError(
            f"{where}: align.tensor is {split}, which does not divide the {copy} ranks of one copy of the student "
            f"(tensor x pipeline); the nearest that works is {near}"
        )
    reason = layout_obstacle(teacher, Layout(tensor=split))
    if reason is not None:
        raise UserError(
            f"{where}: align.tensor is {split}, but of the teacher {reason}; the nearest that works is {near}"
        )


def _field(spec: ModelSpec, tower: str, field: str) -> Any:
    return (spec.config.get(f"{tower}_cfg") or {}).get(field, {"image_size": 224, "vocab_size": 49408}[field])


def _tokens(spec: ModelSpec) -> int | None:
    return spec.towers["text"].tokens if "text" in spec.towers else None


def check_sources(member: Member, where: str) -> None:
    """Raise UserError if a local shard that the member names does not exist. Nothing is opened or counted, but the
    index of a text."""
    if member.spec.is_language_model:
        check_text(member, where)
        return
    data = member.settings.data
    train: list[Any] = [data.train] if isinstance(data.train, str) else list(data.train)
    for field, sources in (("data.train", train), ("data.eval", data.eval)):
        if field == "data.train" and not sources:
            raise UserError(f"{where}: {field}: names no source; give one, such as emoji/train")
        for source in sources:
            _check_source(source, f"{where}: {field}")


def _check_preparation(member: Member, where: str) -> None:
    """Whether open_clip takes the augmentation and has the tokenizer's vocabulary."""
    from compt_megatron.data.tokenizer import build_tokenizer
    from compt_megatron.data.transforms import train_transform

    if member.spec.is_language_model:
        return
    try:
        train_transform(member.spec.config, dict(member.settings.data.augment))
        if "text" in member.spec.towers:
            build_tokenizer(member.spec.config)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _check_source(source: str, where: str) -> None:
    if not source.strip():
        raise UserError(f"{where}: names no source; give one, such as emoji/train")
    if is_built_in(source):
        built_in(source)
        return
    try:
        from webdataset.gopen import gopen_schemes
        from webdataset.shardlists import expand_urls
    except ImportError:
        raise UserError(f"{where}: {source}: shards need webdataset; pip install 'compt-megatron[train]'") from None
    scheme = source.partition("://")[0]
    if "://" in source and not source.startswith("pipe:") and scheme not in gopen_schemes:
        raise UserError(f"{where}: {source}: nothing opens {scheme}://; use a path, http(s):// or pipe:<command>")
    if is_local(source):
        try:
            urls = expand_urls(source)
        except (AssertionError, ValueError) as error:
            raise UserError(f"{where}: {source}: not a valid shard pattern ({error})") from error
        missing = [url for url in urls if is_local(url) and not expanded(url).exists()]
        if missing:
            raise UserError(f"{where}: {missing[0]} does not exist (here or beside the recipe); correct the path")
