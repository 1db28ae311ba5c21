"""The sections of a recipe: what each link trains on, with, and how. Every field is checked and described here."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Required, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator, with_config
from typing_extensions import TypedDict

STRICT = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())

Precision = Literal["fp32", "bf16"]
AlignedTower = Literal["image", "text"]
WeightSchedule = Literal["constant", "cosine", "linear"]
Positive = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(ge=0)]
PositiveNumber = Annotated[float, Field(gt=0)]
End = Annotated[float, Field(gt=0, le=1)]
Pair = Annotated[list[PositiveNumber], Field(min_length=2, max_length=2)]


class Section(BaseModel):
    """What all parts of a recipe share: no unknown keys, no silent conversions, no changes after loading."""

    model_config = STRICT


class ObjectiveSettings(Section):
    """The task loss. Options that the named objective does not have must be left out."""

    name: Literal["clip", "siglip", "classify", "causal_lm"] = Field(
        default="clip",
        description="The loss: softmax contrastive (CLIP), sigmoid contrastive (SigLIP), cross-entropy on labels or "
        "on each next token (language models).",
    )
    same_caption: Literal["separate", "shared"] = Field(
        default="separate",
        description="`clip` and `siglip`: whether two samples of a batch with the same caption are each other's "
        "negatives (`separate`, as open_clip) or share their positives (`shared`).",
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0, description="`classify`: the probability spread evenly over all classes."
    )
    z_loss: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0,
        description="`causal_lm`: weight on the mean of log² Z, Z the sum of exponentiated logits (PaLM's is 1e-4).",
    )
    chunk: Positive = Field(default=1024, description="`causal_lm`: tokens whose logits exist at once.")

    def options(self) -> dict[str, Any]:
        """The keyword arguments of the named objective."""
        return {field: getattr(self, field) for field in _OPTIONS[self.name]}

    @model_validator(mode="after")
    def _check(self) -> ObjectiveSettings:
        for field in dict.fromkeys(name for names in _OPTIONS.values() for name in names):
            if field not in _OPTIONS[self.name] and not _is_default(self, field):
                raise ValueError(f"{field!r} is not an option of objective {self.name!r}; remove it")
        return self


# the fields of `objective` that each has
_OPTIONS = {
    "clip": ("same_caption",),
    "siglip": ("same_caption",),
    "classify": ("label_smoothing",),
    "causal_lm": ("z_loss", "chunk"),
}


def _is_default(section: Section, field: str) -> bool:
    declared = type(section).model_fields[field]
    return bool(getattr(section, field) == declared.get_default(call_default_factory=True))


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
        PositiveNumber, Field(description="Its share of the samples; without any, each text's share of the tokens.")
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
        if found := next((field for field in fields if not _is_default(self, field)), None):
            return f"data.{found} does not go with objective {objective!r}; remove it"
        if not of_text and not isinstance(self.train, str) and any(not isinstance(each, str) for each in self.train):
            return f"data.train: entries with a path and a weight do not go with objective {objective!r}; name sources"
        return None


# fields of `data` that are for images with captions, and for text, only
_IMAGE_FIELDS = (
    "captions", "augment", "caption_key", "caption_fields", "streams", "cache", "shuffle_window", "skip_budget",
)  # fmt: skip
TEXT_FIELDS = ("length", "mask_document_starts", "tokenizer")


class OptimizerSettings(Section):
    """The optimizer and its learning-rate schedule. Weight decay applies to matrices only."""

    name: Literal["adamw", "lamb"] = Field(
        default="adamw",
        description="The optimizer: AdamW, or LAMB for very large batches (with `parallel.zero: 0`).",
    )
    implementation: Literal["auto", "torch", "apex"] = Field(
        default="auto",
        description="Whose kernels: torch's, or NVIDIA apex's (CUDA only). `auto`: apex's for `lamb` where apex is "
        "installed and does what is asked, otherwise torch's.",
    )
    lr: PositiveNumber = Field(description="Peak learning rate.")
    weight_decay: Rate = Field(default=0.1, description="Decoupled weight decay, of matrices only.")
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] = Field(
        default_factory=lambda: [0.9, 0.98], description="Decay of the two moments."
    )
    eps: PositiveNumber = Field(default=1e-6, description="Added to the root of the second moment.")
    warmup_steps: Natural = Field(default=0, description="Steps over which the rate rises linearly from 0.")
    schedule: Literal["cosine", "constant"] = Field(default="cosine", description="The rate after warm-up.")
    final_lr: Rate = Field(default=0.0, description="Rate at the last step of the cosine schedule.")
    clip_grad: PositiveNumber | None = Field(
        default=None, description="Largest global gradient norm; null: not clipped."
    )
    trust_clamp: PositiveNumber | None = Field(
        default=None,
        description="`lamb`: the largest trust ratio |weight| / |update| (10 is usual); null: not clamped, as in the "
        "code of LAMB's authors.",
    )

    @model_validator(mode="after")
    def _check(self) -> OptimizerSettings:
        if self.trust_clamp is not None and self.name != "lamb":
            raise ValueError(f"'trust_clamp' is not an option of optimizer {self.name!r}; remove it")
        if self.trust_clamp is not None and self.implementation == "apex":
            raise ValueError("'trust_clamp' is not an option of apex's LAMB; use implementation: torch or remove it")
        return self


def _recompute(value: Any) -> Any:
    """What recipes say with true and false."""
    return {True: "full", False: "none"}[value] if isinstance(value, bool) else value


class ParallelSettings(Section):
    """How one link is spread over devices: tensor x pipeline x data-parallel ranks."""

    engine: Literal["deepspeed", "megatron"] = Field(
        default="deepspeed",
        description="The training engine: `deepspeed` (tensor parallel x ZeRO 0 to 3, offload) or `megatron` (tensor x "
        "pipeline x data parallel, distributed optimizer).",
    )
    zero: Literal[0, 1, 2, 3] = Field(
        default=1,
        description="ZeRO stage: what is sharded over data-parallel ranks (1 optimizer, 2 gradients too, 3 weights "
        "too). `megatron`: 0, or 1 for its distributed optimizer.",
    )
    tensor: Positive = Field(
        default=1, description="Tensor-parallel size; must divide the heads and MLP units of every tower."
    )
    pipeline: Positive = Field(
        default=1, description="Pipeline-parallel size (`megatron`); must divide the layers of every tower."
    )
    virtual: Positive = Field(
        default=1,
        description="Chunks of layers that each pipeline stage has of every tower (interleaved schedule); "
        "`micro_batches` must then be a multiple of `pipeline`.",
    )
    sequence: bool = Field(
        default=False,
        description="Sequence parallel: what lies between the tensor-parallel parts is split over tokens.",
    )
    micro_batches: Positive = Field(default=1, description="Micro-batches that a rank's batch is cut into.")
    recompute: Annotated[Literal["none", "selective", "full"], BeforeValidator(_recompute)] = Field(
        default="none",
        description="What the backward pass computes again: nothing, the core attention of each block, or each whole "
        "block (`true` is `full`, `false` is `none`).",
    )
    layers: Literal["auto", "torch", "transformer_engine"] = Field(
        default="auto",
        description="Whose linear layers, norms and attention the blocks are made of: torch's, or NVIDIA Transformer "
        "Engine's (CUDA only, not with zero 3). `auto`: Transformer Engine's where it is installed and agrees with "
        "torch's on the device, otherwise torch's.",
    )
    offload: Literal["none", "optimizer", "parameters"] = Field(
        default="none",
        description="What `deepspeed` keeps outside the device: the optimizer's state (zero 1 to 3), or the weights "
        "too (zero 3).",
    )
    offload_path: str | None = Field(
        default=None, description="Folder on a local NVMe disk for what is offloaded (zero 3); null: CPU memory."
    )

    @model_validator(mode="after")
    def _check(self) -> ParallelSettings:
        if self.engine == "megatron":
            if self.zero > 1:
                raise ValueError(
                    f"zero {self.zero} does not go with engine 'megatron'; use zero: 1, its distributed optimizer"
                )
            if self.offload != "none":
                raise ValueError("'offload' does not go with engine 'megatron'; remove it or use engine: deepspeed")
        elif self.pipeline > 1:
            advice = "engine: megatron" + (" with zero: 1" if self.zero > 1 else "")
            raise ValueError(f"pipeline {self.pipeline} does not go with engine 'deepspeed'; use {advice}")
        if self.virtual > 1 and self.pipeline == 1:
            raise ValueError(f"virtual {self.virtual} needs a pipeline; use virtual: 1 or pipeline: 2 or more")
        if self.virtual > 1 and self.micro_batches % self.pipeline:
            raise ValueError(
                f"micro_batches {self.micro_batches} is not a multiple of pipeline {self.pipeline}, as virtual "
                f"{self.virtual} needs; use micro_batches: {-(-self.micro_batches // self.pipeline) * self.pipeline}"
            )
        if self.sequence and self.tensor == 1:
            raise ValueError("'sequence' splits tokens over tensor-parallel ranks; use tensor: 2 or more, or remove it")
        if self.layers == "transformer_engine" and self.zero == 3:
            raise ValueError("layers 'transformer_engine' does not go with zero 3; use zero: 2 or layers: auto")
        return self._check_offload()

    def _check_offload(self) -> ParallelSettings:
        if self.offload != "none" and self.zero == 0:
            raise ValueError("'offload' needs a sharded optimizer; use zero: 1 or more")
        if self.offload == "parameters" and self.zero != 3:
            raise ValueError("'offload: parameters' needs sharded weights; use zero: 3")
        if self.offload_path is not None and self.offload == "none":
            raise ValueError("'offload_path' is where something is offloaded to; set 'offload' or remove it")
        if self.offload_path is not None and self.zero != 3:
            raise ValueError("'offload_path' needs zero: 3; use that, or remove it to offload to CPU memory")
        return self

    def as_run(self, data_ranks: int, precision: str) -> ParallelSettings:
        """With the ZeRO stage that is run: one data-parallel rank has nothing to share out, so that the stages that
        cut optimizer and gradients would only copy them. DeepSpeed in bf16 keeps its stage, which sums in fp32."""
        idle = data_ranks == 1 and self.zero in (1, 2) and self.offload == "none"
        if not idle or (self.engine == "deepspeed" and precision != "fp32"):
            return self
        return self.model_copy(update={"zero": 0})


class HarnessSettings(Section):
    """Tasks of EleutherAI's lm-eval, which language models are measured by through their Hugging Face export (extra
    `eval`)."""

    tasks: Annotated[list[str], Field(min_length=1)] = Field(description="Names of tasks, groups or tags of lm-eval.")
    include: str | None = Field(default=None, description="Folder with tasks of one's own, as lm-eval's YAML files.")
    limit: Positive | None = Field(default=None, description="Documents of each task; null: all of them.")
    shots: Natural | None = Field(default=None, description="Examples in a prompt; null: as each task says.")
    batch_size: Positive = Field(default=16, description="Sequences that the model is given at once.")
    every_steps: Positive | None = Field(
        default=None,
        description="Steps between evaluations in training, each with a checkpoint; null: only when the link is "
        "trained (`at_end`).",
    )


class EvaluateSettings(Section):
    """Evaluation during and after a link."""

    every_epochs: PositiveNumber | None = Field(
        default=None, description="Evaluate this often while training; null: never."
    )
    at_end: bool = Field(default=True, description="Evaluate when the link is trained.")
    templates: Annotated[list[str], Field(min_length=1)] = Field(
        default_factory=lambda: ["{}"], description="Prompts of zero-shot classification; `{}` is the class name."
    )
    batch_size: Positive = Field(default=256, description="Images or texts of a rank's evaluation batch.")
    retrieval: bool = Field(default=True, description="Measure image-text retrieval recall too.")
    harness: HarnessSettings | None = Field(
        default=None, description="Tasks of lm-eval, for language models (`causal_lm`); null: none."
    )

    def misfit(self, objective: str) -> str | None:
        """What of this section does not go with an objective, in words; None if all does."""
        if self.harness is not None and objective != "causal_lm":
            return f"evaluate.harness does not go with objective {objective!r}; remove it"
        return None

    @model_validator(mode="after")
    def _check(self) -> EvaluateSettings:
        if self.harness is not None and self.harness.every_steps is None and not self.at_end:
            raise ValueError("'harness' would never run; give it every_steps, or use at_end: true")
        for template in self.templates:
            if "{}" not in template:
                raise ValueError(f"template {template!r} has no '{{}}' for the class name; add it")
        return self


class CheckpointSettings(Section):
    """Checkpoints of the run."""

    every_steps: Positive | None = Field(default=None, description="Steps between checkpoints; null: one per epoch.")
    keep: Positive = Field(default=2, description="How many of a link's checkpoints are kept.")


class ReportSettings(Section):
    """What is shown while training."""

    every_steps: Positive = Field(default=20, description="Steps between log lines.")
    tensorboard: bool = Field(default=True, description="Write TensorBoard scalars.")


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


class AlignSettings(Section):
    """How a link's features are aligned to those of the frozen previous link."""

    weight: Rate = Field(
        default=1.0,
        description="Weight on the squared distance of unit feature vectors, summed over towers (of a language model: "
        "over the states that are aligned), at any width.",
    )
    schedule: WeightSchedule = Field(default="constant", description="The weight over the link.")
    end: End | None = Field(
        default=None, description="Share of the link's steps after which the weight is 0; null: the whole link."
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


class DistillSettings(Section):
    """How a language model's predictions are drawn to those of the frozen previous link: the divergence of the
    teacher's distribution over the vocabulary from the student's, at each token."""

    weight: Rate = Field(
        default=1.0,
        description="Weight on temperature² times KL(teacher || student), the mean over tokens in nats; the task loss "
        "keeps weight 1.",
    )
    schedule: WeightSchedule = Field(default="constant", description="The weight over the link.")
    end: End | None = Field(
        default=None, description="Share of the link's steps after which the weight is 0; null: the whole link."
    )
    temperature: PositiveNumber = Field(default=1.0, description="What both models' logits are divided by.")
    top_k: Positive | None = Field(
        default=None,
        description="Cut the teacher's distribution to its largest logits and scale it to sum to 1; null: all of it.",
    )
    tensor: Positive = Field(default=1, description="As `align.tensor`, with which it must agree where both are given.")
