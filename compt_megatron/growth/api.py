"""Growth in one call, and the names other parts of the project use."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from compt_megatron.checkpoint.api import keep_apart
from compt_megatron.checkpoint.commit import SINGLE_FILES
from compt_megatron.checkpoint.contract import Exchange, Layout, Reader, dtype_name, dtype_of
from compt_megatron.checkpoint.convert import files_left_out
from compt_megatron.checkpoint.digest import hash_beside
from compt_megatron.checkpoint.formats import FORMATS, detect, open_reader, open_writer, require_writable
from compt_megatron.checkpoint.guard import Checks, already_checked, deferred
from compt_megatron.checkpoint.stream import identity, settle, unchanged, unfinished
from compt_megatron.checkpoint.workers import Place, Progress, together
from compt_megatron.errors import UserError
from compt_megatron.growth.certificate import Certificate, certify
from compt_megatron.growth.execute import check_source, execute, target_infos
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
    layout: Layout | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    trust_pickle: bool = False,
    workers: int = 1,
    shard: tuple[int, int] = (0, 1),
    exchange: Exchange | None = None,
    progress: Progress | None = None,
) -> Certificate | GrowthPlan:
    """Grow checkpoint `src` into model `to` and write it to `dst`; returns its certificate, or the plan on a dry run.

    `to`, `source_spec`: a model config (see `load_spec`) or a parameter table; the source's is needed only where the
    checkpoint does not record it. `operator`, `depth`, `axes`, `seed`, `allow_approximate`, `noise`, `moments`: see
    `operators.plan`. `format`, `dtype`: of the result (None: the source's own; the `megatron` format if that can only
    be read). `layout`: the model-parallel ranks that the result's files are cut for. `workers`: new processes that
    share the work; or `shard` (index, number) and `exchange` (all-gathers an object) where several processes call this
    together. `progress` is told the bytes written, those in all, and those from an earlier run.

    Memory: less than 512 MB a worker, whatever the size of the checkpoints. What a killed run of the same call left in
    `DST.partial/` is continued. Raises UserError, with nothing written, if the source is damaged, growth cannot connect
    the models, or `dst` exists.
    """
    arguments: dict[str, Any] = {
        "src": Path(src),
        "dst": Path(dst),
        "to": to,
        "source_spec": source_spec,
        "format": format,
        "dtype": _dtype(dtype),
        "layout": layout or Layout(),
        "overwrite": overwrite,
        "trust_pickle": trust_pickle,
        "options": {
            "operator": operator,
            "depth": depth,
            "axes": axes,
            "seed": seed,
            "allow_approximate": allow_approximate,
            "noise": noise,
            "moments": moments,
        },
    }
    if dry_run:
        return _planned(workers=max(workers, shard[1]), **arguments)
    keep_apart(src, dst)
    if workers > 1:
        found: Certificate = together(_grow, workers, progress, **arguments)
        return found
    return _grow(Place(*shard, exchange, progress), **arguments)


def _grow(
    place: Place,
    src: Path,
    dst: Path,
    to: str | Path | ModelSpec,
    source_spec: str | Path | ModelSpec | None,
    format: str | None,
    dtype: torch.dtype | None,
    layout: Layout,
    overwrite: bool,
    trust_pickle: bool,
    options: dict[str, Any],
) -> Certificate:
    """One worker's part of `grow`."""
    with unchanged(src) as check_unchanged, deferred(*place.shard) as checks:
        reader = open_reader(src, _spec(source_spec), trust_pickle)
        try:
            growth = _plan(reader, to, options)
            form = format or default_format(src, dst, growth.target)
            writer = open_writer(
                dst,
                form,
                growth.target,
                rank=place.rank,
                world=place.world,
                exchange=place.exchange,
                overwrite=overwrite,
                layout=layout,
                request=identity(place, src, "grow", form, dtype, layout, growth),
            )
            with unfinished(writer), _hash_of(src, reader, trust_pickle, checks, place) as source_hash:
                execute(growth, reader, writer, dtype=dtype, place=place, checks=checks)
                settle(writer, checks)
                digest = source_hash()
                check_unchanged()
                certificate = certify(growth, digest, os.path.abspath(src), dtype_name(dtype) if dtype else None)
                files = reader.metadata().get("attachments", {})
                warnings = [f"warning: {line}" for line in growth.warnings()]
                record = {
                    "certificate": certificate.to_dict(),
                    "lineage": lineage(reader, growth, digest),
                    "notes": [*files_left_out(files, dst, form), *warnings],
                    "attachments": files,
                }
                writer.commit(record)
            return certificate
        finally:
            reader.close()


@contextmanager
def _hash_of(
    src: Path, reader: Reader, trust_pickle: bool, checks: Checks, place: Place
) -> Iterator[Callable[[], str]]:
    """The hash of the source's weights: made by the first worker, beside its work; all workers ask for it together."""

    def again() -> Reader:
        with already_checked():
            return open_reader(src, reader.spec, trust_pickle)

    if place.rank:
        yield lambda: str(place.exchange("")[0]) if place.exchange else ""
        return
    with hash_beside(again, checks.pace) as hashing:
        yield lambda: str(place.exchange(hashing.result())[0]) if place.exchange else hashing.result()


def _planned(
    workers: int,
    src: Path,
    dst: Path,
    to: str | Path | ModelSpec,
    format: str | None,
    dtype: torch.dtype | None,
    layout: Layout,
    options: dict[str, Any],
    **arguments: Any,
) -> GrowthPlan:
    """The plan alone, and what carrying it out would take."""
    from compt_megatron.growth.dry_run import dry_run

    with already_checked():  # no tensor is read
        reader = open_reader(src, _spec(arguments["source_spec"]), arguments["trust_pickle"])
    try:
        growth, tensors = _plan(reader, to, options), reader.tensors()
        form = format or default_format(src, dst, growth.target)
        require_writable(form)
        return dry_run(growth, tensors, target_infos(growth, tensors, dtype), dst, form, layout, workers)
    finally:
        reader.close()


def _plan(reader: Reader, to: str | Path | ModelSpec, options: dict[str, Any]) -> GrowthPlan:
    growth = with_source_states(plan(_source_model(reader), _target_model(to), **options), reader.tensors())
    check_source(growth, reader.tensors())
    return growth


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
