"""Fresh initial weights: the base of a chain, or a model trained alone."""

from __future__ import annotations

from pathlib import Path

import torch

from compt_megatron.checkpoint.contract import TensorInfo
from compt_megatron.checkpoint.formats import open_writer
from compt_megatron.checkpoint.stream import stream, unfinished
from compt_megatron.checkpoint.workers import Place
from compt_megatron.spec.random import initial
from compt_megatron.spec.table import ModelSpec


def write_fresh(
    spec: ModelSpec,
    dst: str | Path,
    seed: int,
    format: str = "megatron",
    *,
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
) -> Path:
    """Write the initial weights of model `spec` for `seed` to `dst` and return the checkpoint's path.

    The values depend on (seed, parameter name, index) alone. Raises UserError if `dst` exists or the disk is full.
    """
    infos = {f"weight/{name}": TensorInfo(param.shape, dtype) for name, param in spec.params.items()}
    params = {f"weight/{name}": param for name, param in spec.params.items()}
    writer = open_writer(dst, format, spec, overwrite=overwrite)
    with unfinished(writer):
        writer.declare(infos)
        stream(writer, infos, lambda name, region: initial(params[name], seed, region, dtype), Place())
        return writer.commit({"certificate": None, "lineage": [], "notes": [f"fresh weights, seed {seed}"]})
