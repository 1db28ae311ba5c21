"""Growth in one call, and the names other parts of the project use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from compt_megatron.checkpoint.api import keep_apart
from compt_megatron.checkpoint.commit import SINGLE_FILES
from compt_megatron.checkpoint.contract import Exchange, Reader, dtype_name, dtype_of
from compt_megatron.checkpoint.digest import weight_hash
from compt_megatron.checkpoint.formats import FORMATS, detect, open_reader, open_writer
from compt_megatron.errors import UserError
from compt_megatron.growth.certificate import Certificate, certify
from compt_megatron.growth.execute import check_source, execute
from compt_megatron.growth.fresh import write_fresh
from compt_megatron.growth.moments import with_source_states
from compt_megatron.growth.operators import OPERATORS, plan
from compt_megatron.growth.plan import GrowthPlan
from compt_megatron.growth.request import Moments
from compt_megatron.growth.verify import VerifyReport, verify
from compt_megatron.spec.families import load_spec
from compt_megatron.spec.table import ModelSpec

__all__ = [
    "OPERATORS",
    "Certificate",
    "GrowthPlan",
    "VerifyReport",
    "execute",
    "grow",
    "plan",
    "verify",
    "write_fresh",
]


def grow(
    src: str | Path,
    dst: str | Path,
    to: str | Path | ModelSpec,
    *,
    source_spec: str | Path | ModelSpec | None = None,
    operator: str = "exact",
    depth: str | None = None,
    axes: dict[str, str] | None = None,
    format: str | None = None,
    dtype: str | torch.dtype | None = None,
    seed: int = 0,
    allow_approximate: bool = False,
    noise: float = 0.0,
    moments: Moments = "fresh",
    overwrite: bool = False,
    dry_run: bool = False,
    trust_pickle: bool = False,
    shard: tuple[int, int] = (0, 1),
    exchange: Exchange | None = None,
) -> Certificate | GrowthPlan:
    """Grow checkpoint `src` into model `to` and write it to `dst`; returns its certificate, or the plan on a dry run.

    `to`, `source_spec`: a model config (see `load_spec`) or a parameter table; the source's is needed only where the
    checkpoint does not record it. `operator`, `depth`, `axes`, `seed`, `allow_approximate`, `noise`, `moments`: see
    `operators.plan`.
    `format`, `dtype`: of the result (None: the source's own; the `megatron` format if that can only be read).
    `shard` (index, number) and `exchange` (all-gathers an object): several workers that write one result together.

    Raises UserError, with nothing written, if the source is damaged, growth cannot connect the models, or `dst` exists.
    """
    wanted = _dtype(dtype)
    if not dry_run:
        keep_apart(src, dst)
    reader = open_reader(src, _spec(source_spec), trust_pickle)
    try:
        source, target = _source_model(reader), _target_model(to)
        growth = plan(
            source,
            target,
            operator,
            depth=depth,
            axes=axes,
            seed=seed,
            allow_approximate=allow_approximate,
            noise=noise,
            moments=moments,
        )
        growth = with_source_states(growth, reader.tensors())
        check_source(growth, reader.tensors())
        if dry_run:
            return growth
        digest = weight_hash(reader) if shard[0] == 0 else ""
        if exchange is not None:
            digest = exchange(digest)[0]
        certificate = certify(growth, digest, str(src), dtype_name(wanted) if wanted else None)
        form = format or default_format(src, dst, target)
        writer = open_writer(dst, form, target, rank=shard[0], world=shard[1], exchange=exchange, overwrite=overwrite)
        try:
            execute(growth, reader, writer, shard=shard, dtype=wanted)
            record = {"certificate": certificate.to_dict(), "lineage": lineage(reader, growth, digest)}
            writer.commit(record | {"attachments": reader.metadata().get("attachments", {})})
        except BaseException:
            writer.abort()
            raise
        return certificate
    finally:
        reader.close()


def default_format(src: str | Path, dst: str | Path, target: ModelSpec) -> str:
    """The format of a result when none is named: that of a single file if `dst` is one, else the source's own."""
    if Path(dst).suffix in SINGLE_FILES:
        return "hf" if target.is_language_model else "open_clip"
    own = detect(src)
    return own if FORMATS[own].open_writer is not None else "megatron"


def lineage(reader: Reader, growth: GrowthPlan, source_hash: str) -> list[dict[str, Any]]:
    """The ancestors of a grown checkpoint, base first: the source's own, then the source."""
    metadata = reader.metadata()
    made = (metadata.get("certificate") or {}).get("operator")
    parent = {"name": growth.source.name, "digest": growth.source.digest, "hash": source_hash, "operator": made}
    return [*(metadata.get("lineage") or []), parent]


def _spec(given: str | Path | ModelSpec | None) -> ModelSpec | None:
    return given if given is None or isinstance(given, ModelSpec) else load_spec(str(given))


def _target_model(to: str | Path | ModelSpec) -> ModelSpec:
    return to if isinstance(to, ModelSpec) else load_spec(str(to))


def _source_model(reader: Reader) -> ModelSpec:
    if reader.spec is None:
        raise UserError(f"{reader.path}: does not record its model config; name it with --from MODEL_CONFIG")
    return reader.spec


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    try:
        found = dtype_of(dtype)
    except ValueError:
        found = None
    if found is None or not found.is_floating_point:
        raise UserError(f"dtype {dtype!r} is not known; use float32, bfloat16, float16 or float64")
    return found
