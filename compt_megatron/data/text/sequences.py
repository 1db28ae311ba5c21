"""The training samples of text: sequences of one length, cut from shuffled documents that are laid end to end.

Sample k is a function of (data, length, seed, k). A blend says which data set it comes from and which of that set's
own samples it is; a pass over the set permutes its documents, lays them end to end, cuts that line into sequences,
and emits them in a permuted order. So a pass meets each token once as a target, but for the first and the up to
`length` last ones of its line, which are other ones in each pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from compt_megatron.data.seeds import Use
from compt_megatron.data.text.blend import Blend
from compt_megatron.data.text.indexed import Array
from compt_megatron.data.text.order import Documents, Pass
from compt_megatron.data.text.shuffle import shuffled_one
from compt_megatron.errors import UserError

_PASSES_KEPT = 2  # of each data set: neighbouring samples of a batch may lie on both sides of a pass's end


class Row(NamedTuple):
    """A sample: `ids` [length + 1] int64, whether each predicted one counts [length] bool, and the sample's name."""

    ids: Array
    mask: Array
    name: str


class Sequences:
    """The samples of a blend of data sets. Can be sent to worker processes.

    `parts`: name and documents of each data set; `weights`: in which proportions they are drawn; `vocab_size`: ids
    beyond it are refused when they are met. With `mask_document_starts` the prediction of a document's first token
    does not count. `cache_dir` keeps the marks of each pass (order.py). Raises UserError for a set that does not hold
    one sequence, and when an id is beyond the vocabulary.
    """

    def __init__(
        self,
        parts: Sequence[tuple[str, Documents]],
        weights: Sequence[float],
        length: int,
        seed: int = 0,
        *,
        vocab_size: int | None = None,
        mask_document_starts: bool = False,
        cache_dir: Path | None = None,
    ) -> None:
        self.parts, self.length, self.seed = list(parts), length, seed
        self.vocab_size, self.mask_document_starts, self.cache_dir = vocab_size, mask_document_starts, cache_dir
        self.per_pass = [(documents.tokens - 1) // length for _, documents in parts]
        for (name, documents), count in zip(self.parts, self.per_pass):
            if count < 1:
                raise UserError(f"data {name!r}: {documents.tokens} tokens, fewer than one sequence of {length} + 1")
        self.blend = Blend(weights)
        self._passes: dict[tuple[int, int], Pass] = {}

    def __len__(self) -> int:
        """Samples in one pass over every data set."""
        return sum(self.per_pass)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_passes": {}}

    def __getitem__(self, sample: int) -> Row:
        index, own = self.blend(sample)
        name, _ = self.parts[index]
        number, place = divmod(own, self.per_pass[index])
        drawn = shuffled_one(place, self.per_pass[index], self.seed, Use.SEQUENCES, number)
        ids, firsts = self._pass(index, number).read(drawn * self.length, self.length + 1)
        require_ids(ids, self.vocab_size, name)
        mask = ~firsts[1:] if self.mask_document_starts else np.ones(self.length, np.bool_)
        return Row(ids, mask, f"{name}:{number}:{drawn}")

    def _pass(self, index: int, number: int) -> Pass:
        if (index, number) not in self._passes:
            mine = sorted(key for key in self._passes if key[0] == index)
            for key in mine[: max(0, len(mine) + 1 - _PASSES_KEPT)]:
                del self._passes[key]
            self._passes[index, number] = Pass(self.parts[index][1], self.seed, number, self.cache_dir)
        return self._passes[index, number]


def require_ids(ids: np.ndarray, vocab_size: int | None, name: str) -> None:
    """Raise UserError for an id of data set `name` that a vocabulary of `vocab_size` (None: not known) has not."""
    if vocab_size is not None and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        beyond = int(ids.max() if ids.min() >= 0 else ids.min())
        raise UserError(
            f"data {name!r}: id {beyond} is beyond the vocabulary of {vocab_size} tokens; "
            "build the data with the model's tokenizer"
        )
