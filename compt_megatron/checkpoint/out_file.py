"""A file that is written in long runs, past the page cache where the system allows it.

Writing through the page cache costs a copy and a page for every 4 kB, which on a fast disk is most of the time, and
drives everything else out of memory. So bytes that follow each other are gathered in blocks, and the whole pages of a
block go straight to the disk (O_DIRECT) while the next block is filled. What is left at the two ends of a run is
written the ordinary way, and so is everything where a file system refuses.
"""

from __future__ import annotations

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
_BLOCKS = 3  # one that is filled while two are on their way
_WORTH = 2**20  # bytes from which a direct write pays

_this = threading.local()  # .file: the one that this thread writes to; the others hold no blocks


@contextmanager
def no_room(path: Path) -> Iterator[None]:
    """Turn the errors of a full disk, quota or broken medium while writing `path` into a UserError."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS):
            raise
        raise UserError(f"{path}: cannot be written ({error.strerror}); free some space or write elsewhere") from error


class OutFile:
    """A file filled by `put` at any place; `sums` are those of its bytes as far as they come in order.

    An error of the disk is raised by `drain`, `sync` and `finish`, as a UserError. One thread at a time uses it.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, path.name
        self.sums = Sums()
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        self._direct = -1  # opened by the first block that is worth it
        self._refused = not hasattr(os, "O_DIRECT")
        self._free: list[mmap.mmap] = []
        self._made = 0
        self._writing: deque[tuple[Future[None], mmap.mmap]] = deque()
        self._threads: ThreadPoolExecutor | None = None
        self._block: mmap.mmap | None = None
        self._base = self._first = self._stop = 0  # of the block: its place in the file, and the bytes that are there
        self._error: OSError | None = None

    def put(self, at: int, data: Any) -> None:
        """Write `data`, bytes or anything that has a buffer of them, at byte `at`."""
        view = memoryview(data).cast("B")
        self._take_turn()
        self.sums.update(at, view)
        source = np.frombuffer(view, np.uint8)
        if self._block is not None and at != self._stop:
            self._push()
        while len(source):
            if self._block is None:
                self._block = self._new_block()
                self._base, self._first, self._stop = at - at % _PAGE, at, at
            inside = self._stop - self._base
            count = min(_BLOCK - inside, len(source))
            np.copyto(np.frombuffer(self._block, np.uint8, count, inside), source[:count])
            source, at, self._stop = source[count:], at + count, self._stop + count
            if inside + count == _BLOCK:
                self._push()

    def read(self, at: int, count: int) -> bytes:
        """Bytes that were written; fewer where the file ends before."""
        self.drain()
        return os.pread(self.descriptor, count, at)

    def drain(self) -> None:
        """Let everything reach the system, and give back the blocks."""
        if self._block is not None:
            self._push()
        while self._writing:
            self._settle()
        self._free, self._made = [], 0
        with no_room(self.path):
            if self._error is not None:
                raise self._error

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
        """Close it. What was not flushed is lost."""
        while self._writing:
            self._settle()
        if self._threads is not None:
            self._threads.shutdown()
        self._block, self._free, self._threads = None, [], None
        for descriptor in (self.descriptor, self._direct):
            if descriptor >= 0:
                with suppress(OSError):
                    os.close(descriptor)
        self.descriptor = self._direct = -1

    # -- blocks

    def _take_turn(self) -> None:
        """Let the file that this thread wrote to before give back its blocks."""
        before = getattr(_this, "file", None)
        if before is not self:
            if before is not None and before.descriptor >= 0:
                with suppress(UserError, OSError):  # kept by that file, which raises it when it is finished
                    before.drain()
            _this.file = self

    def _new_block(self) -> mmap.mmap:
        if not self._free and self._made == _BLOCKS:
            self._settle()
        if self._free:
            return self._free.pop()
        self._made += 1
        return mmap.mmap(-1, _BLOCK)

    def _settle(self) -> None:
        """Wait for the oldest block that is on its way."""
        future, block = self._writing.popleft()
        try:
            future.result()
        except OSError as error:
            self._error = self._error or error
        self._free.append(block)

    def _push(self) -> None:
        """Send the block off."""
        assert self._block is not None
        block, self._block = self._block, None
        if self._error is not None:
            self._free.append(block)
            return
        if self._stop - self._first < _WORTH:
            try:
                self._store(block, self._base, self._first, self._stop)
            except OSError as error:
                self._error = error
            self._free.append(block)
            return
        if self._threads is None:
            self._threads = ThreadPoolExecutor(_BLOCKS - 1, "write")
        future = self._threads.submit(self._store, block, self._base, self._first, self._stop)
        self._writing.append((future, block))

    def _store(self, block: mmap.mmap, base: int, first: int, stop: int) -> None:
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

    def _store_direct(self, view: memoryview, at: int) -> bool:
        """Write whole pages past the page cache; False where that is refused."""
        if self._refused:
            return False
        try:
            if self._direct < 0:
                self._direct = os.open(self.path, os.O_WRONLY | os.O_DIRECT)
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


class HashedFile(OutFile):
    """A new file that is only appended to; a binary stream for torch.save and pickle."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        os.ftruncate(self.descriptor, 0)  # what a killed run left
        self.size = 0

    def write(self, data: Any) -> int:
        count = memoryview(data).nbytes
        self.put(self.size, data)
        self.size += count
        return count

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        """Report an error of the disk. torch.save calls it after every archive: nothing is written for its sake."""
        with no_room(self.path):
            if self._error is not None:
                raise self._error
