"""Worker processes of the training loaders: the items of a dataset, and errors on their way home."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from compt_megatron.errors import UserError

PREFETCHED_STEPS = 2


@dataclass(frozen=True)
class Failure:
    """A UserError on its way out of a worker process (the DataLoader would bury it in a traceback)."""

    message: str


class Workers:
    """The items of `dataset`, in turn from `count` processes that prefetch two each (0: made in this process)."""

    def __init__(self, dataset: IterableDataset, count: int, start_method: str | None) -> None:
        self._dataset, self._count, self._start_method = dataset, count, start_method
        self._running: Any = None

    def items(self) -> Iterator[Any]:
        """From the dataset's beginning; ends the workers of an earlier call. A Failure is raised as UserError."""
        self.close()
        if self._count == 0:
            yield from map(_unwrapped, self._dataset)
            return
        # Its own generator: the DataLoader would otherwise draw a seed from the trainer's.
        loader = DataLoader(
            self._dataset,
            batch_size=None,
            num_workers=self._count,
            prefetch_factor=PREFETCHED_STEPS,
            generator=torch.Generator(),
            multiprocessing_context=self._start_method,
        )
        self._running = running = iter(loader)
        try:
            yield from map(_unwrapped, running)
        finally:
            self.close()

    def close(self) -> None:
        """Stop the processes."""
        if self._running is not None:
            self._running._shutdown_workers()
            self._running = None


def _unwrapped(item: Any) -> Any:
    if isinstance(item, Failure):
        raise UserError(item.message)
    return item
