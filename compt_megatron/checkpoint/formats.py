"""The registry of checkpoint formats: which one a path holds, and how to open it for reading or writing."""

from __future__ import annotations

import difflib
from pathlib import Path

import torch

from compt_megatron.checkpoint import (
    deepspeed,
    deepspeed_universal,
    huggingface,
    megatron,
    megatron_legacy,
    megatron_lm,
    open_clip,
)
from compt_megatron.checkpoint.commit import is_partial
from compt_megatron.checkpoint.contract import Exchange, Format, Layout, OpenWriter, Reader, Task, Writer, dtype_name
from compt_megatron.checkpoint.manifest import MANIFEST, read_manifest
from compt_megatron.errors import UserError
from compt_megatron.spec.table import ModelSpec

_WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# a new format is one module and one entry here
FORMATS: dict[str, Format] = {
    module.FORMAT.name: module.FORMAT
    for module in (megatron, megatron_lm, megatron_legacy, open_clip, huggingface, deepspeed, deepspeed_universal)
}


def detect(path: str | Path) -> str:
    """The name of the format that `path` holds, by content.

    Raises UserError if it does not exist, is unfinished, holds no checkpoint or holds two.
    """
    path = Path(path)
    if is_partial(path) or is_partial(path.parent):
        raise UserError(f"{path}: an unfinished checkpoint that a killed job left; start that job again or delete it")
    if not path.exists():
        near = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        close = difflib.get_close_matches(path.name, near, n=1)
        hint = f"did you mean '{path.parent / close[0]}'?" if close else "give the path of a checkpoint file or folder"
        raise UserError(f"{path}: does not exist; {hint}")
    found = [name for name, entry in FORMATS.items() if entry.recognises(path)]
    if len(found) > 1:
        raise UserError(f"{path}: holds two checkpoints ({' and '.join(found)}); name the one, or move it elsewhere")
    if found:
        return found[0]
    if path.is_dir() and (path / MANIFEST).is_file():
        written_as = (read_manifest(path) or {}).get("format")
        raise UserError(
            f"{path}: files of its {written_as} checkpoint are missing; restore it or use another checkpoint"
        )
    if (path / "latest").is_file():
        latest = path / (path / "latest").read_text(errors="replace").strip()
        if latest.exists():
            raise UserError(f"{path}: holds checkpoints, name one of them: {latest}")
        raise UserError(f"{path / 'latest'}: names '{latest.name}', which is not there; name a checkpoint in {path}")
    raise UserError(f"{path}: not a checkpoint of a known format ({', '.join(FORMATS)}); check the path")


def open_reader(path: str | Path, spec: ModelSpec | None = None, trust_pickle: bool = False) -> Reader:
    """Open a checkpoint of any format. `spec` is its model where it does not record one itself, and is checked if it
    does. `trust_pickle` allows a foreign `.metadata` to name classes other than torch's own.

    Raises UserError if there is no whole checkpoint, it is damaged, or it is one of another model.
    """
    path = Path(path)
    reader = FORMATS[detect(path)].open_reader(path, spec, trust_pickle)
    for name, info in reader.tensors().items():
        if name.startswith("weight/") and info.dtype not in _WEIGHT_DTYPES:
            reader.close()
            raise UserError(
                f"{path}: '{name.removeprefix('weight/')}' is {dtype_name(info.dtype)}; weights must be float32, "
                "bfloat16, float16 or float64: convert it first"
            )
    return reader


def require_writable(format: str) -> OpenWriter:
    """What opens checkpoints of a format for writing. Raises UserError if it is unknown or read only."""
    if format not in FORMATS:
        near = difflib.get_close_matches(format, FORMATS, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(FORMATS)}"
        raise UserError(f"checkpoint format '{format}' is not known; {hint}")
    opener = FORMATS[format].open_writer
    if opener is None:
        raise UserError(f"checkpoint format '{format}' can only be read; choose another with --format")
    return opener


def open_writer(
    path: str | Path,
    format: str,
    spec: ModelSpec,
    *,
    rank: int = 0,
    world: int = 1,
    exchange: Exchange | None = None,
    overwrite: bool = False,
    layout: Layout | None = None,
    request: str | None = None,
) -> Writer:
    """Begin a checkpoint of model `spec`; it appears at `path` when committed.

    Ranks that write one checkpoint together pass their `rank` of `world` and an all-gather of objects, and make all
    collective calls (this one, declare, commit) together. `layout`: the model-parallel ranks that the files are cut
    for, where the format cuts its files. `request`: see `Task`. Raises UserError if the format is unknown or read only,
    or the path is taken.
    """
    task = Task(Path(path), spec, rank, world, exchange, overwrite, layout or Layout(), request)
    opener = require_writable(format)
    if task.layout != Layout() and not FORMATS[format].layouts:
        cut = ", ".join(name for name, entry in FORMATS.items() if entry.layouts)
        raise UserError(
            f"{path}: {format} files are not cut for model-parallel ranks; leave out --tensor and --pipeline, or write "
            f"one of {cut}"
        )
    return opener(task)
