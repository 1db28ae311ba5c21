"""What an unfinished checkpoint already holds, so that a killed run can be continued.

Every rank has its own journal in `DST.partial/`: a line that says what was asked for, then one line for each time that
data were made durable. A line is written only after the data that it speaks of, and says how to check them: what a
torn line or a changed file would claim is not believed but written again.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from compt_megatron.errors import UserError

_PREFIX = ".journal-"


class Box(NamedTuple):
    """A box of a tensor that was written: its place, and xxh3 (64 bits, hex) of its bytes, if it can be read back."""

    name: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    hash: str


class Entry(NamedTuple):
    """What was made durable at one time; `state` is the format's own (`BoxWriter._sync`)."""

    boxes: list[Box]
    state: Any


class Journal:
    """The journal of one rank, open for writing."""

    def __init__(self, folder: Path, rank: int, request: str, kept: list[Entry]) -> None:
        """Begin it with the entries of an earlier run that are still good."""
        self._descriptor = os.open(_path(folder, rank), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        os.ftruncate(self._descriptor, 0)
        self._write([_line({"request": request}), *(_entry_line(entry) for entry in kept)])

    def add(self, entry: Entry) -> None:
        """Note data that are durable."""
        self._write([_entry_line(entry)])

    def _write(self, lines: list[bytes]) -> None:
        os.write(self._descriptor, b"".join(lines))
        os.fsync(self._descriptor)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def claim(folder: Path) -> int:
    """Lock the journal of rank 0, made if need be; the lock holds until the descriptor returned is closed.

    Raises UserError if another process holds it: that one is writing the checkpoint.
    """
    descriptor = os.open(_path(folder, 0), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise UserError(f"{folder}: another job is writing it; wait for it, or choose another destination") from error
    except OSError:  # a file system without locks
        pass
    return descriptor


def has_journal(folder: Path) -> bool:
    return _path(folder, 0).is_file()


def is_of(folder: Path, request: str | None) -> bool:
    """Whether `folder` holds what an earlier run of the same request left."""
    return request is not None and next(_lines(_path(folder, 0)), {}).get("request") == request


def remove_journals(folder: Path) -> None:
    """Rank 0, before the checkpoint gets its name."""
    for path in folder.glob(f"{_PREFIX}*"):
        path.unlink(missing_ok=True)


def earlier_entries(folder: Path, rank: int, request: str) -> list[Entry]:
    """What a rank noted in an earlier run of the same request."""
    lines = _lines(_path(folder, rank))
    if next(lines, {}).get("request") != request:
        return []
    return [Entry([_box(row) for row in line["boxes"]], line["state"]) for line in lines]


def _path(folder: Path, rank: int) -> Path:
    return folder / f"{_PREFIX}{rank}"


def _box(row: list[Any]) -> Box:
    name, offsets, sizes, digest = row
    return Box(name, tuple(offsets), tuple(sizes), digest)


def _entry_line(entry: Entry) -> bytes:
    return _line({"boxes": entry.boxes, "state": entry.state})


def _line(content: dict[str, Any]) -> bytes:
    text = json.dumps(content, separators=(",", ":")).encode()
    return xxhash.xxh3_64(text).hexdigest().encode() + b" " + text + b"\n"


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a journal, up to the first that is not."""
    if not path.is_file():
        return
    for line in path.read_bytes().split(b"\n"):
        digest, _, text = line.partition(b" ")
        if xxhash.xxh3_64(text).hexdigest().encode() != digest:
            return
        yield json.loads(text)
