"""Where the training of a link stands: steps, samples, compute, time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from compt_megatron.chain.ledger import Entry
from compt_megatron.chain.member import Member

_KEPT = ("samples", "aligned_samples", "wall_s", "cpu_s", "skipped", "loss", "align_at_step0")


@dataclass(frozen=True)
class Position:
    """How far a training has come: `macs` counts the chain's compute up to here, predecessors included."""

    step: int
    epoch: float
    samples: int
    macs: float


@dataclass
class Progress:
    """Where the training of a link stands and what it has cost."""

    total_steps: int
    steps_per_epoch: int
    streams: int
    macs_per_sample: dict[str, float]
    samples: int = 0
    aligned_samples: int = 0
    wall_s: float = 0.0
    cpu_s: float = 0.0
    skipped: int = 0
    loss: float | None = None
    align_at_step0: dict[str, float] = field(default_factory=dict)

    @classmethod
    def resumed(
        cls, state: dict[str, Any], total_steps: int, steps_per_epoch: int, streams: int, macs: dict[str, float]
    ) -> Progress:
        """Where `state`, which `recorded` gave, left off; from the start if it is empty."""
        kept = {name: state[name] for name in _KEPT if name in state}
        return cls(total_steps, steps_per_epoch, streams, macs, **kept)

    def recorded(self, step: int, world: int) -> dict[str, Any]:
        """What a checkpoint of step `step` says of the training."""
        own = {name: getattr(self, name) for name in (*_KEPT, "streams", "total_steps")}
        return {"step": step, "epoch": step / self.steps_per_epoch, "world": world, **own}

    @property
    def macs(self) -> dict[str, float]:
        """Multiply-accumulates so far. The second forward of cached gradients is reported, but not in the total:
        it buys memory, not training."""
        costs = {key: value * self.samples for key, value in self.macs_per_sample.items()}
        costs["teacher"] = self.macs_per_sample["teacher"] * self.aligned_samples
        return costs | {"total": costs["train"] + costs["teacher"]}

    def position(self, step: int, entry: Entry) -> Position:
        macs = entry.chain_macs_before + self.macs["total"]
        return Position(step, step / self.steps_per_epoch, self.samples, macs)


def total_steps(member: Member, steps_per_epoch: int, budget_macs: float | None) -> int:
    """Steps of a member's training: as said, by epochs, or (controls) by the compute it may spend."""
    if not member.train:
        return 0
    if member.steps is not None:
        return member.steps
    if member.epochs is not None:
        return max(1, round(member.epochs * steps_per_epoch))
    assert budget_macs is not None, "a member without a length has a budget"
    return max(1, math.floor(budget_macs / (member.macs_per_sample(None)["train"] * member.settings.data.batch_size)))


class Clock:
    """Seconds since the last lap."""

    def __init__(self, read: Callable[[], float]) -> None:
        self._read, self._last = read, read()

    def lap(self) -> float:
        now = self._read()
        passed, self._last = now - self._last, now
        return passed
