"""The stages of llm_chain: which cells each needs, as far as the results so far tell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from benchmarks.llm.cells import MODELS, PREVIOUS, VARIATIONS, Cell, link_cell
from benchmarks.llm.compute import Compute, Point, equal_compute, next_rates
from benchmarks.llm.store import Record

TUNED = 0.2  # share of the tokens with which rates are tuned, on the first seed
BUDGETS = (0.5, 1.0)  # of models alone: the first seed with each, the others with the last
LINK = 0.4  # share of the tokens that a link is trained on
START = 4e-3  # the rate that is tried first
BEST = 3  # variations that the family is trained with, beside the default


@dataclass(frozen=True)
class Pair:
    """What a link cost and reached against its model alone.

    MACs: of the link with its teacher, of its predecessor, and what the model alone needs for the same loss.
    """

    loss: float
    link: float
    before: float
    alone: Compute

    @property
    def saving(self) -> float:
        """Share of the compute that the pair saves against both models alone, at equal losses."""
        return 1 - (self.before + self.link) / (self.before + self.alone.macs)


@dataclass(frozen=True)
class Program:
    """The cells of all stages for one set of results; cells that cannot be named yet are left out."""

    tokens: int
    seeds: tuple[int, ...]
    known: dict[str, Record]

    # -- models alone --------------------------------------------------------------------------------------------

    def tuning(self, model: str) -> tuple[list[Cell], float | None]:
        """The cells that look for a model's rate, and the best rate once it is known."""
        tried: dict[float, Cell] = {}
        while True:
            losses = {rate: self.known[cell.id]["loss"] for rate, cell in tried.items() if cell.id in self.known}
            if len(losses) < len(tried):
                return list(tried.values()), None
            if not (rates := next_rates(losses, START)):
                return list(tried.values()), min(losses, key=lambda rate: losses[rate])
            tried |= {rate: Cell(model, self.seeds[0], round(TUNED * self.tokens), rate) for rate in rates}

    def tune_cells(self) -> list[Cell]:
        return [cell for model in MODELS for cell in self.tuning(model)[0]]

    def alone(self, model: str, seed: int, budget: float) -> Cell | None:
        """A model trained alone at its own rate; None where that is not known yet."""
        rate = self.tuning(model)[1]
        return None if rate is None else Cell(model, seed, round(budget * self.tokens), rate, evaluations=4)

    def alone_cells(self) -> list[Cell]:
        """Whole budgets of the first seed first; the smallest model needs no curve."""
        first, *others = self.seeds
        wanted = [(model, first, BUDGETS[-1]) for model in MODELS]
        wanted += [(model, first, budget) for model in PREVIOUS for budget in BUDGETS[:-1]]
        wanted += [(model, seed, BUDGETS[-1]) for seed in others for model in MODELS]
        return [cell for each in wanted if (cell := self.alone(*each)) is not None]

    def budgets(self, model: str) -> list[list[Record]]:
        """The results of a model alone at its own rate, by budget (that of the tuning first); those that are there."""
        tuned, rate = self.tuning(model)
        cells: list[list[Cell | None]] = [[cell for cell in tuned if cell.rate == rate]]
        cells += [[self.alone(model, seed, budget) for seed in self.seeds] for budget in BUDGETS]
        found = [[self.known[cell.id] for cell in group if cell and cell.id in self.known] for group in cells]
        return [group for group in found if group]

    def curve(self, model: str) -> list[Point]:
        """Compute and loss of a model alone at each budget, means of the seeds."""
        return [
            Point(fmean(each["macs"]["total"] for each in group), fmean(each["loss"] for each in group))
            for group in self.budgets(model)
        ]

    # -- chains --------------------------------------------------------------------------------------------------

    def link(self, model: str, seed: int, name: str) -> Cell | None:
        """The link that ends in `model`, each link since the first with the settings of variation `name`."""
        before, rate = PREVIOUS[model], self.tuning(model)[1]
        parent = self.link(before, seed, name) if before in PREVIOUS else self.alone(before, seed, BUDGETS[-1])
        if parent is None or rate is None:
            return None
        return link_cell(parent, model, round(LINK * self.tokens), rate, name)

    def screen_cells(self) -> list[Cell]:
        found = (self.link("m", self.seeds[0], name) for name in VARIATIONS)
        return [cell for cell in found if cell is not None]

    def best(self) -> list[str]:
        """The variations that save the most compute on the first pair, best first; those measured so far."""
        savings = {name: pair.saving for name in VARIATIONS if (pair := self.pair("m", self.seeds[0], name))}
        savings.pop("default", None)
        return sorted(savings, key=lambda name: -savings[name])[:BEST]

    def family_names(self) -> list[str]:
        """What the family is trained with: the default, the best variations, and the best two together."""
        best = self.best()
        return ["default", *best, *(["+".join(best[:2])] if len(best) > 1 else [])]

    def family_cells(self, names: list[str]) -> list[Cell]:
        """All links of the variations `names`, one seed after the other."""
        found = (self.link(model, seed, name) for seed in self.seeds for model in PREVIOUS for name in names)
        return [cell for cell in found if cell is not None]

    def pair(self, model: str, seed: int, name: str) -> Pair | None:
        """A link against its model alone, None where something of that is not measured yet."""
        cell = self.link(model, seed, name)
        if cell is None or cell.parent is None or cell.id not in self.known or cell.parent.id not in self.known:
            return None
        record, parent = self.known[cell.id], self.known[cell.parent.id]
        alone = equal_compute(self.curve(model), record["loss"])
        if alone is None:
            return None
        return Pair(record["loss"], record["macs"]["total"], parent["macs_before"] + parent["macs"]["total"], alone)

    def saving(self, models: Sequence[str], seed: int, name: str) -> float | None:
        """The share of the compute of the family up to the last of `models` that its chain saves at equal losses; None
        where something of that is not measured yet."""
        pairs = [pair for model in models if (pair := self.pair(model, seed, name)) is not None]
        if len(pairs) < len(models):
            return None
        base = pairs[0].before
        return 1 - (base + sum(pair.link for pair in pairs)) / (base + sum(pair.alone.macs for pair in pairs))
