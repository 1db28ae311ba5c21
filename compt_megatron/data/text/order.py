"""The order in which one pass meets the documents of a data set, and where its tokens then lie.

The documents are permuted and laid end to end. The permutation is computed, not stored (shuffle.py); what is stored is
how many tokens lie before every 64th document: 8 bytes for 64 documents, made in slices. These marks are kept in a
file for each pass, which is mapped into memory, so that ranks and workers share them.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from compt_megatron.data.seeds import Use
from compt_megatron.data.text.indexed import Array, IndexedTokens
from compt_megatron.data.text.shuffle import shuffled

_STRIDE = 64  # documents from mark to mark
_SLICE = _STRIDE << 14  # documents whose lengths are in memory at a time
_FORMAT = 1


@dataclass(frozen=True)
class Documents:
    """Documents `first` to `end` of an indexed dataset."""

    data: IndexedTokens
    first: int
    end: int

    def __len__(self) -> int:
        return self.end - self.first

    @property
    def tokens(self) -> int:
        low, high = self.data.bounds(np.array([self.first, self.end - 1]))
        return int(high[1] - low[0])

    def bounds(self, documents: Array) -> tuple[Array, Array]:
        """Where documents, counted from `first`, begin and end in the ids of the dataset."""
        return self.data.bounds(documents + self.first)


class Pass:
    """Pass `number` over the documents, in the order that `seed` gives it; with `seed` None in their own order."""

    def __init__(self, documents: Documents, seed: int | None, number: int, cache_dir: Path | None = None) -> None:
        self.documents, self.seed, self.number = documents, seed, number
        self._marks = self._kept(cache_dir) if cache_dir is not None else self._made()

    def read(self, start: int, count: int) -> tuple[Array, Array]:
        """`count` tokens of the pass from its token `start` on: ids [count] int64, and whether each is the first of its
        document [count] bool."""
        ids, firsts = np.empty(count, np.int64), np.zeros(count, np.bool_)
        filled = 0
        for low, high, begins in self._runs(start):
            taken = min(high - low, count - filled)
            if taken > 0:
                ids[filled : filled + taken] = self.documents.data.ids[low : low + taken]
                firsts[filled] = begins
                filled += taken
            if filled == count:
                return ids, firsts
        raise IndexError(f"{count} tokens from {start} on: the pass has {int(self._marks[-1])}")

    def _runs(self, start: int) -> Iterator[tuple[int, int, bool]]:
        """Where documents lie in the ids, from token `start` of the pass on: (begin, end, whether it is whole) each."""
        group = int(np.searchsorted(self._marks, start, side="right")) - 1
        skip = start - int(self._marks[group])
        for place in range(group * _STRIDE, len(self.documents), _STRIDE):
            lows, highs = self._bounds(place, min(place + _STRIDE, len(self.documents)))
            for low, high in zip(lows.tolist(), highs.tolist()):
                if skip < high - low:
                    yield low + skip, high, skip == 0
                skip = max(0, skip - (high - low))

    def _bounds(self, place: int, end: int) -> tuple[Array, Array]:
        """Begins and ends, in the dataset's ids, of the documents at places `place` to `end` of the pass."""
        places = np.arange(place, end)
        if self.seed is not None:
            places = shuffled(places, len(self.documents), self.seed, Use.DOCUMENTS, self.number)
        return self.documents.bounds(places)

    def _made(self) -> Array:
        """Tokens before documents 0, 64, 128 ..., and all at the end."""
        count = len(self.documents)
        marks = np.zeros(-(-count // _STRIDE) + 1, np.int64)
        for place in range(0, count, _SLICE):
            lows, highs = self._bounds(place, min(place + _SLICE, count))
            groups = np.add.reduceat(highs - lows, np.arange(0, len(lows), _STRIDE))
            at = place // _STRIDE
            marks[at + 1 : at + 1 + len(groups)] = marks[at] + np.cumsum(groups)
        return marks

    def _kept(self, cache_dir: Path) -> Array:
        """The marks from the cache; made and put there if they are not there."""
        documents = self.documents
        request = (_FORMAT, documents.data.fingerprint, documents.first, documents.end, self.seed, self.number)
        path = cache_dir / f"order-{xxhash.xxh3_128_hexdigest(repr(request).encode())}.npy"
        if (marks := self._loaded(path)) is None:
            cache_dir.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
            with open(partial, "wb") as file:
                np.save(file, self._made())
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
            marks = self._loaded(path)
        assert marks is not None
        return marks

    def _loaded(self, path: Path) -> Array | None:
        try:
            marks: np.ndarray[Any, np.dtype[Any]] = np.load(path, mmap_mode="r")
        except (OSError, ValueError, EOFError):
            return None
        whole = marks.shape == (-(-len(self.documents) // _STRIDE) + 1,) and marks[-1] == self.documents.tokens
        return marks if whole else None
