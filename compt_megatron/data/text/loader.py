"""The loaders of text: this rank's rows of every global step, for training (from any step on) and for evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from compt_megatron.data.prefetch import Failure, Workers
from compt_megatron.data.text.batch import TokenBatch
from compt_megatron.data.text.order import Pass
from compt_megatron.data.text.sequences import Row, Sequences, require_ids
from compt_megatron.data.text.source import TextSource
from compt_megatron.errors import UserError


class _Steps(IterableDataset):
    """Every `workers`-th step of this rank, from this worker's first on. Plain data, so it can be spawned."""

    def __init__(self, sequences: Sequences, batch_size: int, rows: range, start_step: int, start_sample: int) -> None:
        self.sequences, self.batch_size, self.rows = sequences, batch_size, rows
        self.start_step, self.start_sample = start_step, start_sample

    def __iter__(self) -> Iterator[TokenBatch | Failure]:
        info = get_worker_info()
        done, stride = (info.id, info.num_workers) if info is not None else (0, 1)
        try:
            while True:
                first = self.start_sample + done * self.batch_size
                drawn = [self.sequences[first + row] for row in self.rows]
                yield _collated(drawn, self.start_step + done)
                done += stride
        except UserError as error:
            if info is None:
                raise
            yield Failure(str(error))


class TokenLoader:
    """Batches of steps start_step, start_step + 1, ... for ever.

    Row i of step t is sample `start_sample` + (t - `start_step`) · `batch_size` + i of `Sequences`, whatever the number
    of ranks and workers. `batch_size` is the global one; rank r of `world` gets neighbouring rows. `length`: tokens a
    row. `start_sample`: the samples that were consumed before `start_step` (default: start_step · batch_size, right as
    long as the batch size was the same). `vocab_size`: the model's; see `TextSource.require_vocabulary`.
    `mask_document_starts`, `cache_dir`: see `Sequences`. `workers` processes prefetch two steps each (0: none, in this
    process).

    Raises UserError, here or while iterating, for a layout or data that cannot work.
    """

    streams = 1  # TrainLoader's logical streams; here the order of samples needs none

    def __init__(
        self,
        source: TextSource,
        *,
        length: int,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        start_step: int = 0,
        start_sample: int | None = None,
        vocab_size: int | None = None,
        mask_document_starts: bool = False,
        cache_dir: Path | None = None,
        pin_memory: bool = False,
        start_method: str | None = None,
    ) -> None:
        if batch_size % world:
            raise UserError(f"data.batch_size {batch_size} does not divide among {world} data-parallel ranks")
        if vocab_size is not None:
            source.require_vocabulary(vocab_size)
        self.source, self.batch_size, self.start_step = source, batch_size, start_step
        self.pin_memory = pin_memory
        self.sequences = Sequences(
            [(part.name, part.documents) for part in source.parts],
            [part.weight for part in source.parts],
            length,
            seed,
            vocab_size=vocab_size,
            mask_document_starts=mask_document_starts,
            cache_dir=cache_dir,
        )
        own = batch_size // world
        start = start_step * batch_size if start_sample is None else start_sample
        self._steps = _Steps(self.sequences, batch_size, range(rank * own, (rank + 1) * own), start_step, start)
        self._workers = Workers(self._steps, workers, start_method)

    @property
    def steps_per_epoch(self) -> int:
        """Global steps in which as many samples are seen as one pass over every data set has (rounded down)."""
        return len(self.sequences) // self.batch_size

    def __iter__(self) -> Iterator[TokenBatch]:
        try:
            for step in self._workers.items():
                yield step.pin() if self.pin_memory else step
        finally:
            self.close()

    def close(self) -> None:
        """Stop the worker processes. Iterating again starts over at `start_step`."""
        self._workers.close()


class HeldOutLoader:
    """All of a text once, in order, in windows of `length`: what perplexity is measured on.

    Every token but the first of each data set is a target once. All ranks get equally many batches of
    batch_size / world rows; the last ones are filled up with rows, and windows with places, whose mask is False.
    `limit`: the first windows alone. `vocab_size`: ids beyond it are refused when they are met. The weights of a blend
    do not matter. Raises UserError, here or while iterating, for a layout or data that cannot work.
    """

    def __init__(
        self,
        source: TextSource,
        *,
        length: int,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        limit: int | None = None,
        vocab_size: int | None = None,
    ) -> None:
        if batch_size % world:
            raise UserError(f"a batch of {batch_size} does not divide among {world} data-parallel ranks")
        source.require_targets()
        self.length, self.batch_size, self.vocab_size = length, batch_size, vocab_size
        own = batch_size // world
        self.rows = range(rank * own, (rank + 1) * own)
        self._lines = [(part.name, Pass(part.documents, None, 0)) for part in source.parts]
        self._tokens = [part.documents.tokens for part in source.parts]
        counts = [-(-(tokens - 1) // length) for tokens in self._tokens]
        self._ends = np.cumsum(counts)
        self.windows = sum(counts) if limit is None else min(limit, sum(counts))

    def __len__(self) -> int:
        """Number of batches."""
        return -(-self.windows // self.batch_size)

    def __iter__(self) -> Iterator[TokenBatch]:
        for step in range(len(self)):
            yield _collated([self._window(step * self.batch_size + row) for row in self.rows], step)

    def _window(self, window: int) -> Row:
        ids, mask = np.zeros(self.length + 1, np.int64), np.zeros(self.length, np.bool_)
        if window >= self.windows:
            return Row(ids, mask, "")
        part = int(np.searchsorted(self._ends, window, side="right"))
        own = window - (int(self._ends[part - 1]) if part else 0)
        name, line = self._lines[part]
        count = min(self.length, self._tokens[part] - 1 - own * self.length)
        ids[: count + 1] = line.read(own * self.length, count + 1)[0]
        require_ids(ids, self.vocab_size, name)
        mask[:count] = True
        return Row(ids, mask, f"{name}:{own}")


def _collated(rows: Sequence[Row], step: int) -> TokenBatch:
    ids = torch.from_numpy(np.stack([row.ids for row in rows]))
    mask = torch.from_numpy(np.stack([row.mask for row in rows]))
    return TokenBatch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), mask, [row.name for row in rows], step)
