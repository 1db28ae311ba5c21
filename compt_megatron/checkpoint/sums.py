"""Checksums of files: xxh3 (64 bits) of every 16 MiB of a file, written one after the other in hex.

A file of at most 16 MiB has one, that of its bytes. Pieces can be summed by the process that writes them and checked by
several at once; which process wrote what does not show in the result.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xxhash

PIECE = 16 * 2**20  # bytes of a file that have a sum of their own; part of the format of compt.json
_BLOCK = 2 * 2**20  # bytes read and hashed at a time
_DIGITS = 16  # of one sum


def pieces(size: int) -> int:
    """How many sums a file of `size` bytes has."""
    return max(1, -(-size // PIECE))


def split_sums(text: str) -> list[str]:
    """The sums of a file, piece by piece."""
    return [text[at : at + _DIGITS] for at in range(0, len(text), _DIGITS)]


def file_hash(path: Path) -> str:
    """The checksum of a file as compt.json has it, read in blocks."""
    return "".join(piece_sums(path, 0, pieces(path.stat().st_size)))


def piece_sums(path: Path, first: int, last: int) -> Iterator[str]:
    """The sums of pieces [first, last) of a file."""
    with open(path, "rb", buffering=0) as file:
        for piece in range(first, last):
            yield span_hash(file.fileno(), piece * PIECE, (piece + 1) * PIECE)


def span_hash(descriptor: int, start: int, stop: int) -> str:
    """xxh3 (64 bits, hex) of bytes [start, stop) of an open file, or of fewer where it ends before."""
    digest = xxhash.xxh3_64()
    buffer = memoryview(bytearray(min(_BLOCK, max(stop - start, 1))))
    while start < stop and (count := os.preadv(descriptor, [buffer[: stop - start]], start)):
        digest.update(buffer[:count])
        start += count
    return digest.hexdigest()


def whole_hash(path: Path) -> str:
    """xxh3 (64 bits, hex) of a whole file: its checksum in format version 1."""
    with open(path, "rb", buffering=0) as file:
        return span_hash(file.fileno(), 0, path.stat().st_size)


class Sums:
    """The sums of a file while it is written. Bytes of a piece that come in order are not read again."""

    def __init__(self) -> None:
        self._running: dict[int, tuple[Any, int]] = {}  # piece -> its hash so far, bytes hashed
        self._spoilt: set[int] = set()
        self.done: dict[int, str] = {}

    def update(self, start: int, data: memoryview) -> None:
        """Note that bytes [start, start + len(data)) were written."""
        at = 0
        while at < len(data):
            piece, inside = divmod(start + at, PIECE)
            part = data[at : at + PIECE - inside]
            self._add(piece, inside, part)
            at += len(part)

    def _add(self, piece: int, inside: int, part: memoryview) -> None:
        running, hashed = self._running.get(piece) or (xxhash.xxh3_64(), 0)
        if piece in self._spoilt or piece in self.done or inside != hashed:
            self._spoilt.add(piece)
            self._running.pop(piece, None)
            self.done.pop(piece, None)
            return
        running.update(part)
        if hashed + len(part) == PIECE:
            self._running.pop(piece, None)
            self.done[piece] = running.hexdigest()
        else:
            self._running[piece] = running, hashed + len(part)

    def found(self, size: int) -> dict[int, str]:
        """The sums of the pieces that were hashed whole, of a file that has `size` bytes."""
        last, rest = divmod(size, PIECE)
        running, hashed = self._running.get(last, (None, 0))
        return {**self.done, last: running.hexdigest()} if running is not None and hashed == rest else dict(self.done)


def joined(path: Path, size: int, known: dict[int, str]) -> str:
    """The checksum of a file from the sums that are known; the other pieces are read."""
    return "".join(
        known[piece] if piece in known else next(piece_sums(path, piece, piece + 1)) for piece in range(pieces(size))
    )
