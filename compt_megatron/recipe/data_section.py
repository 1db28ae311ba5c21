"""What a recipe trains and evaluates on: images with captions, or text."""

from __future__ import annotations

from typing import Annotated, Literal, Required

from pydantic import ConfigDict, Field, with_config
from typing_extensions import TypedDict

from compt_megatron.recipe.section import Fraction, Natural, Positive, PositiveNumber, Section, is_default

Pair = Annotated[list[PositiveNumber], Field(min_length=2, max_length=2)]


@with_config(ConfigDict(extra="forbid", strict=True, allow_inf_nan=False))
class Augmentation(TypedDict, total=False):
    """Fields of open_clip's `aug_cfg`; those left out keep open_clip's defaults."""

    scale: Annotated[Pair, Field(description="[least, most] share of the image's area that a crop keeps.")]
    ratio: Annotated[Pair, Field(description="[least, most] aspect ratio of a crop (with `use_timm`).")]
    color_jitter: Annotated[
        float | list[float], Field(description="Strength of colour changes: a number, or one each per component.")
    ]
    color_jitter_prob: Annotated[Fraction, Field(description="Share of images whose colours are changed.")]
    gray_scale_prob: Annotated[Fraction, Field(description="Share of images made grey.")]
    re_prob: Annotated[Fraction, Field(description="Share of images with an erased rectangle (with `use_timm`).")]
    re_count: Annotated[Positive, Field(description="Erased rectangles per such image (with `use_timm`).")]
    use_timm: Annotated[bool, Field(description="Use timm's transforms instead of torchvision's.")]


@with_config(ConfigDict(extra="forbid", strict=True, allow_inf_nan=False))
class TextData(TypedDict, total=False):
    """One text of a blend."""

    path: Required[Annotated[str, Field(description="What `train` may name.")]]
    weight: Annotated[
        float,  # that it is above 0 is said where it is read: here the message would be of the whole list
        Field(description="Its share of the samples, above 0; without any, each text's share of the tokens."),
    ]
    documents: Annotated[
        list[Fraction],
        Field(min_length=2, max_length=2, description="[from, to]: fractions of its documents, to use those alone."),
    ]


class DataSettings(Section):
    """What is trained and evaluated on. Some fields are for images and captions, some for text (`causal_lm`) only."""

    train: str | list[str | TextData] = Field(
        description="The training source: a built-in set (`emoji/train`), a folder of shards, a brace pattern "
        "(`shards/{00000..00331}.tar`), a `pipe:` command, or a list of these. Text: `stdlib/train`, a folder of "
        "`compt data text`, the prefix of an indexed dataset, or a list of these, each with a weight or none "
        "(`{path: my-text, weight: 3}`)."
    )
    eval: list[str] = Field(default_factory=list, description="Held-out sources, evaluated in this order.")
    batch_size: Positive = Field(description="Samples of a step over all ranks (the global batch).")
    captions: Positive = Field(default=1, le=1024, description="Captions of every sample that a step uses.")
    workers: Natural = Field(default=0, description="Loader processes of each rank; 0 loads in the training process.")
    streams: Positive | None = Field(
        default=None,
        description="Logical shard streams that ranks and workers share out; null: chosen from the source.",
    )
    samples: Positive | None = Field(default=None, description="Samples of one epoch; null: counted from the source.")
    shuffle_window: Positive = Field(default=2048, description="Samples of a stream among which the order is drawn.")
    skip_budget: Fraction = Field(
        default=0.001, description="Share of broken samples that may be skipped before an error."
    )
    cache: bool | None = Field(
        default=None, description="Keep decoded samples in memory; null: where the source is small."
    )
    augment: Augmentation = Field(
        default_factory=lambda: Augmentation(), description="Fields of open_clip's `aug_cfg` for training images."
    )
    caption_key: Literal["txt", "json"] | None = Field(
        default=None, description="Which member of a sample holds its captions; null: found."
    )
    caption_fields: list[str] = Field(
        default_factory=list, description="Fields of a JSON member that are captions (strings or lists); empty: found."
    )
    length: Positive | None = Field(
        default=None, description="Text: tokens of a sample; null: as many as the model has positions."
    )
    mask_document_starts: bool = Field(
        default=False, description="Text: do not count the prediction of a document's first token."
    )
    tokenizer: str | None = Field(
        default=None,
        description="Text: the tokenizer.json (or a folder with one) that the data must be made with, and the built-in "
        "text is; null: that of the data, and for the built-in text a BPE of the model's vocabulary.",
    )

    @property
    def shards(self) -> str | list[str]:
        """`train`, of images and captions."""
        return self.train if isinstance(self.train, str) else [each for each in self.train if isinstance(each, str)]

    def misfit(self, objective: str) -> str | None:
        """What of this section does not go with an objective, in words; None if all does."""
        of_text = objective == "causal_lm"
        fields = _IMAGE_FIELDS if of_text else TEXT_FIELDS
        if found := next((field for field in fields if not is_default(self, field)), None):
            return f"data.{found} does not go with objective {objective!r}; remove it"
        if not of_text and not isinstance(self.train, str) and any(not isinstance(each, str) for each in self.train):
            return f"data.train: entries with a path and a weight do not go with objective {objective!r}; name sources"
        return None


# fields of `data` that are for images with captions, and for text, only
_IMAGE_FIELDS = (
    "captions", "augment", "caption_key", "caption_fields", "streams", "cache", "shuffle_window", "skip_budget",
)  # fmt: skip
TEXT_FIELDS = ("length", "mask_document_starts", "tokenizer")
