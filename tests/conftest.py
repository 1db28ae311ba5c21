"""What all tests share: the order of their files, and a collector that leaves the imports alone."""

from __future__ import annotations

import gc
from collections import Counter

import pytest

LONG = ("distributed", "end_to_end", "kernels", "faults")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Folders of long files first, then files by their number of tests: so two workers that share them end together."""
    tests = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path.parent.name not in LONG, -tests[item.path], item.path))


def pytest_collection_finish(session: pytest.Session) -> None:
    """What is imported by now stays: a million objects that no collection need visit."""
    gc.collect()
    gc.freeze()
