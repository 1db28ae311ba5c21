"""The first weights of a link: fresh, read from a file, or grown from the predecessor. Written by rank 0."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compt_megatron.chain.member import Member
from compt_megatron.checkpoint.api import convert
from compt_megatron.checkpoint.formats import open_reader
from compt_megatron.errors import UserError
from compt_megatron.evaluate.parity import hindrance, parity, spec_of
from compt_megatron.growth.api import grow
from compt_megatron.growth.certificate import Certificate
from compt_megatron.growth.fresh import write_fresh

_PARITY_LIMIT = 10**9  # parameters of a model that is grown and measured on one CPU in reasonable time


def write_initial(member: Member, parent_checkpoint: Path | None, target: Path) -> dict[str, Any] | None:
    """Write the member's step-0 checkpoint to `target`. Returns the certificate's entries if it was grown.

    Raises UserError where growth cannot connect the two models or `init` holds another model.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    if member.init is not None:
        _check_model(member)
        convert(Path(member.init), target, "megatron", spec=member.spec, overwrite=True)
        return None
    if member.grow is None:
        write_fresh(member.spec, target, member.settings.seed, overwrite=True)
        return None
    assert parent_checkpoint is not None, "a link that grows has a predecessor"
    settings = member.grow
    certificate = grow(
        parent_checkpoint,
        target,
        member.spec,
        operator=settings.operator,
        depth=settings.depth,
        axes=dict(settings.axes) or None,
        format="megatron",
        seed=member.settings.seed,
        allow_approximate=settings.allow_approximate,
        moments=settings.moments,
        overwrite=True,
    )
    assert isinstance(certificate, Certificate), "a dry run makes no certificate"
    if member.spec.numel <= _PARITY_LIMIT:
        certificate = certificate.with_parity(_measured(parent_checkpoint, target))
    return certificate.to_dict()


def _measured(before: Path, after: Path) -> dict[str, float] | None:
    """How far the grown model's outputs are from its predecessor's, through open_clip's or transformers' own models;
    None where this machine cannot say."""
    old, new = open_reader(before), open_reader(after)
    try:
        return None if hindrance(spec_of(old), spec_of(new)) else parity(old, new)
    finally:
        old.close()
        new.close()


def _check_model(member: Member) -> None:
    reader = open_reader(Path(member.init or ""), member.spec)
    try:
        if reader.spec is not None and reader.spec.digest != member.spec.digest:
            raise UserError(
                f"{member.init}: holds model {reader.spec.name!r}, link {member.name!r} is {member.spec.name!r} with "
                "another config; name the right file in 'init' or the right 'model'"
            )
    finally:
        reader.close()
