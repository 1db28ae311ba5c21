"""Which indexed datasets a name in a recipe stands for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compt_megatron.data.text.indexed import IndexedTokens, prefix_of
from compt_megatron.data.text.order import Documents
from compt_megatron.data.text.record import FILE, TextRecord, read_record
from compt_megatron.data.text.stdlib import stdlib_text
from compt_megatron.errors import UserError
from compt_megatron.recipe.files import expanded

BUILT_IN = ("stdlib",)
SCANNED_BYTES = 1 << 30  # data sets are read through for ids beyond the vocabulary up to this size
PADDING = 1 / 20  # by how much of itself a model's vocabulary may exceed its tokenizer's: rows that pad it

Entry = str | Mapping[str, Any]


@dataclass(frozen=True)
class TextPart:
    """An indexed dataset, or a range of its documents, and its share in the blend. `record`: what stands beside it."""

    name: str
    documents: Documents
    weight: float
    record: TextRecord | None = None

    @property
    def bytes(self) -> int | None:
        """Bytes of the text in UTF-8; None where they are not recorded for just these documents."""
        split = self.record.splits.get(self.documents.data.prefix.name) if self.record else None
        return split.bytes if split and split.documents == len(self.documents) else None


@dataclass(frozen=True)
class TextSource:
    """The data sets of a blend. Make one with `TextSource.open`."""

    name: str
    parts: tuple[TextPart, ...]

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return sum(part.documents.tokens for part in self.parts)

    @property
    def bytes(self) -> int | None:
        """Bytes of the text in UTF-8, for bits per byte; None where they are not recorded."""
        sizes = [part.bytes for part in self.parts if part.bytes is not None]
        return sum(sizes) if len(sizes) == len(self.parts) else None

    @property
    def record(self) -> TextRecord | None:
        """What is recorded of the tokenizer that all parts share; None where nothing is."""
        return next((part.record for part in self.parts if part.record), None)

    @property
    def tokenizer(self) -> Path | None:
        """The tokenizer.json beside the data; None where there is none."""
        files = [part.documents.data.prefix.with_name(part.record.tokenizer) for part in self.parts if part.record]
        return next((file for file in files if file.is_file()), None)

    @classmethod
    def open(
        cls,
        spec: Entry | Sequence[Entry],
        *,
        beside: Path | None = None,
        cache_dir: Path | None = None,
        vocab_size: int | None = None,
        tokenizer: Path | str | None = None,
    ) -> TextSource:
        """The text that `spec` names: an entry, or a list of entries that are blended.

        An entry is a folder of `compt data text` (its split `train`), `FOLDER/held_out`, the prefix of any Megatron
        indexed dataset, a folder of such, `stdlib/train` or `stdlib/held_out`; or a mapping with such a `path`, a
        `weight`, and `documents: [from, to]`, fractions of the data set's documents. Without weights each data set is
        drawn in proportion to its tokens. Relative paths are looked for beside `beside`, then in the working directory.

        `vocab_size`, `tokenizer`: of the model; the built-in text is tokenised to fit them, and kept in `cache_dir` (or
        the user's cache folder). Raises UserError for data that does not exist, is damaged, or does not fit together.
        """
        entries = [spec] if isinstance(spec, str | Mapping) else list(spec)
        if not entries:
            raise UserError("text data: no data set is named; name a folder, a prefix, or stdlib/train")
        parts: list[TextPart] = []
        weighted = [isinstance(entry, Mapping) and entry.get("weight") is not None for entry in entries]
        if any(weighted) != all(weighted):
            without = _path(entries[weighted.index(False)])
            raise UserError(f"data {without!r}: has no weight, others have; give one to all of them or to none")
        for entry in entries:
            prefixes = _prefixes(_path(entry), beside, cache_dir, vocab_size, tokenizer)
            parts += _parts(_path(entry), prefixes, dict(entry) if isinstance(entry, Mapping) else {})
        source = cls(", ".join(map(_path, entries)), tuple(parts))
        records = [(part.name, part.record) for part in parts if part.record]
        for name, record in records[1:]:
            first, other = records[0]
            if record.sha256 != other.sha256:
                raise UserError(f"data {name!r} and {first!r} are of different tokenizers; build one of them again")
        return source

    def require_vocabulary(self, vocab_size: int) -> None:
        """Raise UserError unless the data fits a model with `vocab_size` tokens.

        Where a tokenizer is recorded, the model must have its size or up to a twentieth more (rows that pad it). All
        ids of a data set of up to 1 GiB are read; those of a larger one are checked as they are used.
        """
        self.require_size(vocab_size)
        for part in self.parts:
            if part.documents.data.bin.stat().st_size <= SCANNED_BYTES:
                part.documents.data.check_ids(vocab_size)

    def require_targets(self) -> None:
        """Raise UserError unless there is a token to predict."""
        if all(part.documents.tokens < 2 for part in self.parts):
            raise UserError(f"data {self.name!r}: has no token to predict, one alone; name a longer text")

    def require_size(self, vocab_size: int) -> None:
        """The part of `require_vocabulary` that is known without reading ids."""
        for part in self.parts:
            if part.record is None:
                continue
            own = part.record.vocab_size
            if not own <= vocab_size <= own * (1 + PADDING):
                raise UserError(
                    f"data {part.name!r}: its tokenizer has {own} tokens, the model {vocab_size}; "
                    "build the data with the model's tokenizer, or change the model's vocab_size"
                )


def _path(entry: Entry) -> str:
    if isinstance(entry, str):
        return entry
    if unknown := sorted(set(entry) - {"path", "weight", "documents"}):
        raise UserError(f"text data: unknown key {unknown[0]!r}; an entry has path, weight and documents")
    if not isinstance(entry.get("path"), str):
        raise UserError(f"text data: the entry {dict(entry)} has no path")
    return str(entry["path"])


def _prefixes(
    name: str, beside: Path | None, cache_dir: Path | None, vocab_size: int | None, tokenizer: Path | str | None
) -> list[Path]:
    """The data sets of one entry."""
    base, slash, split = name.partition("/")
    if slash and base in BUILT_IN:
        return [stdlib_text(split, vocab_size, tokenizer, cache_dir)]
    given = expanded(name)
    for path in [beside / given, given] if beside is not None else [given]:
        if path.is_dir():
            if (path / FILE).is_file():
                return [path / "train"]
            found = sorted(index.with_suffix("") for index in path.glob("*.idx"))
            if not found:
                raise UserError(f"data {name!r}: the folder {path} holds no .idx file; build it with `compt data text`")
            return found
        prefix = prefix_of(path)
        if any(prefix.with_name(prefix.name + suffix).is_file() for suffix in (".idx", ".bin")):
            return [prefix]
    raise UserError(f"data {name!r}: there is neither such a folder nor {given}.idx; correct the path")


def _parts(name: str, prefixes: Sequence[Path], entry: Mapping[str, Any]) -> list[TextPart]:
    """The parts of one entry, which share its weight by their tokens."""
    low, high = _range(name, entry.get("documents", (0, 1)))
    found = []
    for prefix in prefixes:
        data = IndexedTokens(prefix)
        documents = Documents(data, int(low * len(data)), int(high * len(data)))
        if not len(documents):
            raise UserError(f"data {name!r}: documents {low} to {high} of {len(data)} are none; widen the range")
        found.append((prefix, documents))
    tokens = sum(documents.tokens for _, documents in found)
    weight = entry.get("weight")
    if weight is None:
        weight = tokens
    elif isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
        shown = f"{weight:g}" if isinstance(weight, float) else repr(weight)
        raise UserError(f"data {name!r}: weight {shown} is not a number above 0")
    parts = []
    for prefix, documents in found:
        own = name if len(found) == 1 else f"{name}/{prefix.name}"
        share = weight if len(found) == 1 else weight * documents.tokens / tokens
        parts.append(TextPart(own, documents, share, read_record(prefix.parent)))
    return parts


def _range(name: str, value: Any) -> tuple[float, float]:
    try:
        low, high = value
        if 0 <= low < high <= 1:
            return low, high
    except (TypeError, ValueError):
        pass
    raise UserError(f"data {name!r}: documents {value!r} are not two fractions in order, such as [0, 0.95]")
