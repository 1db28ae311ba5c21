"""Keeps work beside a worker's main work from running ahead of it, so that both find the same bytes in memory."""

from __future__ import annotations

import threading

_LEAD = 0.02  # of the whole that the others may be ahead


class Stopped(Exception):
    """The main work was given up."""


class Pace:
    """How far the main work has come, from 0 to 1, and where the others wait for it."""

    def __init__(self) -> None:
        self._reached = 0.0
        self._stopped = False
        self._moved = threading.Condition()

    def reach(self, fraction: float) -> None:
        """The main work has come so far."""
        with self._moved:
            self._reached = max(self._reached, fraction)
            self._moved.notify_all()

    def wait_for(self, fraction: float) -> None:
        """Return when the main work is about to come to `fraction`. Raises Stopped if it was given up."""
        with self._moved:
            self._moved.wait_for(lambda: self._stopped or self._reached + _LEAD >= fraction)
        if self._stopped:
            raise Stopped

    def release(self) -> None:
        """Nobody needs to wait any more."""
        self.reach(1.0)

    def stop(self) -> None:
        """Give up the work beside, too. Harmless once that is done."""
        with self._moved:
            self._stopped = True
            self._moved.notify_all()
