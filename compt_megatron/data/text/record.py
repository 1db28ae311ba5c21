"""`text.json`: what a folder of text data says of itself: its tokenizer, its splits and their sizes."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compt_megatron.errors import UserError
from compt_megatron.recipe.files import read_json

FILE = "text.json"
_VERSION = 1


@dataclass(frozen=True)
class SplitRecord:
    """A split's documents, tokens (those that end documents included) and bytes of UTF-8 text."""

    documents: int
    tokens: int
    bytes: int


@dataclass(frozen=True)
class TextRecord:
    """What is recorded beside the data. `tokenizer`: the file's name in the folder; `sha256`: its hash; `eod`: the id
    that ends a document (None: the tokenizer has none), which every document ends with if `append_eod`."""

    tokenizer: str
    sha256: str
    vocab_size: int
    eod: int | None
    append_eod: bool
    splits: dict[str, SplitRecord]


def write_record(folder: Path, record: TextRecord) -> None:
    """Write a folder's `text.json`."""
    text = json.dumps({"format_version": _VERSION, **asdict(record)}, indent=1)
    (folder / FILE).write_text(text + "\n", encoding="utf-8")


def read_record(folder: Path) -> TextRecord | None:
    """A folder's record; None where it has none. Raises UserError for one of another version or shape."""
    path = folder / FILE
    if not path.is_file():
        return None
    value: dict[str, Any] = read_json(path)
    version = value.pop("format_version", None)
    if version != _VERSION:
        raise UserError(f"{path}: format version {version!r}; version {_VERSION} is the one that can be read")
    try:
        splits = {name: SplitRecord(**split) for name, split in value.pop("splits").items()}
        record = TextRecord(**value, splits=splits)
        for count in (record.vocab_size, *(size for split in splits.values() for size in asdict(split).values())):
            if isinstance(count, bool) or not isinstance(count, int):
                raise TypeError(f"{count!r} is not a whole number")
        return record
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: is not what `compt data text` writes ({error}); build the data again") from error
