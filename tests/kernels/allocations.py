"""How many bytes of tensors a function has at its peak, beside those it was given."""

from __future__ import annotations

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Counter(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.live, self.peak, self._seen = 0, 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        found = func(*args, **(kwargs or {}))
        for x in tree_leaves(found):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in given:
                self._add(x.untyped_storage())
        return found

    def _add(self, storage):
        address, size = storage.data_ptr(), storage.nbytes()
        if not size or address in self._seen:
            return
        self._seen[address] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, address)

    def _drop(self, address):
        self.live -= self._seen.pop(address, 0)


def peak_bytes(function):
    counter = _Counter()
    with counter:
        function()
    return counter.peak
