"""Fresh initial weights: the base of a chain, or a model trained alone."""

from __future__ import annotations

from pathlib import Path

import torch

from compt_megatron.checkpoint.contract import TensorInfo, slabs
from compt_megatron.checkpoint.formats import open_writer
from compt_megatron.growth.execute import SLAB_BYTES
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
    infos = {name: TensorInfo(param.shape, dtype) for name, param in spec.params.items()}
    writer = open_writer(dst, format, spec, overwrite=overwrite)
    try:
        writer.declare({f"weight/{name}": info for name, info in infos.items()})
        for name, info in infos.items():
            for region in slabs(info, SLAB_BYTES):
                values = initial(spec.params[name], seed, region, dtype)
                writer.write(f"weight/{name}", tuple(side.start for side in region), values)
        return writer.commit({"certificate": None, "lineage": [], "notes": [f"fresh weights, seed {seed}"]})
    except BaseException:
        writer.abort()
        raise
