"""The text of a language model in a chain: which data sets, of which tokenizer, in samples of which length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compt_megatron.chain.member import Member
from compt_megatron.data.text.build import SPLITS
from compt_megatron.data.text.source import BUILT_IN, PADDING, TextSource
from compt_megatron.data.text.tokenizer import find_tokenizer
from compt_megatron.errors import UserError
from compt_megatron.recipe.files import expanded
from compt_megatron.recipe.link_sections import AlignSettings
from compt_megatron.spec.table import ModelSpec


def vocabulary(spec: ModelSpec) -> int:
    """Tokens that a language model knows."""
    return next(dim.size for param in spec.params.values() for dim in param.dims if dim.axis == "vocab")


def open_text(spec: ModelSpec, source: Any, tokenizer: str | Path | None = None) -> TextSource:
    """The text that `source` names, checked against the vocabulary of model `spec` and, where one is named, against
    the tokenizer. The built-in text is tokenised on first use, and kept in the user's cache folder."""
    tokenizer = None if tokenizer is None else expanded(str(tokenizer))
    text = TextSource.open(source, vocab_size=vocabulary(spec), tokenizer=tokenizer)
    text.require_vocabulary(vocabulary(spec))
    if tokenizer is not None and text.record is not None:
        wanted = find_tokenizer(tokenizer)
        if wanted.sha256 != text.record.sha256:
            raise UserError(f"data {text.name!r}: was not made with {wanted.path}; build it again with that tokenizer")
    return text


def open_training_text(member: Member) -> TextSource:
    """What a member trains on, with at least one step of it. Raises UserError for data that does not suit it."""
    data = member.settings.data
    source = open_text(member.spec, data.train, data.tokenizer)
    for part in source.parts:
        if part.documents.tokens <= member.length:
            raise UserError(
                f"data {part.name!r}: {part.documents.tokens} tokens, fewer than one sequence of {member.length} + 1; "
                "lower data.length or add data"
            )
    if (found := samples_per_pass(source, member.length)) < data.batch_size:
        raise UserError(
            f"{member.name}: {source.name} has {found} samples of {member.length} tokens, {data.batch_size} are "
            "needed; lower data.batch_size or data.length, or add data"
        )
    return source


def samples_per_pass(source: TextSource, length: int) -> int:
    """Samples of one pass over every data set."""
    return sum((part.documents.tokens - 1) // length for part in source.parts)


def check_text(member: Member, where: str) -> None:
    """Raise UserError for a tokenizer or a text that cannot be right. What is built in is not opened: it may have to be
    tokenised first."""
    data = member.settings.data
    if data.tokenizer is not None:
        _check_tokenizer(member, data.tokenizer, f"{where}: data.tokenizer")
    train = data.train if isinstance(data.train, list) else [data.train]
    for field, sources in (("data.train", train), ("data.eval", data.eval)):
        if field == "data.train" and not sources:
            raise UserError(f"{where}: {field}: names no source; give one, such as stdlib/train")
        for source in sources:
            _check_source(member, source, f"{where}: {field}")


def _check_tokenizer(member: Member, tokenizer: str, where: str) -> None:
    try:
        size = find_tokenizer(expanded(tokenizer)).vocab_size
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    own = vocabulary(member.spec)
    if not size <= own <= size * (1 + PADDING):
        raise UserError(f"{where}: it has {size} tokens, the model {own}; name the model's own tokenizer")


def _check_source(member: Member, source: Any, where: str) -> None:
    path = source["path"] if isinstance(source, dict) else source
    base, _, split = path.partition("/")
    if base in BUILT_IN:
        if split not in SPLITS:
            raise UserError(f"{where}: {path}: the built-in text is {' and '.join(f'{base}/{one}' for one in SPLITS)}")
        return
    if not path.strip():
        raise UserError(f"{where}: names no source; give one, such as stdlib/train")
    try:
        text = TextSource.open(source)
        if text.record is not None:
            text.require_size(vocabulary(member.spec))
        if where.endswith("data.eval"):
            text.require_targets()
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def check_language_teacher(member: Member, teacher: ModelSpec, where: str) -> None:
    """Raise UserError for a predecessor that cannot read the student's sequences, or whose states and layers the recipe
    asks for in vain."""
    sections = [name for name in ("align", "distill") if getattr(member, name) is not None]
    named = " and ".join(map(repr, sections))
    if not teacher.is_language_model:
        raise UserError(f"{where}: its teacher {teacher.name} is no language model; remove {named}")
    own, theirs = vocabulary(member.spec), vocabulary(teacher)
    if own != theirs:
        raise UserError(
            f"{where}: vocab_size is {own}, the previous link's is {theirs}: it could not teach it; make them equal or "
            f"remove {named}"
        )
    positions = teacher.towers["text"].tokens
    if member.length > positions:
        raise UserError(
            f"{where}: samples have {member.length} tokens, its teacher {teacher.name} has {positions} positions; "
            f"use data.length: {positions} or less, or remove {named}"
        )
    if member.distill is not None and member.distill.top_k is not None and member.distill.top_k > own:
        raise UserError(
            f"{where}: distill.top_k is {member.distill.top_k}, the vocabulary has {own} tokens; use less, or remove it"
        )
    if member.align is not None:
        _check_states(member, member.align, teacher, where)


def _check_states(member: Member, align: AlignSettings, teacher: ModelSpec, where: str) -> None:
    if align.towers != AlignSettings().towers:
        raise UserError(f"{where}: align.towers is for images and captions; remove it")
    if not align.hidden and not align.layers:
        raise UserError(
            f"{where}: align.hidden is false and align.layers names none: nothing is aligned; remove 'align'"
        )
    for whose, spec, layers in (
        ("", member.spec, align.layers),
        ("its teacher's ", teacher, align.layers.values()),
    ):
        count = spec.towers["text"].layers
        if (beyond := max(layers, default=0)) >= count:
            raise UserError(
                f"{where}: align.layers names {whose}layer {beyond}, of which {spec.name} has {count}, counted from 0; "
                f"use at most {count - 1}"
            )
    parallel = member.settings.parallel
    if align.clamp and parallel.micro_batches > 1:
        raise UserError(
            f"{where}: align.clamp compares the losses of a whole batch, parallel.micro_batches "
            f"{parallel.micro_batches} cuts it; use micro_batches: 1 or clamp: false"
        )
    if align.clamp and align.layers and parallel.pipeline > 1:
        raise UserError(
            f"{where}: align.clamp compares with the loss of the last stage, parallel.pipeline {parallel.pipeline} has "
            "layers on others; use pipeline: 1, clamp: false, or no align.layers"
        )
