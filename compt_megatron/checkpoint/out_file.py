"""Files that are written in long runs, past the page cache where the system allows it.

Writing through the page cache costs a copy and a page for every 4 kB, which on a fast disk is most of the time, and
drives everything else out of memory. So bytes that follow each other are gathered in blocks, and the whole pages of a
block go straight to the disk (O_DIRECT) while the next block is filled. What is left at the two ends of a run is
written the ordinary way, and so is everything where a file system refuses.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from compt_megatron.checkpoint.sums import Sums, joined
from compt_megatron.errors import UserError

_PAGE = 4096  # bytes; where direct writes begin and end, in the file and in memory
_BLOCK = 8 * 2**20  # bytes gathered before they are written
_BLOCKS = 4  # of a thread: one that is filled while the others are on their way
BLOCK_BYTES = _BLOCKS * _BLOCK
_WORTH = 2**19  # bytes from which a direct write pays
_KEEP_SIZE = 1  # of fallocate: the file does not become longer
_UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


@contextmanager
def no_room(path: Path) -> Iterator[None]:
    """Turn the errors of a full disk, quota or broken medium while writing `path` into a UserError."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS):
            raise
        raise UserError(f"{path}: cannot be written ({error.strerror}); free some space or write elsewhere") from error


def reserve(descriptor: int, start: int, stop: int, longer: bool) -> bool:
    """Take room on the disk for bytes [start, stop) of a file, which may get `longer`: they are written faster then.

    False where the system cannot (posix_fallocate would write every page there). Raises OSError if there is no room.
    """
    call = getattr(_libc, "fallocate", None)
    if call is None:
        return False
    mode = 0 if longer else _KEEP_SIZE
    if call(descriptor, mode, ctypes.c_int64(start), ctypes.c_int64(stop - start)) == 0:
        return True
    if (code := ctypes.get_errno()) in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code))


class _Blocks:
    """The blocks of one thread, shared by the files that it writes, and the threads that carry them to the disk."""

    def __init__(self) -> None:
        self._free: list[mmap.mmap] = []
        self._made = 0
        self._under_way: deque[tuple[Future[None], mmap.mmap, OutFile]] = deque()
        self._threads = ThreadPoolExecutor(_BLOCKS - 1, "write")
        self.filling: OutFile | None = None  # the file that has a block; no other has one

    def take(self) -> mmap.mmap:
        if not self._free and self._made == _BLOCKS:
            self._settle()
        if not self._free:
            self._made += 1
            self._free.append(mmap.mmap(-1, _BLOCK))
        return self._free.pop()

    def give_back(self, block: mmap.mmap) -> None:
        self._free.append(block)

    def send(self, file: OutFile, block: mmap.mmap, base: int, first: int, stop: int) -> None:
        self._under_way.append((self._threads.submit(file.store, block, base, first, stop), block, file))

    def settle(self, file: OutFile) -> None:
        """Wait for all blocks of `file` that are on their way."""
        while any(sent is file for _, _, sent in self._under_way):
            self._settle()

    def _settle(self) -> None:
        future, block, file = self._under_way.popleft()
        try:
            future.result()
        except OSError as error:
            file.error = file.error or error
        self._free.append(block)


_libc = ctypes.CDLL(None, use_errno=True)
_this = threading.local()  # .blocks
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _this.__dict__.clear())  # threads do not survive a fork


def _blocks() -> _Blocks:
    if not hasattr(_this, "blocks"):
        _this.blocks = _Blocks()
    found: _Blocks = _this.blocks
    return found


class OutFile:
    """A file filled by `put` at any place; `sums` are those of its bytes as far as they come in order.

    An error of the disk is kept in `error` and raised by `drain`, `sync` and `finish`, as a UserError where it is the
    user's. A file is used by one thread only.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, path.name
        self.sums = Sums()
        self.error: OSError | None = None
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._direct = -1  # opened by the first block that is worth it
        self._refused = not hasattr(os, "O_DIRECT")
        self._block: mmap.mmap | None = None
        self._base = self._first = self._stop = 0  # of the block: its place in the file, and the bytes that are there

    def put(self, at: int, data: Any) -> None:
        """Write `data`, bytes or anything that has a buffer of them, at byte `at`."""
        view = memoryview(data).cast("B")
        blocks = _blocks()
        if blocks.filling is not self:
            if blocks.filling is not None:
                blocks.filling._push(blocks)
            blocks.filling = self
        self.sums.update(at, view)
        if self._block is not None and at != self._stop:
            self._push(blocks)
        source = np.frombuffer(view, np.uint8)
        while len(source):
            if self._block is None:
                self._block = blocks.take()
                self._base, self._first, self._stop = at - at % _PAGE, at, at
            inside = self._stop - self._base
            count = min(_BLOCK - inside, len(source))
            np.copyto(np.frombuffer(self._block, np.uint8, count, inside), source[:count])
            source, at, self._stop = source[count:], at + count, self._stop + count
            if inside + count == _BLOCK:
                self._push(blocks)

    def drain(self) -> None:
        """Let everything reach the system."""
        blocks = _blocks()
        self._push(blocks)
        blocks.settle(self)
        self.check()

    def check(self) -> None:
        """Raise an error that a write met."""
        with no_room(self.path):
            if self.error is not None:
                raise self.error

    def sync(self) -> None:
        """Make what was written durable."""
        self.drain()
        with no_room(self.path):
            os.fsync(self.descriptor)

    def finish(self) -> tuple[str, str, int]:
        """Make it durable and close it; returns its name, checksum and size in bytes."""
        self.sync()
        size = os.fstat(self.descriptor).st_size
        self.close()
        return self.name, joined(self.path, size, self.sums.found(size)), size

    def close(self) -> None:
        """Close it; what has not reached the system is lost."""
        blocks = _blocks()
        if blocks.filling is self:
            blocks.filling = None
        if self._block is not None:
            blocks.give_back(self._block)
            self._block = None
        blocks.settle(self)
        for descriptor in (self.descriptor, self._direct):
            if descriptor >= 0:
                with suppress(OSError):
                    os.close(descriptor)
        self.descriptor = self._direct = -1

    def _push(self, blocks: _Blocks) -> None:
        """Send the block off, if there is one; a short one is written at once."""
        if self._block is None:
            return
        block, self._block = self._block, None
        if self.error is None and self._stop - self._first >= _WORTH:
            self._open_direct()
            blocks.send(self, block, self._base, self._first, self._stop)
            return
        try:
            if self.error is None:
                self.store(block, self._base, self._first, self._stop)
        except OSError as error:
            self.error = error
        blocks.give_back(block)

    def store(self, block: mmap.mmap, base: int, first: int, stop: int) -> None:
        """Write bytes [first, stop) of the file, which lie in a block that begins at byte `base` of it."""
        view = memoryview(block)
        low, high = first + -first % _PAGE, stop - stop % _PAGE
        if high - low >= _WORTH and self._store_direct(view[low - base : high - base], low):
            _pwrite(self.descriptor, view[first - base : low - base], first)
            _pwrite(self.descriptor, view[high - base : stop - base], high)
            return
        _pwrite(self.descriptor, view[first - base : stop - base], first)
        if stop - first >= _WORTH and hasattr(os, "posix_fadvise"):  # lets the system begin to write it out
            os.posix_fadvise(self.descriptor, first, stop - first, os.POSIX_FADV_DONTNEED)

    def _open_direct(self) -> None:
        if self._direct < 0 and not self._refused:
            try:
                self._direct = os.open(self.path, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
            except OSError:
                self._refused = True

    def _store_direct(self, view: memoryview, at: int) -> bool:
        """Write whole pages past the page cache; False where that is refused."""
        if self._refused:
            return False
        try:
            _pwrite(self._direct, view, at)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._refused = True
        return not self._refused


def _pwrite(descriptor: int, view: memoryview, at: int) -> None:
    while view:
        count = os.pwrite(descriptor, view, at)
        view, at = view[count:], at + count
