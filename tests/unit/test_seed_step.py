"""The random state of a micro-batch: a function of where it is."""

from __future__ import annotations

import random
import traceback

import pytest
import torch

from compt_megatron.engine.runtime import seed_step


def drawn() -> tuple[float, float]:
    return float(torch.rand(())), random.random()


def test_it_depends_on_seed_step_micro_batch_and_rank() -> None:
    places = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]
    found = []
    for place in [*places, *places]:
        seed_step(*place)
        found.append(drawn())
    assert found[: len(places)] == found[len(places) :]
    assert len(set(found)) == len(places)


def test_accelerators_that_were_not_started_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.manual_seed queues a call for each, with the stack in text: milliseconds for every micro-batch."""
    monkeypatch.setattr(traceback, "format_stack", lambda: pytest.fail("a call was queued"))
    seed_step(0, 0, 0, 0)
