"""One hash of a checkpoint's weights, the same in every format and layout."""

from __future__ import annotations

import torch
import xxhash

from compt_megatron.checkpoint.contract import Reader, dtype_name, slabs
from compt_megatron.checkpoint.pace import Pace

_SLAB = 4 * 2**20  # bytes read at a time


def weight_hash(reader: Reader, pace: Pace | None = None) -> str:
    """xxh3 (128 bits, hex) of all `weight/` tensors: by sorted name, each one's name, dtype, shape and bytes.

    It is what certificates and the ledger call a model's weights by. Memory: one slab of 4 MiB. `pace`: of work that
    reads the same checkpoint at the same time.
    """
    digest = xxhash.xxh3_128()
    tensors = {name: info for name, info in sorted(reader.tensors().items()) if name.startswith("weight/")}
    total, done = sum(info.nbytes for info in tensors.values()), 0
    for name, info in tensors.items():
        digest.update(f"{name}\n{dtype_name(info.dtype)}\n{list(info.shape)}\n".encode())
        for region in slabs(info, _SLAB):
            if pace is not None:
                pace.wait_for(done / total)
            values = reader.read(name, region).contiguous().reshape(-1).view(torch.uint8)
            digest.update(values.numpy().data)
            done += values.nbytes
    return digest.hexdigest()
