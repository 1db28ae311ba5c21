"""The sections of a recipe that need few words: loss, optimizer, evaluation, checkpoints, reports. Data, layouts and
what a link has from the one before it have files of their own."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from compt_megatron.recipe.section import Natural, Positive, PositiveNumber, Rate, Section, is_default


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
            if field not in _OPTIONS[self.name] and not is_default(self, field):
                raise ValueError(f"{field!r} is not an option of objective {self.name!r}; remove it")
        return self


# the fields of `objective` that each has
_OPTIONS = {
    "clip": ("same_caption",),
    "siglip": ("same_caption",),
    "classify": ("label_smoothing",),
    "causal_lm": ("z_loss", "chunk"),
}


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
