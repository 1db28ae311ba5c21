"""Bytes that one rank sends in one training step, by formula.

Collectives are counted as rings send them: of a tensor of V bytes over n ranks, an all-gather or a reduce-scatter
sends (n - 1)/n V from every rank, an all-reduce twice that. A point-to-point transfer sends V. Counted for the rank
that sends most: a middle stage of a pipeline, the first stage's parameters.

Notation: t, p, v, d are the tensor, pipeline, virtual and data-parallel sizes, m the micro-batches, A the bytes of the
residual stream of one micro-batch of one tower (tokens x rows x width x element), L the layers of the tower, P a rank's
parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

from compt_megatron.chain.workload import Workload, data_ranks, is_cached, micro_batch_rows
from compt_megatron.recipe.parallel_section import ParallelSettings

_FP32 = 4
# DeepSpeed's defaults: elements of a weight that its stage 3 never lets go within a step (stage3_param_persistence_
# threshold), and of weights between two uses of one that it keeps meanwhile (stage3_max_reuse_distance)
_PERSISTENT, _REUSED = 100_000, 1_000_000_000


@dataclass(frozen=True)
class Traffic:
    """What one rank sends in a step for one purpose: `bytes`, in `calls` collectives or transfers, in a group of
    `ranks` ranks that are `stride` apart (it says whether they share a node)."""

    purpose: str
    group: str  # tensor, pipeline, data or model (tensor x pipeline)
    bytes: float
    calls: float
    ranks: int
    stride: int


def traffic(workload: Workload, layout: ParallelSettings, world: int) -> list[Traffic]:
    """Everything that a rank sends in one step, without what it sends nothing of."""
    parts = [
        *_tensor(workload, layout, world),
        *_pipeline(workload, layout, world),
        *_parameters(workload, layout, world),
        *_features(workload, layout, world),
        *_head(workload, layout, world),
        *_teacher(workload, layout, world),
    ]
    return [part for part in parts if part.bytes > 0]


def forwards(workload: Workload, layout: ParallelSettings) -> int:
    """Forward passes of a step: one, one more for cached feature gradients, one more for full recomputation."""
    return 1 + is_cached(workload, layout) + (layout.recompute == "full")


def ring(ranks: int) -> float:
    """Share of a tensor that an all-gather or a reduce-scatter sends from each rank."""
    return (ranks - 1) / ranks


def stream_bytes(workload: Workload, layout: ParallelSettings, world: int, tower: str, *, padded: bool = True) -> float:
    """A: the residual stream of one micro-batch, under sequence parallelism `padded` to whole tokens a rank."""
    shape = workload.spec.towers[tower]
    tokens = -(-shape.tokens // layout.tensor) * layout.tensor if layout.sequence and padded else shape.tokens
    rows = workload.sequences(shape, micro_batch_rows(workload, layout, world))
    return tokens * rows * shape.width * workload.element


def _tensor(workload: Workload, layout: ParallelSettings, world: int) -> Iterator[Traffic]:
    """Tensor parallel (Shoeybi et al. 2019, arXiv 1909.08053): in each block attention and MLP all-reduce their output
    in the forward pass and the gradient of their input in the backward pass: 2 A each, L/p blocks, m micro-batches.

    Sequence parallel sends the same as all-gather + reduce-scatter, and gathers the inputs of both once more for the
    gradient of the weights. It gathers the tokens behind the last block in every forward pass, and the gradient before
    the first in the backward pass. The vocabulary-parallel embedding all-reduces its output in every forward pass. Each
    norm and each bias behind a row-parallel product all-reduces its gradient after every micro-batch under sequence
    parallelism.

    Of a language model the last stage of a pipeline sends most, whose head sends more than the embedding (see `_head`).
    """
    language = workload.spec.is_language_model
    size, m = layout.tensor, layout.micro_batches
    if size == 1:
        return
    for name, tower in workload.spec.towers.items():
        blocks = tower.layers / layout.pipeline
        whole = stream_bytes(workload, layout, world, name)
        passes = forwards(workload, layout) + 1
        calls = 2 * blocks * m * passes
        sent = calls * 2 * ring(size) * whole
        if layout.sequence:
            calls, again = 2 * calls, 2 * blocks * m
            sent, calls = sent + again * ring(size) * whole, calls + again
        yield Traffic(f"{name} blocks", "tensor", sent, calls, size, 1)
        ends = m * (1 + is_cached(workload, layout))
        if name == "text" and not (language and layout.pipeline > 1):
            plain = stream_bytes(workload, layout, world, name, padded=False)
            yield Traffic("text embedding", "tensor", ends * 2 * ring(size) * plain, ends, size, 1)
        if layout.sequence:
            if layout.pipeline == 1:
                ends += m
            elif "text" in workload.spec.towers:
                ends = m  # of the two ends, the first stage's, which has the embedding too
            yield Traffic(f"{name} ends", "tensor", ends * ring(size) * whole, ends, size, 1)
    if layout.sequence:
        unsplit = [param for param in workload.spec.params.values() if param.tower and param.tensor_dim is None]
        calls = sum(param.stage == "layer" for param in unsplit) / layout.pipeline
        elements = workload.counts.whole_on_rank(layout)
        if language:  # the final norm sees a rank's own tokens
            behind = [param.numel for param in unsplit if param.stage == "post"]
            calls, elements = calls + len(behind), elements + sum(behind)
        sent = m * 2 * ring(size) * elements * workload.element
        yield Traffic("gradients of norms", "tensor", sent, m * calls, size, 1)


def _pipeline(workload: Workload, layout: ParallelSettings, world: int) -> Iterator[Traffic]:
    """Pipeline: each chunk of layers sends A onward in every forward pass and its gradient back: v m times each. Of two
    stages none is in the middle: the first has a chunk whose gradient ends with it. Under sequence parallelism a rank
    sends its tokens only, A/t.

    Of a language model's tied head the first and the last stage all-reduce the gradient, in fp32, once a step; counted
    where they then send more than a stage in the middle.
    """
    if layout.pipeline == 1:
        return
    tied = 2 * ring(2) * workload.counts.vocabulary_on_rank(layout) * _FP32 if workload.counts.tied else 0.0
    for name in workload.spec.towers:
        whole = stream_bytes(workload, layout, world, name) / (layout.tensor if layout.sequence else 1)
        calls = layout.virtual * layout.micro_batches * (1 + is_cached(workload, layout) + 1)
        at_the_end = layout.pipeline == 2 or tied > layout.micro_batches * whole
        calls -= layout.micro_batches if at_the_end else 0
        stride = layout.tensor * data_ranks(layout, world)  # pipeline stages are the outermost ranks
        yield Traffic(f"{name} stages", "pipeline", calls * whole, calls, layout.pipeline, stride)
        if at_the_end:
            yield Traffic("tied head", "pipeline", tied, 1, 2, stride * (layout.pipeline - 1))


def _parameters(workload: Workload, layout: ParallelSettings, world: int) -> Iterator[Traffic]:
    """Data parallel (Rajbhandari et al. 2020, arXiv 1910.02054, section 7), e bytes a weight, g a gradient: 4 under
    megatron, which reduces in fp32, e under DeepSpeed.

    Stage 0: all-reduce of P g. Stage 1: reduce-scatter of P g and all-gather of P e. DeepSpeed's stages 1 and 2
    all-reduce their buckets and keep a part, stage 2 after every micro-batch. Stage 3: see `_gathered`; gradients are
    reduce-scattered after every micro-batch. Calls are counted as one for each block.
    """
    ranks, m = data_ranks(layout, world), layout.micro_batches
    if ranks == 1:
        return
    own = workload.counts.on_rank(layout, 0)
    gradients = own * (_FP32 if layout.engine == "megatron" else workload.element) * ring(ranks)
    weights = own * workload.element * ring(ranks)
    calls = sum(tower.layers for tower in workload.spec.towers.values()) / layout.pipeline
    reductions = m if layout.zero >= 2 else 1
    both_ways = 1 if layout.zero == (1 if layout.engine == "megatron" else 3) else 2
    sent = reductions * both_ways * gradients
    yield Traffic("gradients", "data", sent, reductions * calls, ranks, layout.tensor)
    if layout.zero:
        gathers = _gathered(workload, layout) if layout.zero == 3 else 1
        yield Traffic("weights", "data", gathers * weights, gathers * calls, ranks, layout.tensor)


def _gathered(workload: Workload, layout: ParallelSettings) -> float:
    """How often DeepSpeed's stage 3 gathers a weight in a step, the mean over all.

    Weights of at most 100,000 elements once, and kept. With cached gradients the others for every forward pass of every
    micro-batch and for its backward pass (full recomputation needs no gathering of its own). Otherwise the forward pass
    of a micro-batch leaves those that its backward pass needs within a thousand million elements of weights, and the
    rest is gathered again.
    """
    sizes = [split // layout.tensor + unsplit for split, unsplit in workload.module_sizes]
    whole, kept = sum(sizes), sum(size for size in sizes if size <= _PERSISTENT)
    if is_cached(workload, layout):
        return (kept + (whole - kept) * layout.micro_batches * (2 + is_cached(workload, layout))) / whole
    again = max(0.0, 1 - _REUSED / (2 * whole))
    return (kept + (whole - kept) * layout.micro_batches * (1 + again)) / whole


def _features(workload: Workload, layout: ParallelSettings, world: int) -> Iterator[Traffic]:
    """The contrastive loss, for each caption of an image: all-gather of the features of images and texts in fp32,
    reduce-scatter of their gradients. (The CUDA kernels gather the texts alone.)"""
    ranks, slots = data_ranks(layout, world), workload.captions
    if ranks == 1 or "text" not in workload.spec.towers or workload.spec.is_language_model:
        return
    whole = workload.batch * 2 * slots * workload.spec.joint * _FP32
    yield Traffic("features", "data", 2 * ring(ranks) * whole, 4 * slots, ranks, layout.tensor)


def _head(workload: Workload, layout: ParallelSettings, world: int) -> Iterator[Traffic]:
    """A language model's head. Tensor-parallel ranks, which have a part of the vocabulary each, all-reduce the gradient
    of the states of every micro-batch, and for each chunk of tokens the largest logit, and the sum of exponentials with
    the target's logit, in fp32."""
    if not workload.spec.is_language_model or layout.tensor == 1:
        return
    tower = workload.spec.towers["text"]
    tokens = micro_batch_rows(workload, layout, world) * tower.tokens
    sent = tokens * (tower.width * workload.element + 3 * _FP32)
    calls = layout.micro_batches * (1 + 2 * ceil(tokens / workload.chunk))
    yield Traffic("head", "tensor", layout.micro_batches * 2 * ring(layout.tensor) * sent, calls, layout.tensor, 1)


def _teacher(workload: Workload, layout: ParallelSettings, world: int) -> Iterator[Traffic]:
    """The ranks of a model-parallel group run the teacher on their share of the rows and all-gather its features."""
    ranks = layout.tensor * layout.pipeline
    if workload.teacher is None or ranks == 1:
        return
    rows = workload.batch / data_ranks(layout, world)
    towers = len(workload.teacher.towers.keys() & workload.spec.towers.keys())
    features, width = 1 + workload.captions if towers == 2 else 1, workload.teacher.joint
    if workload.teacher.is_language_model:  # its states of every token
        features = workload.teacher.towers["text"].tokens * workload.states
        width = workload.teacher.towers["text"].width
    sent = ring(ranks) * rows * features * width * workload.element * workload.teacher_share
    stride = data_ranks(layout, world) if layout.pipeline > 1 else 1
    yield Traffic("teacher's features", "model", sent, towers * layout.micro_batches, ranks, stride)
