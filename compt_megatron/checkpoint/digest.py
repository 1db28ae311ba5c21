"""One hash of a checkpoint's weights, the same in every format and layout."""

from __future__ import annotations

import torch
import xxhash

from compt_megatron.checkpoint.contract import Reader, dtype_name, slabs

_SLAB = 32 * 2**20  # bytes read at a time


def weight_hash(reader: Reader) -> str:
    """xxh3 (128 bits, hex) of all `weight/` tensors: by sorted name, each one's name, dtype, shape and bytes.

    It is what certificates and the ledger call a model's weights by. Memory: one slab of 32 MiB, or one row.
    """
    digest = xxhash.xxh3_128()
    tensors = reader.tensors()
    for name in sorted(name for name in tensors if name.startswith("weight/")):
        info = tensors[name]
        digest.update(f"{name}\n{dtype_name(info.dtype)}\n{list(info.shape)}\n".encode())
        for region in slabs(info, _SLAB):
            values = reader.read(name, region).contiguous().reshape(-1).view(torch.uint8)
            digest.update(values.numpy().data)
    return digest.hexdigest()
