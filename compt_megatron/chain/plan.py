"""What a plan says: of every training its compute, memory, layout and time, and their sums. Plain data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from compt_megatron.chain.communication import Traffic
from compt_megatron.chain.hardware import Hardware
from compt_megatron.chain.layouts import Proposal


@dataclass(frozen=True)
class MemberPlan:
    """One training of the plan. `macs` are multiply-accumulates of the whole training: `train`, `teacher`, their sum
    `total`, and `extra` for forwards that are done again to save memory (not in the total). Where the plan is relative,
    `samples` and `macs` are those of an epoch of one sample, and `steps` is None. `tokens`: of a language model, those
    that it is trained on.

    `own` is the recipe's layout, with the memory and the time of a step on the ranks of the plan and what each rank
    sends; `cheapest` the layout that `layouts.proposals` puts first for those ranks, None where none fits; `scaling`
    the same for other numbers of ranks.
    """

    name: str
    model: str
    kind: str
    parent: str | None
    parameters: int
    epochs: float | None
    steps: int | None
    samples: float
    tokens: float | None
    macs: dict[str, float]
    alone_macs: float | None  # the same model trained alone for as many samples as the base
    alone_hours: float | None  # the same in GPU-hours, in the recipe's own layout
    precision: str
    own: Proposal
    traffic: list[Traffic]
    cheapest: Proposal | None
    scaling: dict[int, Proposal | None]

    @property
    def share(self) -> float | None:
        """This training's compute as a share of training the model alone."""
        return self.macs["total"] / self.alone_macs if self.alone_macs else None

    @property
    def hours(self) -> float | None:
        """GPU-hours in the recipe's own layout, predicted; None where the plan is relative."""
        return None if self.steps is None else self.steps * self.own.time.total * self.own.ranks / 3600

    def to_dict(self) -> dict[str, Any]:
        """Plain data: `layout`, `memory` and `time` are those of the recipe's own layout."""
        plain = (
            "name", "model", "kind", "parent", "parameters", "epochs", "steps", "samples", "tokens", "macs",
            "alone_macs", "hours", "alone_hours",
        )  # fmt: skip
        own = self.own.to_dict()
        own["layout"] |= {"precision": self.precision, "batch_size": self.own.batch}
        return {
            **{name: getattr(self, name) for name in plain},
            "share_of_alone": self.share,
            **{name: own[name] for name in ("layout", "memory", "time", "samples_per_second")},
            "traffic": [asdict(part) for part in self.traffic],
            "cheapest": self.cheapest.to_dict() if self.cheapest else None,
            "scaling": [
                {"ranks": ranks, "cheapest": one.to_dict() if one else None} for ranks, one in self.scaling.items()
            ],
        }


@dataclass(frozen=True)
class Plan:
    """The plan of a recipe on `world` ranks of `hardware`. Costs are `relative` where some member is given in epochs
    and the samples of an epoch are unknown."""

    name: str
    world: int
    hardware: Hardware
    samples_per_epoch: int | None
    links: list[MemberPlan]
    controls: list[MemberPlan]
    notes: list[str] = field(default_factory=list)
    relative: bool = False

    @property
    def total_macs(self) -> float:
        """Compute of the whole chain, controls left out."""
        return sum(link.macs["total"] for link in self.links)

    @property
    def alone_macs(self) -> float | None:
        """Compute of training every member alone for as many samples as the base; None without a trained base."""
        return _sum(link.alone_macs for link in self.links)

    @property
    def hours(self) -> float | None:
        """GPU-hours of the whole chain, controls left out; None where the plan is relative."""
        return _sum(link.hours for link in self.links)

    @property
    def alone_hours(self) -> float | None:
        """GPU-hours of training every member alone for as many samples as the base."""
        return _sum(link.alone_hours for link in self.links)

    @property
    def speed_up(self) -> float | None:
        """How many times cheaper the family is as a chain."""
        return self.alone_macs / self.total_macs if self.alone_macs and self.total_macs else None

    @property
    def last_share(self) -> float | None:
        """The whole chain's compute as a share of training its last member alone: the paper's comparison."""
        alone = self.links[-1].alone_macs
        return self.total_macs / alone if alone else None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for `--json`."""
        totals = {"macs": self.total_macs, "alone_macs": self.alone_macs}
        totals |= {"hours": self.hours, "alone_hours": self.alone_hours}
        return {
            "name": self.name,
            "world": self.world,
            "hardware": asdict(self.hardware),
            "samples_per_epoch": self.samples_per_epoch,
            "relative": self.relative,
            "links": [link.to_dict() for link in self.links],
            "controls": [control.to_dict() for control in self.controls],
            "notes": self.notes,
            "total": totals | {"speed_up": self.speed_up, "share_of_last_alone": self.last_share},
        }


def _sum(parts: Iterable[float | None]) -> float | None:
    """None where a part is."""
    known = [*parts]
    return None if None in known else sum(part for part in known if part is not None)
