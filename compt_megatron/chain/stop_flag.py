"""A request to stop, as schedulers and people send it."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopFlag:
    """Set by SIGTERM, SIGUSR1 or SIGINT: finish the step, write a checkpoint, leave with exit status 3."""

    def __init__(self) -> None:
        self.requested = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.requested = True

    @contextmanager
    def listening(self) -> Iterator[StopFlag]:
        """Handle the signals within the block (main thread only), and restore the old handlers after it."""
        signals = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
        before = {number: signal.signal(number, self) for number in signals}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
