"""One training of the run, resolved: a link of the chain, or a control (a link's model trained alone)."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compt_megatron.data.tar_reader import is_local
from compt_megatron.recipe.data_section import TEXT_FIELDS
from compt_megatron.recipe.link_sections import AlignSettings, DistillSettings, GrowSettings
from compt_megatron.recipe.schema import Control, Link, Recipe, Settings
from compt_megatron.spec.cost import at_length, head_macs, sample_macs
from compt_megatron.spec.families import load_spec
from compt_megatron.spec.table import ModelSpec


@dataclass(frozen=True)
class Member:
    """Everything that decides one training; `parent` is the link that it grows from or is aligned to."""

    name: str
    kind: str  # "link" or "control"
    spec: ModelSpec
    settings: Settings
    parent: str | None
    grow: GrowSettings | None
    align: AlignSettings | None
    distill: DistillSettings | None
    init: str | None
    train: bool
    epochs: float | None
    steps: int | None
    compute: str | float | None  # controls: "chain" or MACs

    @property
    def identity(self) -> str:
        """A hash of what decides the final weights. How it is spread over devices and what is logged do not."""
        settings = self.settings
        text = self.spec.is_language_model
        kept = {"workers", "cache", "eval"} if text else {"workers", "cache", "eval", *TEXT_FIELDS}
        data = settings.data.model_dump(exclude=kept)
        train = [data["train"]] if isinstance(data["train"], str) else data["train"]
        # The same shards elsewhere are the same data: a run goes on after its data have moved.
        data["train"] = [_moved(each) for each in train]
        if data.get("tokenizer"):
            data["tokenizer"] = _moved(data["tokenizer"])
        objective = settings.objective.model_dump(exclude=None if text else {"z_loss", "chunk"})
        said: dict[str, Any] = {
            "model": self.spec.digest,
            "seed": settings.seed,
            "precision": settings.precision,
            "objective": objective,
            "data": data,
            "optimizer": settings.optimizer.model_dump(exclude={"implementation"}),
            "grow": self.grow.model_dump() if self.grow else None,
            "align": self.align.model_dump(exclude={"tensor"}) if self.align else None,
            "distill": self.distill.model_dump(exclude={"tensor"}) if self.distill else None,
            "length": [self.init, self.train, self.epochs, self.steps, self.compute],
        }
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]

    def macs_per_sample(self, teacher: ModelSpec | None) -> dict[str, float]:
        """Multiply-accumulates of one training sample: forward and backward (2x), what the teacher costs while it runs,
        and the second forward of cached gradients, which is counted apart.

        The teacher costs its forward; that of a language model makes logits only where they are distilled, and then the
        student's are made once more, forward and backward."""
        captions = self.settings.data.captions
        forward = sample_macs(self.sized(self.spec), captions)
        taught = 0.0
        if teacher is not None:
            taught = float(sample_macs(self.sized(teacher), captions))
            if teacher.is_language_model:
                logits = self.distill is not None
                taught += 3.0 * head_macs(self.sized(self.spec)) if logits else -float(head_macs(self.sized(teacher)))
        return {
            "train": 3.0 * forward,
            "teacher": taught,
            "cached_forward": float(forward) if self._is_cached else 0.0,
        }

    @property
    def taught(self) -> bool:
        """Whether the predecessor is its teacher."""
        return self.align is not None or self.distill is not None

    @property
    def teacher_tensor(self) -> int:
        """Ranks that split the teacher between them."""
        return max([1, *(section.tensor for section in (self.align, self.distill) if section is not None)])

    @property
    def teacher_share(self) -> float:
        """The share of the steps in which the teacher runs."""
        sections = [section for section in (self.align, self.distill) if section is not None and section.weight > 0]
        return max((1.0 if section.end is None else section.end for section in sections), default=0.0)

    @property
    def length(self) -> int:
        """Tokens of a training sample of a language model: as the recipe says, else as many as it has positions."""
        return self.settings.data.length or self.spec.towers["text"].tokens

    def sized(self, spec: ModelSpec) -> ModelSpec:
        """This member's model, or its teacher's, as it runs on the samples: what costs are counted of."""
        return at_length(spec, self.length) if spec.is_language_model else spec

    @property
    def _is_cached(self) -> bool:
        """Whether features are computed twice, see engine/cached_gradients.py."""
        parallel = self.settings.parallel
        coupled = couples_rows(self.spec, self.align is not None and self.align.clamp)
        return coupled and (parallel.micro_batches > 1 or parallel.pipeline > 1)


def couples_rows(spec: ModelSpec, clamp: bool) -> bool:
    """Whether the loss is one of all rows together: the contrast of two towers is, and so is a term that is clamped to
    another one. A language model's loss is one of tokens: where it is clamped, its batch is not cut."""
    return not spec.is_language_model and (clamp or len(spec.towers) == 2)


def _moved(source: Any) -> Any:
    """A source of data, whatever folder it lies in."""
    if isinstance(source, dict):
        return {**source, "path": _moved(source["path"])}
    return Path(source).name if is_local(source) else source


def link_members(recipe: Recipe, beside: Path | None) -> list[Member]:
    """The links of a recipe, in order. Raises UserError for a model config that cannot be found or read."""
    members: list[Member] = []
    for index, link in enumerate(recipe.links):
        spec = load_spec(link.model, beside)
        members.append(_link(link, spec, recipe.link_settings(index), members[-1].name if members else None))
    return members


def _link(link: Link, spec: ModelSpec, settings: Settings, previous: str | None) -> Member:
    parent = previous if any(one is not None for one in (link.grow, link.align, link.distill)) else None
    return Member(
        link.name, "link", spec, settings, parent, link.grow, link.align, link.distill, link.init, link.train,
        link.epochs, link.steps, None,
    )  # fmt: skip


def control_members(recipe: Recipe, links: list[Member]) -> list[Member]:
    """The controls of a recipe: the model of a link, from scratch, without a predecessor."""
    by_name = {member.name: member for member in links}
    return [
        _control(control, by_name[control.link].spec, recipe.control_settings(index))
        for index, control in enumerate(recipe.controls)
    ]


def _control(control: Control, spec: ModelSpec, settings: Settings) -> Member:
    return Member(
        control.name, "control", spec, settings, None, None, None, None, None, True,
        control.epochs, control.steps, control.compute,
    )  # fmt: skip
