"""The documents of a corpus: .txt and .jsonl files, plain or compressed, read one after another as raw bytes."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from compt_megatron.errors import UserError

_KINDS = (".txt", ".jsonl")
_COMPRESSED = (".gz", ".zst")
SUFFIXES = tuple(kind + compression for kind in _KINDS for compression in ("", *_COMPRESSED))
_BLOCK = 1 << 20


@dataclass(frozen=True)
class TextFile:
    """One file of a corpus. `name` is its path as the user would write it; `key` the one inside the folder that was
    named (the file's own name if it was named itself), by which files are split: the same wherever the corpus lies."""

    path: Path
    name: str
    key: str

    @property
    def is_json(self) -> bool:
        return ".jsonl" in self.path.suffixes[-2:]


@dataclass(frozen=True)
class RawDocument:
    """A document as stored: a line of JSON, or plain text. `line` counts from 1; 0 where the document is the file."""

    file: str
    key: str
    line: int
    data: bytes
    is_json: bool

    @property
    def where(self) -> str:
        return f"{self.file}: line {self.line}" if self.line else self.file

    def text(self, field: str) -> str:
        """The text. Raises UserError, naming file and line, for broken UTF-8 or JSON and for a missing field."""
        try:
            value: Any = self.data.decode("utf-8-sig" if self.line <= 1 else "utf-8")  # a file may begin with a mark
        except UnicodeDecodeError as error:
            raise UserError(f"{self.where}: byte {error.start} is not UTF-8; convert or remove it") from error
        if not self.is_json:
            return str(value)
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.where}: not JSON ({error}); correct or remove the line") from error
        if not isinstance(value, dict) or not isinstance(value.get(field), str):
            found = f"has {', '.join(map(repr, list(value)[:5]))}" if isinstance(value, dict) else "is no JSON object"
            raise UserError(f"{self.where}: {field!r} is not there as text, the line {found}; set --field")
        text: str = value[field]
        if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
            raise UserError(f"{self.where}: {field!r} holds half a surrogate pair; correct or remove the line")
        return text


def find_files(sources: Sequence[str | Path]) -> list[TextFile]:
    """The text files that are named or lie in the named folders, those of a folder by path.

    Raises UserError for a source that does not exist, is of another kind, or is a folder without text files.
    """
    files: list[TextFile] = []
    for source in map(Path, sources):
        if source.is_dir():
            inside = sorted(path for path in source.rglob("*") if path.name.endswith(SUFFIXES) and path.is_file())
            if not inside:
                raise UserError(f"{source}: the folder holds no {', '.join(SUFFIXES)} files")
            files += [TextFile(path, str(path), path.relative_to(source).as_posix()) for path in inside]
        elif not source.exists():
            raise UserError(f"{source}: does not exist; correct the path")
        elif not source.name.endswith(SUFFIXES):
            raise UserError(f"{source}: is not one of {', '.join(SUFFIXES)}")
        else:
            files.append(TextFile(source, str(source), source.name))
    return files


class Reader:
    """The documents of files, in order, undecoded. `lines`: every line of a .txt file is a document, else the file is.

    Empty documents are left out. While iterating, `done` is how many bytes have been read as stored, of `total`.
    Raises UserError for a file that cannot be read to its end.
    """

    def __init__(self, files: Sequence[TextFile], lines: bool = False) -> None:
        self.files, self.lines, self.done = files, lines, 0
        self.total = sum(file.path.stat().st_size for file in files)

    def __iter__(self) -> Iterator[RawDocument]:
        before = self.done = 0
        for file in self.files:
            try:
                with open(file.path, "rb") as raw:
                    for number, data in self._parts(file, _decompressed(file, raw)):
                        self.done = before + raw.tell()
                        if data.strip():
                            yield RawDocument(file.name, file.key, number, data, file.is_json)
                    before += raw.tell()
            except (OSError, EOFError, zlib.error, _zstd_error()) as error:
                raise UserError(f"{file.name}: cannot be read to its end ({error}); replace the file") from error

    def _parts(self, file: TextFile, content: BinaryIO | io.BufferedIOBase) -> Iterator[tuple[int, bytes]]:
        if file.is_json or self.lines:
            for number, line in enumerate(content, 1):
                yield number, line.rstrip(b"\r\n")
        else:
            yield 0, content.read()


def _decompressed(file: TextFile, raw: BinaryIO) -> BinaryIO | io.BufferedIOBase:
    if file.path.suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if file.path.suffix == ".zst":
        return io.BufferedReader(_ZstdFile(raw), _BLOCK)
    return raw


class _ZstdFile(io.RawIOBase):
    """Frames of zstd, decompressed. Unlike zstandard's own reader it does not take a cut-off file for a whole one."""

    def __init__(self, raw: BinaryIO) -> None:
        import zstandard

        self._raw, self._new_frame = raw, zstandard.ZstdDecompressor().decompressobj
        self._frame: Any = None
        self._compressed = self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            self._compressed = self._compressed or self._raw.read(_BLOCK)
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError("the last zstd frame is cut off")
                return 0
            self._frame = self._frame or self._new_frame()
            self._ready, self._compressed = self._frame.decompress(self._compressed), b""
            if self._frame.eof:
                self._compressed, self._frame = self._frame.unused_data, None
        part, self._ready = self._ready[: len(buffer)], self._ready[len(buffer) :]
        buffer[: len(part)] = part
        return len(part)


def _zstd_error() -> type[Exception]:
    try:
        from zstandard import ZstdError
    except ModuleNotFoundError:
        return EOFError
    return ZstdError
