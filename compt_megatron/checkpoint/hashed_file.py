"""A file that is only appended to, hashed as it is written; it can go on where a killed run stopped."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import xxhash

from compt_megatron.checkpoint.out_file import OutFile, reserve

_RESERVED = 256 * 2**20  # bytes of the disk that are taken at a time
_BLOCK = 8 * 2**20  # bytes read back at a time
_SHORT = 4096  # bytes of a write that waits for others: torch.save makes some forty a tensor, of a few bytes each
_GATHERED = 2**16  # bytes of short writes that go on together


class HashedFile(OutFile):
    """A file that is appended to, from its beginning; a binary stream for torch.save and pickle."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.size = 0  # bytes written
        self._short = bytearray()  # the last of them, which wait to be passed on
        self._passed = 0  # the others
        self._reserved = _RESERVED // 16  # bytes; what is smaller is not worth the call
        self._since = xxhash.xxh3_64()  # of what was written after the last `progress`
        self._clean = False  # whether the file ends here: a killed run may have left more

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self.size += len(view)
        if len(view) < _SHORT:
            self._short.extend(view)
        if len(view) >= _SHORT or len(self._short) >= _GATHERED:
            self._pass_on()
        if len(view) >= _SHORT:
            self._append(view)
        return len(view)

    def _pass_on(self) -> None:
        """Write what short writes have left."""
        if self._short:
            gathered, self._short = self._short, bytearray()
            self._append(memoryview(gathered))

    def _append(self, view: memoryview) -> None:
        self._cut()
        self._reserve(self._passed + len(view))
        self.put(self._passed, view)
        self._since.update(view)
        self._passed += len(view)

    def _reserve(self, size: int) -> None:
        if size > self._reserved and self.error is None:
            try:
                reserve(self.descriptor, self._passed, size + _RESERVED, longer=False)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):  # what is written may fit all the same
                    self.error = error
            self._reserved = size + _RESERVED

    def finish(self) -> tuple[str, str, int]:
        self.drain()
        os.ftruncate(self.descriptor, self.size)  # gives back what was reserved and not used
        return super().finish()

    def _cut(self) -> None:
        if not self._clean:
            os.ftruncate(self.descriptor, self._passed)
            self._clean = True

    def drain(self) -> None:
        self._pass_on()
        self._cut()
        super().drain()

    def progress(self) -> tuple[int, str]:
        """Make all durable; returns the size, and a hash of what was written since the last call."""
        self.sync()
        found = self.size, self._since.hexdigest()
        self._since = xxhash.xxh3_64()
        return found

    def resume(self, progress: tuple[int, str]) -> bool:
        """Whether the bytes that an earlier `progress` speaks of are there; if so, the file goes on behind them."""
        size, digest = progress
        found = xxhash.xxh3_64()
        for at in range(self.size, size, _BLOCK):
            data = os.pread(self.descriptor, min(_BLOCK, size - at), at)
            found.update(data)
            self.sums.update(at, memoryview(data))
        if found.hexdigest() != digest:
            return False
        self.size = self._passed = size
        return True

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        """Report an error of the disk. torch.save calls it after every archive, so nothing is written for its sake."""
        self.check()
