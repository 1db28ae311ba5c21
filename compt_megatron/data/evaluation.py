"""Held-out data for zero-shot classification and retrieval, shared out over the ranks.

Every rank reads the captions and class names of the whole set, and the images of its own rows only. All ranks get the
same number of batches of the same sizes (padded at the end), so that models whose forward pass is collective (ZeRO-3)
can be evaluated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from compt_megatron.data.samples import Broken, Decoder, Sample
from compt_megatron.data.source import ShardSource
from compt_megatron.data.stream import SkipBudget
from compt_megatron.data.tar_reader import RawSample, read_samples
from compt_megatron.errors import UserError

KEPT_BYTES = 512 << 20  # images of this rank's rows are kept as tensors up to this size


@dataclass
class EvalBatch:
    """Some rows of an evaluation set. A row of -1 is padding or a broken image: its features count for nothing."""

    rows: torch.Tensor  # [b] int64, global row numbers
    images: torch.Tensor  # [b, 3, H, W] float32


class EvalSet:
    """One held-out data set.

    `name` is what results are filed under. `rows` counts the samples of the whole set, `labels` [rows] int64 are their
    classes (-1: none), `class_names` the classes' names or None where the data has none, `captions` every sample's.
    Class names are those of the source (a `classes` file, or the built-in set's), else the sorted json `name`s.
    `rank` and `world` are the data-parallel ones.

    Raises UserError for more broken samples than `skip_budget` allows.
    """

    def __init__(
        self,
        source: ShardSource,
        *,
        transform: Callable[..., torch.Tensor],
        name: str | None = None,
        caption_keys: Sequence[str] | None = None,
        caption_member: str | None = None,
        skip_budget: float = 0.001,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        keep_bytes: int = KEPT_BYTES,
    ) -> None:
        self.source, self.transform, self.rank, self.world = source, transform, rank, world
        self.name = name or source.name
        self._workers, self._keep_bytes = workers, keep_bytes
        self._budget = SkipBudget(source, skip_budget)
        self._decoder = Decoder("image", caption_keys, source.classes, caption_member)
        self._kept: dict[int, list[EvalBatch]] = {}
        self.blank = torch.zeros_like(transform(Image.new("RGB", (32, 32))))
        facts = self._facts()
        if not facts:
            raise UserError(f"data {self.name!r}: holds no sample; name other shards")
        self.rows = len(facts)
        self.captions: list[tuple[str, ...]] = [fact.captions if fact else () for fact in facts]
        self.class_names = source.classes
        if self.class_names is None:
            self.class_names = sorted({fact.name for fact in facts if fact and fact.name is not None}) or None
        classes = {class_name: index for index, class_name in enumerate(self.class_names or [])}
        self.labels = torch.full((self.rows,), -1, dtype=torch.long)
        for row, fact in enumerate(facts):
            if fact is not None:
                by_name = classes.get(fact.name) if fact.name is not None else None
                label = by_name if by_name is not None else fact.label
                self.labels[row] = -1 if label is None else label
        if self.class_names is not None and int(self.labels.max()) >= len(self.class_names):
            raise UserError(
                f"data {self.name!r}: label {int(self.labels.max())} of {len(self.class_names)} class names"
            )

    def _facts(self) -> list[Sample | None]:
        """Everything but the pixels of every sample, None for broken ones."""
        facts: list[Sample | None] = []
        for shard in range(len(self.source.shards)):
            for index, raw in self._read(shard, 0, self.source.sizes[shard], pixels=False):
                decoded = self._decoder(raw, shard, index, self.source.labels[shard], image=False)
                facts.append(self._usable(decoded))
        return facts

    def _usable(self, decoded: Sample | Broken) -> Sample | None:
        if isinstance(decoded, Broken):
            self._budget.note(decoded)
            return None
        return decoded

    def _read(self, shard: int, start: int, end: int, pixels: bool = True) -> Iterator[tuple[int, RawSample]]:
        """Samples start .. end of a shard, those that are missing as damaged ones."""
        index, damage = start, None
        for raw in read_samples(self.source.shards[shard], start, images=pixels):
            if index == end:
                return
            yield index, raw
            index, damage = index + 1, raw.damage
        size = self.source.sizes[shard]
        for missing in range(index, end):
            yield missing, RawSample(str(missing), damage=damage or f"the shard ends after {index} of {size} samples")

    @property
    def rows_per_rank(self) -> int:
        """Rows of every rank, the last ones' padded to the same number."""
        return -(-self.rows // self.world)

    def batches(self, batch_size: int) -> Iterator[EvalBatch]:
        """This rank's rows with their images, in batches of at most `batch_size`; as many on every rank."""
        if batch_size in self._kept:
            yield from self._kept[batch_size]
            return
        dataset = _Rows(self, batch_size)
        loader = DataLoader(dataset, batch_size=None, num_workers=self._workers, generator=torch.Generator())
        kept: list[EvalBatch] | None = []
        used = 0
        for batch in loader:
            if isinstance(batch, str):
                raise UserError(batch)
            used += batch.images.nbytes
            if kept is not None and used <= self._keep_bytes:
                kept.append(batch)
            else:
                kept = None
            yield batch
        if kept is not None:
            self._kept = {batch_size: kept}

    def images(self, first: int, count: int) -> Iterator[tuple[int, torch.Tensor | None]]:
        """(row, image [3, H, W] or None if broken) of the `count` rows from row `first` on, (-1, None) past the end."""
        last = min(first + count, self.rows)
        begin = 0
        for shard, size in enumerate(self.source.sizes):
            start, end = max(first - begin, 0), min(last - begin, size)
            if start < end:
                for index, raw in self._read(shard, start, end):
                    decoded = self._decoder(raw, shard, index, self.source.labels[shard])
                    sample = self._usable(decoded)
                    yield begin + index, None if sample is None else self.transform(sample.image)
            begin += size
        for _ in range(count - max(last - first, 0)):
            yield -1, None


class _Rows(IterableDataset):
    """The batches that one worker makes: an equal, contiguous part of the rank's rows."""

    def __init__(self, eval_set: EvalSet, batch_size: int) -> None:
        self.eval_set, self.batch_size = eval_set, batch_size

    def __iter__(self) -> Iterator[EvalBatch | str]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        total = self.eval_set.rows_per_rank
        begin, end = worker * total // workers, (worker + 1) * total // workers
        first = self.eval_set.rank * total + begin
        rows: list[int] = []
        images: list[torch.Tensor] = []
        try:
            for row, image in self.eval_set.images(first, end - begin):
                rows.append(-1 if image is None else row)
                images.append(self.eval_set.blank if image is None else image)
                if len(rows) == self.batch_size:
                    yield EvalBatch(torch.tensor(rows), torch.stack(images))
                    rows, images = [], []
            if rows:
                yield EvalBatch(torch.tensor(rows), torch.stack(images))
        except UserError as error:
            if info is None:
                raise
            yield str(error)
