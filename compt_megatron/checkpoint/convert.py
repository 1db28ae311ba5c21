"""Turn a checkpoint into one of another format, layout or dtype."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from compt_megatron.checkpoint.commit import SINGLE_FILES
from compt_megatron.checkpoint.contract import Exchange, Layout, Region, TensorInfo, dtype_name, split_name
from compt_megatron.checkpoint.formats import FORMATS, open_reader, open_writer
from compt_megatron.checkpoint.guard import deferred
from compt_megatron.checkpoint.stream import identity, settle, stream, unchanged, unfinished
from compt_megatron.checkpoint.workers import Place, Progress, together
from compt_megatron.errors import UserError
from compt_megatron.spec.table import ModelSpec

_CAST = ("weight",)  # what --dtype applies to: optimizer state keeps its own precision


def convert(
    src: str | Path,
    dst: str | Path,
    format: str,
    *,
    spec: ModelSpec | None = None,
    dtype: torch.dtype | None = None,
    layout: Layout | None = None,
    overwrite: bool = False,
    trust_pickle: bool = False,
    config: dict[str, Any] | None = None,
    attachments: dict[str, Path] | None = None,
    workers: int = 1,
    shard: tuple[int, int] = (0, 1),
    exchange: Exchange | None = None,
    progress: Progress | None = None,
) -> list[str]:
    """Write checkpoint `src` as `dst` in another format, `layout` or `dtype` of its weights, slice by slice.

    Returns one line for each thing that was left out because the format cannot hold it (also kept in the notes of the
    result). `config` replaces the model config that is written, where the same model's tokenizer is found elsewhere;
    `attachments` are files {name: source} that the folder gets beside its own, the tokenizer's vocabulary; those of the
    source are passed on. `workers`: new processes that share the work; or `shard` (index, number) and `exchange`
    (all-gathers an object) where several processes call this together. `progress` is told the bytes
    written, those in all, and those from an earlier run.

    Memory: less than 512 MB a worker, whatever the size of the checkpoint. What a killed run of the same call left in
    `DST.partial/` is continued. Raises UserError; then nothing is left behind.
    """
    keep_apart(src, dst)
    arguments: dict[str, Any] = {
        "src": Path(src),
        "dst": Path(dst),
        "format": format,
        "spec": spec,
        "dtype": dtype,
        "layout": layout or Layout(),
        "overwrite": overwrite,
        "trust_pickle": trust_pickle,
        "config": config,
        "attachments": attachments or {},
    }
    if workers > 1:
        found: list[str] = together(_convert, workers, progress, **arguments)
        return found
    return _convert(Place(*shard, exchange, progress), **arguments)


def _convert(
    place: Place,
    src: Path,
    dst: Path,
    format: str,
    spec: ModelSpec | None,
    dtype: torch.dtype | None,
    layout: Layout,
    overwrite: bool,
    trust_pickle: bool,
    config: dict[str, Any] | None,
    attachments: dict[str, Path],
) -> list[str]:
    with unchanged(src) as check_unchanged, deferred(*place.shard) as checks:
        reader = open_reader(src, spec, trust_pickle)
        try:
            assert reader.spec is not None
            kept, left_out = _what_fits(reader.tensors(), format)
            files = {**reader.metadata().get("attachments", {}), **{n: str(p) for n, p in attachments.items()}}
            left_out += files_left_out(files, dst, format)
            infos = {name: _as_dtype(name, info, dtype) for name, info in kept.items()}
            rounded = [f"weights cast to {dtype_name(dtype)}"] if dtype is not None and infos != kept else []
            known = reader.metadata()
            notes = [*(known.get("notes") or []), *left_out, *rounded]
            target = reader.spec if config is None else replace(reader.spec, config=config)
            assert target.digest == reader.spec.digest, "another config of the same model"
            request = identity(place, src, "convert", format, infos, layout, target.config, notes)
            writer = open_writer(
                dst,
                format,
                target,
                rank=place.rank,
                world=place.world,
                exchange=place.exchange,
                overwrite=overwrite,
                layout=layout,
                request=request,
            )

            def make(name: str, region: Region) -> torch.Tensor:
                return reader.read(name, region).to(infos[name].dtype)

            with unfinished(writer):
                writer.declare(infos)
                stream(writer, infos, make, place, checks=checks)
                settle(writer, checks)
                check_unchanged()
                writer.commit({**known, "layout": None, "notes": notes, "attachments": files})
        finally:
            reader.close()
    return left_out


def files_left_out(files: dict[str, str], dst: Path, format: str) -> list[str]:
    """A line if the result has no place for the files that lie beside the source's weights, {name: path}."""
    if not files or (format in FORMATS and FORMATS[format].attachments and dst.suffix not in SINGLE_FILES):
        return []
    return [f"left out: {', '.join(sorted(files))}, the result has no place for them"]


def keep_apart(src: str | Path, dst: str | Path) -> None:
    """Raise UserError if writing `dst` would replace or change the source `src`."""
    source, target = Path(src).resolve(), Path(dst).resolve()
    if source == target:
        raise UserError(f"{dst}: is the source itself; choose another destination")
    if source in target.parents or target in source.parents:
        raise UserError(f"{dst}: the source and the destination lie inside each other; choose another destination")


def _as_dtype(name: str, info: TensorInfo, dtype: torch.dtype | None) -> TensorInfo:
    applies = dtype is not None and split_name(name)[0] in _CAST and info.dtype.is_floating_point
    return TensorInfo(info.shape, dtype) if applies and dtype is not None else info


def _what_fits(tensors: dict[str, TensorInfo], format: str) -> tuple[dict[str, TensorInfo], list[str]]:
    """The tensors that a format can hold, and a line for every kind of tensor that it cannot."""
    holds = FORMATS[format].prefixes if format in FORMATS else ()
    kept = {name: info for name, info in tensors.items() if split_name(name)[0] in holds}
    others = Counter(split_name(name)[0] for name in tensors if name not in kept)
    return kept, [
        f"left out: {count} {prefix}/ tensors, {format} has no place for them" for prefix, count in others.items()
    ]
