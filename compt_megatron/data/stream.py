"""The order in which training meets the samples: a function of the data and the seed, and of nothing else.

Every pass over the data permutes the shards, lays their samples end to end and cuts that line into V equal pieces,
one for each logical stream (up to V - 1 samples, other ones in each pass, are left over). A stream reads its piece in
windows of `window` samples, permutes each window and emits it. So the n-th sample of stream v is known from (seed, v,
n) and the shard sizes alone: a resumed run opens no shard that lies before its position, and neither ranks nor
workers, which merely own streams, can change it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from math import lcm

import numpy as np

from compt_megatron.data.samples import Broken, Decoder, Sample
from compt_megatron.data.seeds import Use, permutation
from compt_megatron.data.source import ShardSource
from compt_megatron.data.tar_reader import RawSample, read_samples
from compt_megatron.errors import UserError

Item = tuple[RawSample, int, int] | Sample | Broken  # (undecoded, shard, index in the shard) or decoded


def default_streams(shards: int, batch_size: int, world: int = 1) -> int:
    """Logical streams where the user names no number: the largest power of two that divides the global batch and is
    at most 64 and at most the number of shards (or 16, if there are fewer shards).

    Independent of ranks and workers, unless it is no multiple of the `world` data-parallel ranks: then the least common
    one, or `world` where that does not divide the batch.
    """
    limit = min(64, max(shards, 16))
    streams = 1
    while streams * 2 <= limit and batch_size % (streams * 2) == 0:
        streams *= 2
    common = lcm(streams, world)
    return common if batch_size % common == 0 else world


class StreamPlan:
    """Where in the data every stream is at every position. Positions count the samples a stream has emitted."""

    def __init__(self, sizes: Sequence[int], streams: int, seed: int, window: int) -> None:
        self.sizes, self.streams, self.seed, self.window = np.asarray(sizes, dtype=np.int64), streams, seed, window
        self.per_pass = int(self.sizes.sum()) // streams  # samples a stream emits in one pass
        assert min(streams, window, self.per_pass) >= 1

    def segments(self, stream: int, number: int) -> list[tuple[int, int, int]]:
        """What a stream reads in pass `number`, in order: (shard, first sample, end) each."""
        order = permutation(len(self.sizes), self.seed, Use.SHARDS, number)
        ends = np.cumsum(self.sizes[order])
        low, high = stream * self.per_pass, (stream + 1) * self.per_pass
        found = []
        for place in range(int(np.searchsorted(ends, low, side="right")), len(order)):
            size = int(self.sizes[order[place]])
            begin = int(ends[place]) - size
            if begin >= high:
                break
            if size:
                found.append((int(order[place]), max(low - begin, 0), min(high - begin, size)))
        return found

    def window_at(self, position: int) -> tuple[int, int, int]:
        """(pass, window's start within the pass, its length) of the window that holds `position`. Windows end with
        the pass, so that a pass emits each of its samples once before the next begins."""
        number, offset = divmod(position, self.per_pass)
        start = offset - offset % self.window
        return number, start, min(self.window, self.per_pass - start)

    def window_order(self, stream: int, number: int, start: int, length: int) -> np.ndarray:
        """The permutation in which that window is emitted."""
        return permutation(length, self.seed, Use.WINDOW, stream, number, start)


class SkipBudget:
    """Broken samples that may be skipped in each shard: `fraction` of its samples, at least one unless it is 0."""

    def __init__(self, source: ShardSource, fraction: float) -> None:
        self.source, self.fraction = source, fraction
        self._broken: dict[int, set[int]] = {}

    def note(self, broken: Broken) -> None:
        """Count a broken sample once. Raises UserError when its shard's budget is exceeded."""
        seen = self._broken.setdefault(broken.shard, set())
        seen.add(broken.index)
        size = self.source.sizes[broken.shard]
        allowed = max(1, int(size * self.fraction)) if self.fraction > 0 else 0
        if len(seen) > allowed:
            shard = self.source.shards[broken.shard]
            raise UserError(
                f"shard {shard}: {len(seen)} broken samples among its {size}, the skip budget allows {allowed} "
                f"(the last: {broken.id}: {broken.reason}); mend the shard or raise data.skip_budget"
            )

    @property
    def skipped(self) -> int:
        """Distinct broken samples met so far in this process."""
        return sum(map(len, self._broken.values()))


class SampleStore:
    """Reads and decodes samples; keeps small data sets decoded in memory.

    `cache_bytes` bounds the memory of decoded images; shards beyond it are read and decoded each time.
    """

    def __init__(self, source: ShardSource, decoder: Decoder, cache_bytes: int = 0) -> None:
        self.source, self.decoder, self._room = source, decoder, cache_bytes
        self._cache: dict[int, list[Sample | Broken]] = {}

    def items(self, shard: int, start: int, end: int) -> Iterator[Item]:
        """Samples start .. end of a shard; those that the shard turns out not to hold are Broken."""
        if shard in self._cache or self._room > 0:
            yield from self._cached(shard)[start:end]
        else:
            yield from islice(self._read(shard, start), end - start)

    def resolve(self, item: Item) -> Sample | Broken:
        """Decode what is not decoded yet."""
        if isinstance(item, (Sample, Broken)):
            return item
        raw, shard, index = item
        return self.decoder(raw, shard, index, self.source.labels[shard])

    def _read(self, shard: int, start: int) -> Iterator[Item]:
        url, size = self.source.shards[shard], self.source.sizes[shard]
        index, damage = start, f"the shard ends before sample {start + 1} of {size}"
        for raw in islice(read_samples(url, start), size - start):
            yield raw, shard, index
            index += 1
            damage = raw.damage or f"the shard ends after {index} of {size} samples"
        for missing in range(index, size):
            yield Broken(f"{self.source.labels[shard]}/{missing}", shard, missing, damage)

    def _cached(self, shard: int) -> list[Sample | Broken]:
        if shard not in self._cache:
            decoded = [self.resolve(item) for item in self._read(shard, 0)]
            images = [sample.image for sample in decoded if isinstance(sample, Sample) and sample.image is not None]
            used = sum(image.width * image.height * 4 for image in images)  # PIL keeps RGB in 4 bytes a pixel
            if used > self._room:
                self._room = 0
                return decoded
            self._room -= used
            self._cache[shard] = decoded
        return self._cache[shard]


def emit(
    plan: StreamPlan, store: SampleStore, budget: SkipBudget, stream: int, position: int
) -> Iterator[tuple[int, Sample]]:
    """(position, sample) of a stream from `position` on, for ever.

    A broken sample gives way to the next good one of its window's order (to the one before it, if none follows).
    While a window is emitted the next one is read, sample by sample, so that reading is spread evenly over steps.
    """
    number, start, length = plan.window_at(position)
    items = _items(plan, store, stream, number, start)
    window: list[Item | None] = list(islice(items, length))
    base = number * plan.per_pass + start
    first = position - base
    while True:
        order = plan.window_order(stream, number, start, length)
        number, start, next_length = plan.window_at(base + length)
        ahead: list[Item | None] = []
        good: Sample | None = None  # the last place of this window that was good itself
        for place in range(first, length):
            if len(ahead) < next_length:
                ahead.append(next(items))
            item = window[order[place]]
            assert item is not None
            sample = store.resolve(item)
            if isinstance(sample, Broken):
                budget.note(sample)
                yield base + place, _substitute(store, budget, [window[at] for at in order], place, good)
            else:
                good = sample
                yield base + place, sample
            window[order[place]] = None  # free it: the next window grows as this one shrinks
        ahead += islice(items, next_length - len(ahead))
        base, window, length, first = base + length, ahead, next_length, 0


def _substitute(
    store: SampleStore, budget: SkipBudget, ordered: list[Item | None], place: int, good: Sample | None
) -> Sample:
    before = reversed(ordered[:place]) if good is None else iter([good])
    for item in (*ordered[place + 1 :], *before):
        if item is None:
            continue
        sample = store.resolve(item)
        if isinstance(sample, Sample):
            return sample
        budget.note(sample)
    raise UserError(f"data {store.source.name!r}: a whole shuffle window holds no usable sample; mend the shards")


def _items(plan: StreamPlan, store: SampleStore, stream: int, number: int, offset: int) -> Iterator[Item]:
    """The samples of a stream in reading order, from `offset` within pass `number` on, for ever."""
    while True:
        for shard, start, end in plan.segments(stream, number):
            skip = min(offset, end - start)
            offset -= skip
            if start + skip < end:
                yield from store.items(shard, start + skip, end)
        number, offset = number + 1, 0
