"""A recipe: everything that defines a chain run. Sections are in `sections.py`; this is how they fit together."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from compt_megatron.recipe.data_section import DataSettings
from compt_megatron.recipe.files import model_stem
from compt_megatron.recipe.link_sections import AlignSettings, DistillSettings, GrowSettings
from compt_megatron.recipe.parallel_section import ParallelSettings
from compt_megatron.recipe.section import Positive, PositiveNumber, Precision, Section, Seed
from compt_megatron.recipe.sections import (
    CheckpointSettings,
    EvaluateSettings,
    ObjectiveSettings,
    OptimizerSettings,
    ReportSettings,
)

Overrides = dict[str, Any]  # a partial section, merged over the recipe's own

# the sections that a link or a control may override in part
SECTIONS: dict[str, type[Section]] = {
    "objective": ObjectiveSettings,
    "data": DataSettings,
    "optimizer": OptimizerSettings,
    "parallel": ParallelSettings,
    "evaluate": EvaluateSettings,
}


class Misfit(ValueError):
    """Something wrong at one place of a recipe: `path` from the recipe's top, and the error found there."""

    def __init__(self, path: tuple[str | int, ...], cause: ValidationError | str):
        super().__init__(str(cause))
        self.path, self.cause = path, cause


class Member(Section):
    """What a link and a control have in common: part of the recipe's sections, set anew for them alone."""

    objective: Overrides = Field(default_factory=dict, description="Fields of `objective`, for this one alone.")
    data: Overrides = Field(default_factory=dict, description="Fields of `data`, for this one alone.")
    optimizer: Overrides = Field(default_factory=dict, description="Fields of `optimizer`, for this one alone.")
    parallel: Overrides = Field(default_factory=dict, description="Fields of `parallel`, for this one alone.")
    evaluate: Overrides = Field(default_factory=dict, description="Fields of `evaluate`, for this one alone.")
    precision: Precision | None = Field(
        default=None, description="The precision of this one alone; null: the recipe's."
    )
    seed: Seed | None = Field(default=None, description="The seed of this one alone; null: the recipe's.")


class Link(Member):
    """One member of the family, in the order of the chain."""

    model: str = Field(description="The model's config: a path, a packaged name, or open_clip's model name.")
    name: str = Field(description="The link's name in the run folder; default: the config's file name.")
    epochs: PositiveNumber | None = Field(default=None, description="Training length in epochs (or give `steps`).")
    steps: Positive | None = Field(default=None, description="Training length in steps (or give `epochs`).")
    train: bool = Field(default=True, description="Whether the link is trained; false needs `init` or `grow`.")
    init: str | None = Field(default=None, description="A checkpoint to start from, in any format that compt reads.")
    grow: GrowSettings | None = Field(
        default=None,
        description="Grow from the previous link; a later link without `init` must say it, or `grow: null`.",
    )
    align: AlignSettings | None = Field(default=None, description="Align to the previous link; null: not aligned.")
    distill: DistillSettings | None = Field(
        default=None, description="Language models: distil the previous link's predictions; null: not distilled."
    )

    @model_validator(mode="before")
    @classmethod
    def _default_name(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("name") is None and isinstance(value.get("model"), str):
            return {**value, "name": model_stem(value["model"])}
        return value

    @model_validator(mode="after")
    def _check(self) -> Link:
        if self.train and (self.epochs is None) == (self.steps is None):
            raise ValueError("give exactly one of 'epochs' and 'steps' (or 'train: false')")
        if not self.train and (self.epochs is not None or self.steps is not None):
            raise ValueError("'train: false' goes without 'epochs' and 'steps'; remove one or the other")
        if self.init is not None and self.grow is not None:
            raise ValueError("'init' and 'grow' both set the first weights; remove one")
        if not self.train and self.init is None and self.grow is None:
            raise ValueError("an untrained link needs 'init' or 'grow'")
        return self


class Control(Member):
    """The model of one link trained alone, from scratch, for comparison."""

    link: str = Field(description="The link whose model is trained alone; its overrides hold here too.")
    name: str = Field(description="The control's name in the run folder; default: `<link>-alone`.")
    compute: Literal["chain"] | PositiveNumber | None = Field(
        default=None,
        description="Training length as compute: `chain` is the MACs of the chain up to and with that link, a number "
        "is MACs. The default where neither `epochs` nor `steps` is given: `chain`.",
    )
    epochs: PositiveNumber | None = Field(default=None, description="Training length in epochs (instead of `compute`).")
    steps: Positive | None = Field(default=None, description="Training length in steps (instead of `compute`).")

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        value = dict(value)
        if value.get("name") is None and isinstance(value.get("link"), str):
            value["name"] = f"{value['link']}-alone"
        if all(value.get(key) is None for key in ("compute", "epochs", "steps")):
            value["compute"] = "chain"
        return value

    @model_validator(mode="after")
    def _check(self) -> Control:
        if sum(length is not None for length in (self.compute, self.epochs, self.steps)) != 1:
            raise ValueError("give one of 'compute', 'epochs' and 'steps'")
        return self


# what a run folder holds beside the folders of its members
_TAKEN = ("cache", "report", "tb", "chain.json", "metrics.jsonl", "recipe.yaml", "status.json")


def _names_a_folder(name: str) -> bool:
    plain = name.isprintable() and "/" not in name and 0 < len(name.encode()) <= 100
    return plain and not name.startswith((".", "-")) and not name.endswith(".partial") and name not in _TAKEN


def _check_optimizer(optimizer: Any, parallel: Any, place: tuple[str | int, ...]) -> None:
    """Whether the optimizer can work on what this layout gives it. Raises Misfit."""
    if optimizer.name == "lamb" and parallel.zero:
        raise Misfit(
            place,
            f"optimizer.name 'lamb' needs the norms of whole parameters, which parallel.zero {parallel.zero} cuts; use "
            "parallel.zero: 0, or optimizer.name: adamw",
        )
    if optimizer.implementation != "apex":
        return
    if optimizer.name == "lamb" and parallel.tensor > 1:
        raise Misfit(
            place,
            f"optimizer.implementation 'apex' has no LAMB for parallel.tensor {parallel.tensor}: its norms are of one "
            "rank's part; use torch",
        )
    if parallel.offload != "none":
        raise Misfit(place, "optimizer.implementation 'apex' works on CUDA, parallel.offload on the CPU; use torch")


def _check_kind(section: Any, objective: Any, place: tuple[str | int, ...]) -> None:
    """Whether the fields of `data` or `evaluate` are for what the objective trains on. Raises Misfit."""
    if (problem := section.misfit(objective.name)) is not None:
        raise Misfit(place, problem)


class Settings(Section):
    """The sections that hold for one link or control: the recipe's, with its own fields over them."""

    precision: Precision
    seed: int
    objective: ObjectiveSettings
    data: DataSettings
    optimizer: OptimizerSettings
    parallel: ParallelSettings
    evaluate: EvaluateSettings


class Recipe(Section):
    """A chain run. Load one with `load_recipe`."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")] = Field(
        description="The run's name, also of its folder: letters, digits, dots, dashes and underscores."
    )
    seed: Seed = Field(default=0, description="The seed of initial weights, data order, captions and augmentation.")
    precision: Precision = Field(default="fp32", description="Arithmetic of the forward and backward pass.")
    objective: ObjectiveSettings = Field(default_factory=lambda: ObjectiveSettings(), description="The task loss.")
    data: DataSettings = Field(description="What is trained and evaluated on.")
    optimizer: OptimizerSettings = Field(description="The optimizer and its schedule.")
    parallel: ParallelSettings = Field(default_factory=lambda: ParallelSettings(), description="Spread over devices.")
    evaluate: EvaluateSettings = Field(default_factory=lambda: EvaluateSettings(), description="Evaluation.")
    checkpoint: CheckpointSettings = Field(default_factory=lambda: CheckpointSettings(), description="Checkpoints.")
    report: ReportSettings = Field(default_factory=lambda: ReportSettings(), description="What is shown.")
    links: Annotated[list[Link], Field(min_length=1)] = Field(description="The family, smallest first.")
    controls: list[Control] = Field(default_factory=list, description="Links trained alone, for comparison.")

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        self._check_links()
        names: set[str] = set()
        groups: list[tuple[str, Sequence[Link | Control]]] = [("links", self.links), ("controls", self.controls)]
        for group, members in groups:
            for index, member in enumerate(members):
                if member.name in names:
                    raise Misfit((group, index, "name"), f"the name {member.name!r} is taken; give another")
                if not _names_a_folder(member.name):
                    raise Misfit(
                        (group, index, "name"),
                        f"{member.name[:40]!r} cannot name a folder of the run; use up to 100 letters and digits",
                    )
                names.add(member.name)
                own = [self.links[self.link_index(member.link)]] if isinstance(member, Control) else []
                merged = {section: self._merged(section, [*own, member], (group, index)) for section in SECTIONS}
                _check_optimizer(merged["optimizer"], merged["parallel"], (group, index))
                for section in ("data", "evaluate"):
                    _check_kind(merged[section], merged["objective"], (group, index))
        return self

    def _check_links(self) -> None:
        for key in ("grow", "align", "distill"):
            if getattr(self.links[0], key) is not None:
                raise Misfit(("links", 0, key), "the first link has no predecessor; remove it")
        for index, link in enumerate(self.links[1:], 1):
            if link.init is None and "grow" not in link.model_fields_set:
                hint = "say 'grow: {operator: exact}', 'init: PATH', or 'grow: null' to start from scratch"
                raise Misfit(("links", index), f"a later link must say where it starts from: {hint}")
        known = [link.name for link in self.links]
        for index, control in enumerate(self.controls):
            if control.link not in known:
                raise Misfit(("controls", index, "link"), f"no link is called {control.link!r}; there are {known}")

    def _merged(self, section: str, members: Sequence[Member], place: tuple[str | int, ...] = ()) -> Section:
        """Section `section` with the overrides of `members` over it in turn; `place` is where errors are reported."""
        values = getattr(self, section).model_dump()
        for member in members:
            values = merge(values, getattr(member, section))
        try:
            return SECTIONS[section].model_validate(values)
        except ValidationError as error:
            raise Misfit((*place, section), error) from error

    def _settings(self, *members: Member) -> Settings:
        precision, seed = self.precision, self.seed
        for member in members:
            precision = member.precision or precision
            seed = seed if member.seed is None else member.seed
        merged: dict[str, Any] = {section: self._merged(section, members) for section in SECTIONS}
        return Settings.model_construct(precision=precision, seed=seed, **merged)

    def link_index(self, which: int | str) -> int:
        """The index of a link given by index or name. Raises KeyError where there is none of that name."""
        if isinstance(which, int):
            return which
        for index, link in enumerate(self.links):
            if link.name == which:
                return index
        raise KeyError(which)

    def link_settings(self, which: int | str) -> Settings:
        """The settings that hold for one link (by index or name): the recipe's sections with the link's over them."""
        return self._settings(self.links[self.link_index(which)])

    def control_settings(self, which: int) -> Settings:
        """The settings of one control: the recipe's, its link's over them, then its own."""
        control = self.controls[which]
        return self._settings(self.links[self.link_index(control.link)], control)

    @cached_property
    def digest(self) -> str:
        """A short hash of everything the recipe says, defaults included."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:16]


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over` over it; dictionaries are merged key by key, everything else is replaced."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged
