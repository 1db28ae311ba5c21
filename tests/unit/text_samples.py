"""Small texts and indexed datasets for the tests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from compt_megatron.data.text.indexed import IndexedTokens, IndexedWriter, id_dtype
from compt_megatron.data.text.order import Documents


def texts(count: int, seed: int = 0) -> list[str]:
    """Different texts of a few words each."""
    random = np.random.default_rng(seed)
    words = ["chain", "of", "models", "größer", "日本", "grow", "token", "\n", "x = 1"]
    return [f"{index} " + " ".join(random.choice(words, random.integers(1, 30))) for index in range(count)]


def write_jsonl(path: Path, rows: Sequence[str], field: str = "text") -> Path:
    path.write_text("".join(json.dumps({field: row}) + "\n" for row in rows), encoding="utf-8")
    return path


def numbered(prefix: Path, lengths: Sequence[int], vocab_size: int = 60_000) -> Documents:
    """A dataset whose ids count up from 0, in documents of these lengths."""
    with IndexedWriter(prefix, id_dtype(vocab_size)) as writer:
        first = 0
        for length in lengths:
            writer.add_sequence(np.arange(first, first + length) % vocab_size)
            writer.end_document()
            first += length
    data = IndexedTokens(prefix)
    return Documents(data, 0, len(data))
