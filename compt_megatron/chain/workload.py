"""What one training step is, in numbers: the sizes from which memory, communication and time are estimated."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from compt_megatron.chain.member import Member, couples_rows
from compt_megatron.recipe.parallel_section import ParallelSettings
from compt_megatron.recipe.section import Precision
from compt_megatron.spec.cost import forward_macs, head_macs
from compt_megatron.spec.megatron_names import megatron_place
from compt_megatron.spec.table import ModelSpec, Param, Tower

BYTES: dict[Precision, int] = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of a model by where they are: `layers` in the blocks, `first` before them, `last` behind them. Each is
    (split over tensor-parallel ranks, whole on every one).

    `vocabulary`: entries and width of a language model's token embedding, whose rows are padded to a multiple of the
    tensor-parallel ranks, as those of its head are. `tied`: the head is the embedding, of which the last stage of a
    pipeline has a copy.
    """

    layers: tuple[int, int]
    first: tuple[int, int]
    last: tuple[int, int]
    vocabulary: tuple[int, int] = (0, 0)
    tied: bool = False

    @classmethod
    def of(cls, spec: ModelSpec) -> ParameterCounts:
        found: Counter[tuple[str, bool]] = Counter()
        for param in spec.params.values():
            found[_stage(param), param.tensor_dim is not None] += param.numel

        def pair(stage: str) -> tuple[int, int]:
            return found[stage, True], found[stage, False]

        if not spec.is_language_model:
            return cls(pair("layer"), pair("pre"), pair("post"))
        entries, width = next(iter(spec.params.values())).shape
        return cls(pair("layer"), pair("pre"), pair("post"), (entries, width), spec.towers["text"].tied)

    def on_rank(self, layout: ParallelSettings, stage: int) -> float:
        """Parameters of a rank of pipeline stage `stage`: its blocks of every tower, and what the ends have."""
        own = self.layers[0] / layout.tensor + self.layers[1]
        own /= layout.pipeline
        matrix = self.vocabulary_on_rank(layout)
        padding = matrix - self.vocabulary[0] * self.vocabulary[1] / layout.tensor
        if stage == 0:
            own += self.first[0] / layout.tensor + self.first[1] + padding
        if stage == layout.pipeline - 1:
            own += self.last[0] / layout.tensor + self.last[1] + (0 if self.tied else padding)
            own += matrix if self.tied and layout.pipeline > 1 else 0
        return own

    def vocabulary_on_rank(self, layout: ParallelSettings) -> int:
        """Elements that a rank has of a language model's embedding or head, the padding with them."""
        return -(-self.vocabulary[0] // layout.tensor) * self.vocabulary[1]

    def whole_on_rank(self, layout: ParallelSettings) -> float:
        """Parameters in the blocks of a rank that every tensor-parallel rank has whole."""
        return self.layers[1] / layout.pipeline


def _stage(param: Param) -> str:
    return param.stage if param.tower else "post"  # the logit scale meets the features, behind the towers


@dataclass(frozen=True)
class Workload:
    """One training step of a model: `batch` samples over all ranks, each an image and `captions` texts, or a language
    model's sequence, of whose tokens `chunk` have logits at once.

    `teacher` is the frozen predecessor (None: not aligned), which runs in a `teacher_share` of the steps and which
    `teacher_ranks` ranks split between them. `clamp`: the alignment is compared with the task loss of the whole batch.
    Of a language model's teacher `states` are taken a token (the final one and those of chosen layers), and logits
    where it is `distilled`.
    """

    spec: ModelSpec
    teacher: ModelSpec | None
    batch: int
    captions: int
    precision: Precision
    teacher_share: float = 1.0
    teacher_ranks: int = 1
    clamp: bool = False
    chunk: int = 1024
    states: int = 1
    distilled: bool = False

    @classmethod
    def of(cls, member: Member, teacher: ModelSpec | None) -> Workload:
        """The step of a link or control that is aligned to `teacher`."""
        settings, clamp = member.settings, member.align is not None and member.align.clamp
        data, layers = settings.data, {} if member.align is None else member.align.layers
        own, theirs = member.sized(member.spec), None if teacher is None else member.sized(teacher)
        return cls(
            own, theirs, data.batch_size, data.captions, settings.precision, member.teacher_share,
            teacher_ranks=member.teacher_tensor, clamp=clamp, chunk=settings.objective.chunk,
            states=1 + len({*layers.values()}), distilled=member.distill is not None,
        )  # fmt: skip

    @property
    def couples_rows(self) -> bool:
        """Whether the loss is one of all rows together."""
        return couples_rows(self.spec, self.clamp)

    @property
    def element(self) -> int:
        """Bytes of one weight or activation."""
        return BYTES[self.precision]

    @cached_property
    def counts(self) -> ParameterCounts:
        return ParameterCounts.of(self.spec)

    @cached_property
    def module_sizes(self) -> list[tuple[int, int]]:
        """Parameters of each weight as modules hold them (queries, keys and values are one): those that tensor
        parallelism splits, and those that it does not."""
        sizes: dict[str, tuple[int, int]] = {}
        for name, param in self.spec.params.items():
            module = megatron_place(self.spec, name).module
            split, whole = sizes.get(module, (0, 0))
            sizes[module] = (split, whole + param.numel) if param.tensor_dim is None else (split + param.numel, whole)
        return list(sizes.values())

    @cached_property
    def teacher_counts(self) -> ParameterCounts | None:
        return None if self.teacher is None else ParameterCounts.of(self.teacher)

    @cached_property
    def macs(self) -> dict[str, int]:
        """MACs of one sample's forward pass, by tower."""
        return {
            name: forward_macs(self.spec, name) * (self.captions if name == "text" else 1) for name in self.spec.towers
        }

    @cached_property
    def head_macs(self) -> int:
        """Those of them that a language model's head has; the last stage of a pipeline does them all."""
        return head_macs(self.spec)

    @cached_property
    def teacher_macs(self) -> int:
        """MACs that the teacher costs for one sample, in a step in which it runs (see `Member.macs_per_sample`)."""
        if self.teacher is None:
            return 0
        if self.teacher.is_language_model:
            logits = 3 * self.head_macs if self.distilled else -head_macs(self.teacher)
            return forward_macs(self.teacher, "text") + logits
        towers = self.teacher.towers
        return sum(
            forward_macs(self.teacher, name) * (self.captions if name == "text" else 1)
            for name in towers
            if name in self.spec.towers
        )

    def sequences(self, tower: Tower, rows: float) -> float:
        """Sequences that `rows` samples are to a tower."""
        return rows * (self.captions if tower.name == "text" and self.spec.family == "clip" else 1)


def data_ranks(layout: ParallelSettings, world: int) -> int:
    """Data-parallel size."""
    return max(1, world // (layout.tensor * layout.pipeline))


def is_cached(workload: Workload, layout: ParallelSettings) -> bool:
    """Whether features are computed twice: once for the loss over the whole batch, once for the gradients."""
    return workload.couples_rows and (layout.micro_batches > 1 or layout.pipeline > 1)


def micro_batch_rows(workload: Workload, layout: ParallelSettings, world: int) -> float:
    """Samples of one micro-batch of one data-parallel rank."""
    return workload.batch / data_ranks(layout, world) / layout.micro_batches
