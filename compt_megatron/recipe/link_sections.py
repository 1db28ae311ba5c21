"""What a link has from the one before it: its first weights, and a teacher."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field

from compt_megatron.recipe.section import Natural, Positive, PositiveNumber, Rate, Section

AlignedTower = Literal["image", "text"]
WeightSchedule = Literal["constant", "cosine", "linear"]
End = Annotated[float, Field(gt=0, le=1)]


class GrowSettings(Section):
    """How a link's initial weights are made from the previous link's."""

    operator: Literal["exact", "corner", "reference"] = Field(
        default="exact",
        description="`exact`: the same function; `corner`: the paper's text; `reference`: the published code.",
    )
    depth: Literal["identity", "interleave", "stack", "middle"] | None = Field(
        default=None, description="Where new layers come from; null: the operator's default."
    )
    axes: dict[str, str] = Field(default_factory=dict, description="Mode of single axes, such as `mlp: append`.")
    allow_approximate: bool = Field(default=False, description="Record what cannot be exact instead of refusing.")
    moments: Literal["fresh", "grow"] = Field(
        default="fresh",
        description="The optimizer's state: anew (with warm-up), or grown from the previous link's last checkpoint, as "
        "if the training went on.",
    )
    rates: Literal["alike", "grown"] = Field(
        default="alike",
        description="Learning rate and weight decay of tensors whose values growth multiplied: those of all others, or "
        "by the certificate's factors, under which their steps are the previous model's.",
    )
    new_rate: PositiveNumber = Field(
        default=1.0,
        description="Factor on the learning rate of the layers that growth added: of those made from one layer, all "
        "but the first.",
    )
    old_rate: PositiveNumber = Field(
        default=1.0, description="Factor on the learning rate of everything else: what the previous model had too."
    )


def _numbered(value: Any) -> Any:
    """Layer numbers as JSON and overrides have them, as text."""
    if not isinstance(value, dict):
        return value
    return {int(key) if isinstance(key, str) and key.isdecimal() else key: one for key, one in value.items()}


class TaughtTerm(Section):
    """A term of the loss that the frozen previous link makes."""

    schedule: WeightSchedule = Field(default="constant", description="The weight over the link.")
    end: End | None = Field(
        default=None, description="Share of the link's steps after which the weight is 0; null: the whole link."
    )


class AlignSettings(TaughtTerm):
    """How a link's features are aligned to those of the frozen previous link."""

    weight: Rate = Field(
        default=1.0,
        description="Weight on the squared distance of unit feature vectors, summed over towers (of a language model: "
        "over the states that are aligned), at any width.",
    )
    distance: Literal["mse", "cosine", "smooth_l1"] = Field(
        default="mse", description="Distance of two feature vectors."
    )
    clamp: bool = Field(
        default=False, description="Never let the alignment loss exceed the task loss (as in the paper)."
    )
    towers: Annotated[list[AlignedTower], Field(min_length=1)] = Field(
        default_factory=lambda: list(get_args(AlignedTower)), description="The towers that are aligned."
    )
    hidden: bool = Field(
        default=True, description="Language models: align the final hidden states, behind the last norm."
    )
    layers: Annotated[dict[Natural, Natural], BeforeValidator(_numbered)] = Field(
        default_factory=dict,
        description="Language models: layers whose outputs are aligned, `{student's: teacher's}`, counted from 0.",
    )
    tensor: Positive = Field(
        default=1,
        description="Ranks that split the teacher between them, for one that a rank cannot hold; must divide tensor x "
        "pipeline, the ranks of one copy of the student, which share out its rows.",
    )


class DistillSettings(TaughtTerm):
    """How a language model's predictions are drawn to those of the frozen previous link: the divergence of the
    teacher's distribution over the vocabulary from the student's, at each token."""

    weight: Rate = Field(
        default=1.0,
        description="Weight on temperature² times KL(teacher || student), the mean over tokens in nats; the task loss "
        "keeps weight 1.",
    )
    temperature: PositiveNumber = Field(default=1.0, description="What both models' logits are divided by.")
    top_k: Positive | None = Field(
        default=None,
        description="Cut the teacher's distribution to its largest logits and scale it to sum to 1; null: all of it.",
    )
    tensor: Positive = Field(default=1, description="As `align.tensor`, with which it must agree where both are given.")
