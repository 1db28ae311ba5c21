"""The training loader: this rank's rows of every global step, from any step on.

Row i of global step t is the same sample with the same captions and the same augmentation whatever the number of
ranks and workers, and whether the run was interrupted or not (see stream.py). Every stream contributes batch_size / V
neighbouring rows; rank r owns V / world neighbouring streams and its workers share those out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from compt_megatron.data.batch import Batch
from compt_megatron.data.prefetch import Failure, Workers
from compt_megatron.data.samples import Decoder, Sample
from compt_megatron.data.seeds import Use, draw_captions, forked_random_state, mix, seed_all
from compt_megatron.data.source import ShardSource
from compt_megatron.data.stream import SampleStore, SkipBudget, StreamPlan, default_streams, emit
from compt_megatron.errors import UserError

CACHE_STORED_BYTES = 256 << 20  # data sets up to this size as stored are kept decoded ...
CACHE_DECODED_BYTES = 1 << 30  # ... as long as a rank's images stay below this size


class _StepParts(IterableDataset):
    """What one worker contributes to each step: the rows of its streams. Plain data, so it can be spawned."""

    def __init__(
        self,
        plan: StreamPlan,
        source: ShardSource,
        decoder: Decoder,
        transform: Callable[..., torch.Tensor],
        tokenizer: Callable[[Sequence[str]], torch.Tensor] | None,
        captions: int,
        rows: int,
        streams: range,
        start_step: int,
        skip_budget: float,
        cache_bytes: int,
    ) -> None:
        self.plan, self.source, self.decoder, self.transform, self.tokenizer = (
            plan,
            source,
            decoder,
            transform,
            tokenizer,
        )
        self.captions, self.rows, self.streams, self.start_step = captions, rows, streams, start_step
        self.skip_budget, self.cache_bytes = skip_budget, cache_bytes

    def __iter__(self) -> Iterator[Batch | Failure]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        total = len(self.streams)
        mine = self.streams[worker * total // workers : (worker + 1) * total // workers]
        try:
            yield from self.parts(mine, self.cache_bytes // workers)
        except UserError as error:
            if info is None:
                raise
            yield Failure(str(error))

    def parts(self, streams: range, cache_bytes: int) -> Iterator[Batch]:
        store = SampleStore(self.source, self.decoder, cache_bytes)
        budget = SkipBudget(self.source, self.skip_budget)
        position = self.start_step * self.rows
        emissions = [(stream, emit(self.plan, store, budget, stream, position)) for stream in streams]
        step = self.start_step
        while True:
            drawn = [(stream, *next(samples)) for stream, samples in emissions for _ in range(self.rows)]
            yield self.collate(drawn, step)
            step += 1

    def collate(self, drawn: list[tuple[int, int, Sample]], step: int) -> Batch:
        """Augment, choose captions, tokenize: (stream, position, sample) of each row -> Batch."""
        prepare = getattr(self.transform, "prepare", self.transform)
        finish = getattr(self.transform, "finish", torch.stack)
        seed = self.plan.seed
        prepared: list[Any] = []
        texts: list[torch.Tensor] = []
        with forked_random_state():
            for stream, position, sample in drawn:
                seed_all(mix(seed, Use.AUGMENT, stream, position))
                prepared.append(prepare(sample.image))
                if self.tokenizer is not None:
                    chosen = draw_captions(len(sample.captions), self.captions, seed, Use.CAPTIONS, stream, position)
                    texts.append(self.tokenizer([sample.captions[index] for index in chosen]))
        labels = None if self.tokenizer is not None else torch.tensor([sample.label for _, _, sample in drawn])
        return Batch(finish(prepared), torch.stack(texts) if texts else None, labels, [s.id for _, _, s in drawn], step)


class TrainLoader:
    """Batches of steps start_step, start_step + 1, ... for ever.

    `batch_size` is the global one. With a `tokenizer` batches have `texts` [b, captions, context], without one they
    have `labels` [b]. `transform` makes a [3, H, W] tensor of an RGB image and may draw from torch's, numpy's and
    Python's global generators; it does so in a forked state, seeded by (seed, stream, position). `streams` fixes V,
    the number of logical streams: a run records `loader.streams` in its checkpoint and passes it on resuming, since V
    is part of what decides the order of samples. `workers` processes prefetch two steps (0: none, in this process).
    `shuffle_window` samples a stream are held in memory, undecoded, unless the whole set is small and local: then
    it is kept decoded (`cache`: True, False, or None for that choice). `skip_budget`: see `SkipBudget`;
    `caption_keys`, `caption_member`: see `Decoder`.

    Raises UserError, here or while iterating, for a layout or data that cannot work.
    """

    def __init__(
        self,
        source: ShardSource,
        *,
        tokenizer: Callable[[Sequence[str]], torch.Tensor] | None,
        transform: Callable[..., torch.Tensor],
        batch_size: int,
        captions: int = 1,
        seed: int = 0,
        streams: int | None = None,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        start_step: int = 0,
        skip_budget: float = 0.001,
        shuffle_window: int = 2048,
        caption_keys: Sequence[str] | None = None,
        caption_member: str | None = None,
        cache: bool | None = None,
        pin_memory: bool = False,
        start_method: str | None = None,
    ) -> None:
        self.streams = streams or default_streams(len(source.shards), batch_size, world)
        _check_layout(source, batch_size, self.streams, world)
        self.source, self.batch_size, self.start_step = source, batch_size, start_step
        own = self.streams // world
        self.workers = min(workers, own)
        self.pin_memory = pin_memory
        self._parts = _StepParts(
            StreamPlan(source.sizes, self.streams, seed, shuffle_window),
            source,
            Decoder("label" if tokenizer is None else "captions", caption_keys, source.classes, caption_member),
            transform,
            tokenizer,
            captions,
            batch_size // self.streams,
            range(rank * own, (rank + 1) * own),
            start_step,
            skip_budget,
            _cache_bytes(source, cache),
        )
        self._workers = Workers(self._parts, self.workers, start_method)

    @property
    def steps_per_epoch(self) -> int:
        """Global steps in which every sample is seen once (rounded down)."""
        return self.source.samples // self.batch_size

    def __iter__(self) -> Iterator[Batch]:
        parts = self._workers.items()
        try:
            while True:  # a part from each worker in turn
                batch = Batch.join([next(parts) for _ in range(max(1, self.workers))])
                yield batch.pin() if self.pin_memory else batch
        finally:
            self.close()

    def close(self) -> None:
        """Stop the worker processes. Iterating again starts over at `start_step`."""
        self._workers.close()


def _check_layout(source: ShardSource, batch_size: int, streams: int, world: int) -> None:
    if source.samples < batch_size:
        raise UserError(
            f"data {source.name!r} has {source.samples} samples, fewer than one batch of {batch_size}; "
            "lower data.batch_size or add data"
        )
    if batch_size % world:
        raise UserError(
            f"data.batch_size {batch_size} is not a multiple of the {world} data-parallel ranks; use "
            f"{max(1, round(batch_size / world)) * world}"
        )
    if batch_size % streams:
        raise UserError(f"data.batch_size {batch_size} is not a multiple of data.streams {streams}; change one of them")
    if streams % world:
        raise UserError(
            f"data.streams {streams} do not divide among {world} data-parallel ranks; a run that has begun with them "
            f"needs a number of ranks that divides {streams}, a new one data.streams: "
            f"{default_streams(len(source.shards), batch_size, world)}"
        )


def _cache_bytes(source: ShardSource, cache: bool | None) -> int:
    stored = source.bytes
    if cache is None:
        cache = stored is not None and stored <= CACHE_STORED_BYTES
    return CACHE_DECODED_BYTES if cache else 0
