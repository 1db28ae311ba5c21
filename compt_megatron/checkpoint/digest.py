"""One hash of a checkpoint's weights, the same in every format and layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

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


@contextmanager
def hash_beside(open_again: Callable[[], Reader], pace: Pace) -> Iterator[Future[str]]:
    """Inside, the weights of the checkpoint that `open_again` opens are hashed by a thread beside the work."""

    def work() -> str:
        try:
            return weight_hash(reader, pace)
        finally:
            reader.close()

    reader = open_again()
    with ThreadPoolExecutor(1, "hash") as thread:
        try:
            yield thread.submit(work)
        finally:
            pace.stop()
