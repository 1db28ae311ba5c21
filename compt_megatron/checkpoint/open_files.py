"""Descriptors of many files of which few are open at a time: a checkpoint of a thousand ranks has a thousand files."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path

_MOST = 64  # descriptors open at a time


class OpenFiles:
    """Opens files as they are asked for, with the same `flags`, and closes those that were not used for longest."""

    def __init__(self, flags: int) -> None:
        self._flags = flags
        self._open: OrderedDict[Path, int] = OrderedDict()

    def descriptor(self, path: Path) -> int:
        """An open descriptor of `path`, good until the next call."""
        if path not in self._open:
            while len(self._open) >= _MOST:
                os.close(self._open.popitem(last=False)[1])
            self._open[path] = os.open(path, self._flags)
        self._open.move_to_end(path)
        return self._open[path]

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])
