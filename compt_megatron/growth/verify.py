"""Proves a grown checkpoint: makes every target slice again from source and certificate and compares bytes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch

from compt_megatron.checkpoint.contract import Reader, Region, TensorInfo, dtype_name, dtype_of, slabs, split_name
from compt_megatron.checkpoint.digest import weight_hash
from compt_megatron.checkpoint.formats import open_reader
from compt_megatron.errors import UserError, lines_of
from compt_megatron.growth.certificate import Certificate, certify
from compt_megatron.growth.execute import SLAB_BYTES, Maker, check_source, target_infos
from compt_megatron.growth.moments import with_source_states
from compt_megatron.growth.plan import GrowthPlan
from compt_megatron.growth.twins import find_twins
from compt_megatron.spec.table import ModelSpec

_GROWN = ("weight", "master", "exp_avg", "exp_avg_sq", "step")
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Mismatch:
    """A tensor that is not what the certificate says."""

    name: str
    elements: int  # how many differ
    first: tuple[int, ...]  # index of the first one
    largest: float  # the largest absolute difference
    note: str = ""
    values: tuple[str, str] = ("", "")  # of the first one: what is there, and what growth makes

    def __str__(self) -> str:
        if self.note:
            return f"{self.name}: {self.note}"
        differ = "1 element differs" if self.elements == 1 else f"{self.elements} elements differ"
        return (
            f"{self.name}: {differ} by up to {self.largest:.3g}, the first at {list(self.first)}: {self.values[0]} "
            f"where growth makes {self.values[1]}"
        )


@dataclass
class VerifyReport:
    """What `verify` found; `ok` if every tensor has the bytes that the certificate promises."""

    path: str
    against: str
    certificate: Certificate
    tensors: int = 0  # compared
    elements: int = 0
    mismatches: list[Mismatch] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    claims: list[str] = field(default_factory=list)  # entries of the certificate that are not what growth gives
    unreadable: list[str] = field(default_factory=list)  # why tensors could not be compared
    twins: list[str] = field(default_factory=list)  # units that will never separate: right as grown, bad to train

    @property
    def ok(self) -> bool:
        return not (self.mismatches or self.missing or self.extra or self.claims or self.unreadable)

    @property
    def worst(self) -> Mismatch | None:
        """The mismatch with the most wrong elements."""
        return max(self.mismatches, key=lambda found: found.elements, default=None)

    def describe(self) -> str:
        """One line if all is well, else one line for each defect."""
        if self.ok:
            return f"{self.path}: {self.tensors} tensors, {self.elements:,} elements, all as grown from {self.against}"
        return "\n".join(self.defects())

    def defects(self) -> list[str]:
        """One line for each defect, the tensors with the most wrong elements first."""
        lines = [
            f"its certificate's {name!r} is not what growing it gives; it was changed: grow it again"
            for name in self.claims
        ]
        lines += [str(found) for found in sorted(self.mismatches, key=lambda found: -found.elements)]
        lines += [f"{name}: missing" for name in self.missing]
        lines += [f"{name}: not a tensor of {self.certificate.target['name']}" for name in self.extra]
        return [*(f"{self.path}: {line}" for line in lines), *self.unreadable]

    def to_dict(self) -> dict[str, Any]:
        return {"ok": self.ok, **asdict(self)}


def verify(
    path: str | Path, against: str | Path | None = None, spec: ModelSpec | None = None, *, trust_pickle: bool = False
) -> VerifyReport:
    """Compare grown checkpoint `path` with what growing `against` (None: the recorded source) gives, byte for byte.

    Memory: a few slabs of 32 MB, whatever the model's size. `spec`: the grown model, where the file does not record it.
    Raises UserError if `path` was not grown, was trained since, or `against` is not its source.
    """
    grown = open_reader(path, spec, trust_pickle)
    try:
        certificate = certificate_of(grown)
        origin = Path(against or certificate.source["path"])
        if against is None and not origin.exists():
            raise UserError(f"{path}: its source {origin} is not there; say where it is with --against")
        source = open_reader(origin, certificate.source_spec(), trust_pickle)
        try:
            return compare(grown, source, certificate)
        finally:
            source.close()
    finally:
        grown.close()


def compare(grown: Reader, source: Reader, certificate: Certificate) -> VerifyReport:
    """`verify` on open checkpoints. Raises UserError if `source` does not hold the weights that were grown."""
    if grown.spec is None:
        raise UserError(f"{grown.path}: does not record its model config; name it with --from MODEL_CONFIG")
    if weight_hash(source) != certificate.source["hash"]:
        raise UserError(
            f"{source.path}: not the weights that {grown.path} was grown from (their hash differs from the "
            "certificate's); give that checkpoint with --against"
        )
    try:
        plan = with_source_states(certificate.replan(grown.spec), source.tensors())
    except UserError as error:
        raise UserError(f"{grown.path}: its certificate cannot be followed: {error}") from error
    check_source(plan, source.tensors())
    infos = target_infos(plan, source.tensors(), dtype_of(certificate.dtype) if certificate.dtype else None)
    stored = {name: info for name, info in grown.tensors().items() if split_name(name)[0] in _GROWN}
    report = VerifyReport(str(grown.path), str(source.path), certificate)
    report.claims = _false_claims(certificate, plan)
    report.missing = sorted(map(_shown, set(infos) - set(stored)))
    report.extra = sorted(map(_shown, set(stored) - set(infos)))
    maker = Maker(plan, source.read)
    for name in (name for name in infos if name in stored):
        report.tensors += 1
        report.elements += prod(infos[name].shape)
        try:
            found = _compare_tensor(name, grown, stored[name], maker, infos[name])
        except UserError as error:  # its file is damaged: the others may be whole
            report.unreadable += [line for line in lines_of(error) if line not in report.unreadable]
            continue
        if found is not None:
            report.mismatches.append(found)
    if "tile" in certificate.axes.values() and not (report.missing or report.unreadable):
        report.twins = [str(twins) for twins in find_twins(grown, grown.spec)]
    return report


def _false_claims(certificate: Certificate, plan: GrowthPlan) -> list[str]:
    """What the certificate says of the result, where growing again gives something else."""
    made = certify(plan, certificate.source["hash"], certificate.source["path"], certificate.dtype).claims()
    claimed = certificate.claims()
    if not certificate.rates:  # the first certificates have none
        del claimed["rates"]
    return [name for name, value in claimed.items() if value != made[name]]


def certificate_of(grown: Reader) -> Certificate:
    """The certificate of a checkpoint. Raises UserError if it has none that is whole, or was trained since."""
    metadata = grown.metadata()
    content = metadata.get("certificate")
    if not content:
        raise UserError(f"{grown.path}: has no growth certificate; only checkpoints that growth wrote can be verified")
    if (metadata.get("train") or {}).get("step"):
        step = metadata["train"]["step"]
        raise UserError(
            f"{grown.path}: was trained for {step} steps since it was grown; verify the grown checkpoint itself"
        )
    try:
        return Certificate.from_dict(content)
    except UserError as error:
        raise UserError(f"{grown.path}: {error}") from error


def _compare_tensor(name: str, grown: Reader, stored: TensorInfo, maker: Maker, info: TensorInfo) -> Mismatch | None:
    if stored != info:
        have, made = (f"{dtype_name(each.dtype)} {list(each.shape)}" for each in (stored, info))
        note = f"is {have}, growth made {made}"
        return Mismatch(_shown(name), max(1, info.nbytes // info.dtype.itemsize), (), float("inf"), note)
    count, first, largest, values = 0, None, 0.0, ("", "")
    for region in slabs(info, SLAB_BYTES):
        is_there = grown.read(name, region)
        should_be = maker.make(name, region, info.dtype)
        wrong = _bits(is_there) != _bits(should_be)
        if not bool(wrong.any()):
            continue
        if first is None:
            first, values = _first_index(wrong, region), shown_apart(is_there[wrong][0], should_be[wrong][0])
        count += int(wrong.sum())
        largest = max(largest, float((is_there.double() - should_be.double()).abs().nan_to_num(float("inf")).max()))
    return None if first is None else Mismatch(_shown(name), count, first, largest, values=values)


def _shown(name: str) -> str:
    """A tensor's name as people know it: weights without their prefix."""
    return name.removeprefix("weight/")


def _bits(values: torch.Tensor) -> torch.Tensor:
    """The values as integers: NaN equals itself, and -0 is not 0."""
    return values.contiguous().view(_INTEGERS[values.dtype.itemsize])


def shown_apart(*values: torch.Tensor) -> tuple[str, str]:
    """Two numbers whose bits differ, so that they look different too: -0.0 and 0.0, else with their bits."""
    here, there = (f"{value.item():.9g}" if value.item() else str(value.item()) for value in values)
    if here != there:
        return here, there
    digits = 2 * values[0].element_size()
    bits = (int(_bits(value).item()) % 16**digits for value in values)
    here_bits, there_bits = (f"{here} (bits {each:0{digits}x})" for each in bits)
    return here_bits, there_bits


def _first_index(wrong: torch.Tensor, region: Region) -> tuple[int, ...]:
    index = wrong.nonzero()[0].tolist()
    return tuple(side.start + place for side, place in zip(region, index, strict=True))
