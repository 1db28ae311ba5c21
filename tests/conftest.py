"""What all tests share: their order over the workers, and a collector that leaves the imports alone."""

from __future__ import annotations

import gc

import pytest


def pytest_collection_finish(session: pytest.Session) -> None:
    """What is imported by now stays: a million objects that no collection need visit."""
    gc.collect()
    gc.freeze()
