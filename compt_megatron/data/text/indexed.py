"""Megatron's indexed datasets: `PREFIX.bin` holds token ids end to end, `PREFIX.idx` says where sequences and documents
begin (format MMIDIDX, version 1, as megatron-core's indexed_dataset.py reads and writes it).

The index is, little-endian and without padding: 9 bytes magic, version (u64), dtype code (u8), number S of sequences
(u64), number D + 1 of document bounds (u64), S lengths in tokens (i32), S byte offsets into the .bin (i64), D + 1
numbers of the sequence with which a document begins, and S at the end (i64). Multimodal sets have S modes (i8) more.
"""

from __future__ import annotations

import os
import struct
from array import array
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import xxhash

from compt_megatron.checkpoint.commit import fsync_folder, partial_path
from compt_megatron.errors import UserError

Array = np.ndarray[Any, np.dtype[Any]]

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
_CODES = {np.dtype(name): code for code, name in _DTYPES.items()}
_SLICE = 1 << 20  # sequences, documents or ids that are checked or written at a time
_LARGEST_UINT16_VOCABULARY = 65_500


def id_dtype(vocab_size: int) -> np.dtype[Any]:
    """The dtype in which Megatron stores ids of a vocabulary: uint16 below 65,500 tokens, int32 above."""
    return np.dtype("<u2" if vocab_size < _LARGEST_UINT16_VOCABULARY else "<i4")


def prefix_of(path: Path) -> Path:
    """The prefix of a data set that is named by it, by its .bin or by its .idx."""
    return path.with_suffix("") if path.suffix in (".bin", ".idx") else path


class IndexedTokens:
    """An indexed dataset, mapped into memory: nothing is copied, and nothing read that is not asked for.

    `ids` [T]: all tokens; `lengths` [S] int32, `pointers` [S] int64 (bytes): the sequences; `documents` [D + 1] int64:
    the sequences with which documents begin, then S; `modes` [S] int8 or None. The files are checked against each other
    (not the ids: `check_ids`). Raises UserError for files that are missing, damaged, cut off, or of another version.
    """

    def __init__(self, prefix: Path | str, checked: bool = False) -> None:
        self.prefix = prefix_of(Path(prefix))
        self.idx, self.bin = (self.prefix.with_name(self.prefix.name + suffix) for suffix in (".idx", ".bin"))
        for path in (self.idx, self.bin):
            if not path.is_file():
                raise UserError(f"{path}: does not exist; an indexed data set is a .bin and an .idx file of one name")
        self.dtype, sequences, bounds = self._header()
        whole = np.memmap(self.idx, mode="r")
        self.lengths, self.pointers, self.documents, modes = _fields(np.asarray(whole), sequences, bounds)
        self.modes = modes if len(modes) else None
        if not checked:
            self._check()
        self.ids: Array = np.asarray(np.memmap(self.bin, dtype=self.dtype, mode="r"))
        self._fingerprint = ""

    def __reduce__(self) -> Any:
        return IndexedTokens, (self.prefix, True), {"_fingerprint": self.fingerprint}

    def __len__(self) -> int:
        """Number of documents."""
        return len(self.documents) - 1

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return len(self.ids)

    def bounds(self, documents: Array) -> tuple[Array, Array]:
        """Where documents begin and end in `ids`: two int64 arrays of the shape of `documents`."""
        return self._token_of(self.documents[documents]), self._token_of(self.documents[documents + 1])

    def document(self, index: int) -> Array:
        """The ids of one document, a view of the file."""
        start, end = (int(value) for value in self.bounds(np.asarray(index)))
        return self.ids[start:end]

    def check_ids(self, vocab_size: int) -> None:
        """Read all ids. Raises UserError naming the first document with an id beyond the vocabulary."""
        if self.dtype.kind == "u" and np.iinfo(self.dtype).max < vocab_size:
            return
        for start in range(0, self.tokens, _SLICE):
            part = self.ids[start : start + _SLICE]
            wrong = np.flatnonzero((part >= vocab_size) | (part < 0))
            if len(wrong):
                place = start + int(wrong[0])
                sequence = int(np.searchsorted(self.pointers, place * self.dtype.itemsize, side="right")) - 1
                document = int(np.searchsorted(self.documents, sequence, side="right")) - 1
                found = int(part[wrong[0]])
                raise UserError(
                    f"{self.bin}: document {document} has id {found}, beyond a vocabulary of {vocab_size} tokens; "
                    "build the data with the model's tokenizer"
                )

    @property
    def fingerprint(self) -> str:
        """A hash of the index file: which documents there are and how long they are."""
        if not self._fingerprint:
            digest = xxhash.xxh3_128()
            with open(self.idx, "rb") as file:
                while block := file.read(1 << 24):
                    digest.update(block)
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def _header(self) -> tuple[np.dtype[Any], int, int]:
        """dtype, sequences and document bounds, if the size of the index is what they make it."""
        with open(self.idx, "rb") as file:
            head = file.read(_HEADER.size)
        if not head.startswith(_MAGIC):
            raise UserError(f"{self.idx}: not a Megatron index (MMIDIDX); build the data with `compt data text`")
        if len(head) < _HEADER.size:
            raise UserError(f"{self.idx}: is cut off after {len(head)} bytes; copy or build it again")
        _, version, code, sequences, bounds = _HEADER.unpack(head)
        if version != _VERSION:
            raise UserError(f"{self.idx}: is of version {version}; version {_VERSION} is the one that can be read")
        if code not in _DTYPES:
            raise UserError(f"{self.idx}: unknown dtype code {code}; 1 to 8 are known")
        dtype = np.dtype(_DTYPES[code])
        if dtype.kind == "f":
            raise UserError(f"{self.idx}: holds {dtype.name} numbers, not token ids")
        size, expected = self.idx.stat().st_size, _HEADER.size + 12 * sequences + 8 * bounds
        if size not in (expected, expected + sequences):
            states = f"{sequences} sequences and {bounds} document bounds make it {expected}"
            raise UserError(f"{self.idx}: has {size} bytes, but its {states}; copy or build it again")
        return dtype, sequences, bounds

    def _check(self) -> None:
        """Lengths, offsets and documents agree with one another and with the size of the .bin."""
        total, width = 0, self.dtype.itemsize
        for start in range(0, len(self.lengths), _SLICE):
            lengths = self.lengths[start : start + _SLICE].astype(np.int64)
            ends = total + np.cumsum(lengths)
            if (lengths < 0).any() or (self.pointers[start : start + _SLICE] != (ends - lengths) * width).any():
                raise UserError(f"{self.idx}: its lengths and offsets contradict each other; build it again")
            total = int(ends[-1])
        size = self.bin.stat().st_size
        if size != total * width:
            what = "is cut off" if size < total * width else "belongs to another index"
            raise UserError(f"{self.bin}: {what}: {size} bytes, the index says {total * width}; copy or build it again")
        ordered = all(
            (np.diff(self.documents[start : start + _SLICE + 1]) >= 0).all()
            for start in range(0, len(self.documents), _SLICE)
        )
        if not len(self.documents) or self.documents[0] or self.documents[-1] != len(self.lengths) or not ordered:
            raise UserError(f"{self.idx}: its documents are not the sequences 0 to {len(self.lengths)}; build it again")
        if not total:
            raise UserError(f"{self.prefix}: holds no tokens; build it from text that is not empty")

    def _token_of(self, sequences: Array) -> Array:
        """The token with which a sequence begins; the number of tokens for the end of the last one."""
        beyond = sequences >= len(self.pointers)
        pointers = self.pointers[np.where(beyond, 0, sequences)]
        return np.where(beyond, len(self.ids), pointers // self.dtype.itemsize)


class IndexedWriter:
    """Writes an indexed dataset: beside the final names first, made durable, then renamed, the index last.

    Used as a context: leaving it commits, an exception discards. Raises UserError if the files exist already.
    """

    def __init__(self, prefix: Path, dtype: np.dtype[Any]) -> None:
        self.idx, self.bin = (prefix.with_name(prefix.name + suffix) for suffix in (".idx", ".bin"))
        for path in (self.idx, self.bin):
            if path.exists():
                raise UserError(f"{path}: exists already; choose another name or delete it")
        self.dtype = np.dtype(dtype)
        self.tokens = 0
        self._code = _CODES[self.dtype]
        self._lengths, self._documents = array("i"), array("q", [0])
        self._file = open(partial_path(self.bin), "wb")  # noqa: SIM115 - closed by commit and discard

    def add_sequence(self, ids: Array) -> None:
        """Append a sequence to the document at hand. Raises UserError for ids that the dtype does not hold."""
        ids, limits = np.asarray(ids), np.iinfo(self.dtype)
        if ids.size and not limits.min <= int(ids.min()) <= int(ids.max()) <= limits.max:
            raise UserError(f"{self.bin}: ids from {ids.min()} to {ids.max()} do not fit {self.dtype.name}")
        self._file.write(ids.astype(self.dtype).tobytes())
        self._lengths.append(ids.size)
        self.tokens += ids.size

    def end_document(self) -> None:
        """What comes next is another document."""
        self._documents.append(len(self._lengths))

    def add_documents(self, ids: bytes, lengths: Array) -> None:
        """Append documents of one sequence each: their ids end to end, as bytes of the dtype, and their lengths."""
        count = int(lengths.sum())
        assert len(ids) == count * self.dtype.itemsize
        self._file.write(ids)
        first = len(self._lengths) + 1
        self._lengths.frombytes(lengths.astype(np.int32).tobytes())
        self._documents.extend(range(first, len(self._lengths) + 1))
        self.tokens += count

    def commit(self) -> None:
        """Make the data set durable and give the files their names."""
        _close_durably(self._file)
        with open(partial_path(self.idx), "wb") as file:
            lengths = np.frombuffer(self._lengths, np.int32) if self._lengths else np.zeros(0, np.int32)
            file.write(_HEADER.pack(_MAGIC, _VERSION, self._code, len(lengths), len(self._documents)))
            for block in self._index(lengths):
                file.write(block.tobytes())
            _close_durably(file)
        os.replace(partial_path(self.bin), self.bin)
        os.replace(partial_path(self.idx), self.idx)
        fsync_folder(self.bin.parent)

    def discard(self) -> None:
        """Remove what was written."""
        self._file.close()
        for path in (self.bin, self.idx):
            partial_path(path).unlink(missing_ok=True)

    def _index(self, lengths: Array) -> Iterator[Array]:
        yield lengths.astype("<i4", copy=False)
        total = 0
        for start in range(0, len(lengths), _SLICE):
            part = lengths[start : start + _SLICE].astype(np.int64)
            ends = total + np.cumsum(part)
            yield ((ends - part) * self.dtype.itemsize).astype("<i8", copy=False)
            total = int(ends[-1])
        yield np.frombuffer(self._documents, np.int64).astype("<i8", copy=False)

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.commit()
        else:
            self.discard()


def _fields(whole: Array, sequences: int, bounds: int) -> tuple[Array, Array, Array, Array]:
    """Views of lengths, pointers, document bounds and modes (none: empty) in a mapped index."""
    places = np.cumsum([_HEADER.size, 4 * sequences, 8 * sequences, 8 * bounds])
    lengths, pointers, documents, modes = np.split(whole, places.tolist())[1:]
    return lengths.view("<i4"), pointers.view("<i8"), documents.view("<i8"), modes.view("i1")


def _close_durably(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()
