"""An estimate of the device memory of one rank. It sizes a layout; it does not replace a first step on the machine.

Model states are counted exactly, activations by a formula that `benchmarks/memory_model.py` holds against real towers.
Left out: the CUDA context, NCCL's buffers and the allocator's fragmentation, for which `Hardware.usable` keeps room.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from compt_megatron.chain.workload import Workload, data_ranks, is_cached, micro_batch_rows
from compt_megatron.recipe.parallel_section import ParallelSettings
from compt_megatron.spec.table import ModelSpec, Tower

# DeepSpeed's defaults: elements of its reduce bucket, which has that size however small the model is, and of weights
# that ZeRO-3 keeps gathered at a time
_BUCKET, _LIVE = 500_000_000, 1_000_000_000


@dataclass(frozen=True)
class Memory:
    """Bytes on the rank that needs most. `buffers`: DeepSpeed's reduce bucket and gathered weights."""

    weights: float
    gradients: float
    optimizer: float
    teacher: float
    activations: float
    buffers: float

    @property
    def total(self) -> float:
        return sum(asdict(self).values())


def estimate(workload: Workload, layout: ParallelSettings, world: int) -> Memory:
    """The estimate for the rank that needs most, one of the first or of the last pipeline stage."""
    layout = layout.as_run(data_ranks(layout, world), workload.precision)
    stages = {0, layout.pipeline - 1}
    return max((_stage(workload, layout, world, stage) for stage in stages), key=lambda memory: memory.total)


def _stage(workload: Workload, layout: ParallelSettings, world: int, stage: int) -> Memory:
    own, ranks, element = workload.counts.on_rank(layout, stage), data_ranks(layout, world), workload.element
    weights = own * element / (ranks if layout.zero == 3 else 1)
    gradients = own * gradient_bytes(workload, layout) / (ranks if layout.zero >= 2 else 1)
    optimizer = own * state_bytes(workload, layout) / (ranks if layout.zero >= 1 else 1)
    if layout.offload != "none":
        optimizer = 0.0
        gradients = 0.0 if layout.zero >= 2 else gradients
    if layout.offload == "parameters":
        weights = 0.0
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        teacher=_teacher(workload, layout, world),
        activations=_activations(workload, layout, world, stage),
        buffers=bucket_bytes(workload, layout) + (min(own, _LIVE) * element if layout.zero == 3 else 0.0),
    )


def gradient_bytes(workload: Workload, layout: ParallelSettings) -> int:
    """Bytes that a parameter's gradient takes: fp32. Under DeepSpeed in bf16, stage 0 has no fp32 sum, stage 1 the
    backward pass's own gradient beside it; stages 2 and 3 hold what is reduced twice when the update begins."""
    if layout.engine == "megatron":
        return 4
    return {"fp32": (4, 4, 8, 8), "bf16": (2, 6, 4, 8)}[workload.precision][layout.zero]


def state_bytes(workload: Workload, layout: ParallelSettings) -> int:
    """Bytes of a parameter's optimizer state: two fp32 moments, and the fp32 master of a bf16 weight (which DeepSpeed's
    ZeRO makes of an fp32 weight too)."""
    master = workload.precision == "bf16" or (layout.engine == "deepspeed" and layout.zero > 0)
    return 12 if master else 8


def bucket_bytes(workload: Workload, layout: ParallelSettings) -> int:
    """Bytes of DeepSpeed's reduce bucket. megatron-core reduces and gathers in the buffers of gradients and weights,
    and stage 1 in bf16 in its fp32 sums."""
    if layout.engine == "megatron" or layout.zero == 0 or (layout.zero == 1 and workload.precision == "bf16"):
        return 0
    return _BUCKET * workload.element


def _teacher(workload: Workload, layout: ParallelSettings, world: int) -> float:
    """The frozen model, whole on every rank or split over `align.tensor` of them, and the widest tensors of a block's
    forward pass without a graph, of the rows that a rank (or those that split it, together) runs."""
    if workload.teacher is None or workload.teacher_counts is None:
        return 0.0
    split = workload.teacher_ranks
    rows = micro_batch_rows(workload, layout, world) / (layout.tensor * layout.pipeline) * split
    block = max(
        workload.sequences(tower, rows) * tower.tokens * (2 * tower.width + _units(tower) * tower.mlp / split)
        for tower in workload.teacher.towers.values()
    )
    own = workload.teacher_counts.on_rank(ParallelSettings(tensor=split), 0)
    states = 0.0  # a language model's are kept over all micro-batches of a step
    if workload.teacher.is_language_model:
        tower = workload.teacher.towers["text"]
        states = workload.batch / data_ranks(layout, world) * tower.tokens * tower.width * workload.states
    return (own + block + states) * workload.element


def _units(tower: Tower) -> int:
    """How many tensors as wide as the MLP one block has: input and output of the activation; of a gated one the gate,
    its activation, the other half twice (megatron-core adds 0 to it), and their product."""
    return 5 if tower.gated else 2


# -- activations -----------------------------------------------------------------------------------------------------


def _activations(workload: Workload, layout: ParallelSettings, world: int, stage: int) -> float:
    """What the backward passes of the micro-batches in flight keep, the largest buffers of one block's backward, and
    the loss with its gradient (half as much again), which the last stage has.

    In a pipeline the towers come one after another, so that only one of them has activations at a time. With cached
    gradients the loss is done before any activation is kept; a language model's is done, on top of them, before the
    backward pass of a block begins.
    """
    rows = micro_batch_rows(workload, layout, world)
    kept, working = [], []
    for tower in workload.spec.towers.values():
        sequences = workload.sequences(tower, rows)
        _, inner = block_kept(tower, layout, workload.element)
        gradients = 2 * tower.mlp / layout.tensor + 2 * tower.width
        kept.append(sequences * _tower_kept(workload, tower, layout, stage))
        working.append(sequences * (inner + tower.tokens * gradients * workload.element))
    if workload.spec.is_language_model:
        return kept[0] + max(working[0], _token_loss(workload, layout, rows) if stage == layout.pipeline - 1 else 0.0)
    towers = max(map(sum, zip(kept, working))) if layout.pipeline > 1 else sum(kept) + max(working)
    loss = 1.5 * loss_kept(workload, layout, world) if stage == layout.pipeline - 1 else 0.0
    return max(towers, loss) if is_cached(workload, layout) else towers + loss


def kept_activations(workload: Workload, layout: ParallelSettings, world: int) -> float:
    """Bytes that autograd keeps between the forward and the backward pass of a micro-batch of an unsplit pipeline,
    and of the loss: what can be measured."""
    rows = micro_batch_rows(workload, layout, world)
    towers = workload.spec.towers.values()
    kept = sum(workload.sequences(tower, rows) * _tower_kept(workload, tower, layout, 0) for tower in towers)
    return kept + loss_kept(workload, layout, world)


def _tower_kept(workload: Workload, tower: Tower, layout: ParallelSettings, stage: int) -> float:
    """Bytes kept for each sequence of a micro-batch, by all micro-batches in flight together."""
    block, _ = block_kept(tower, layout, workload.element)
    chunks = chunks_in_flight(layout, stage)
    layers = tower.layers / (layout.pipeline * layout.virtual)
    ends = _ends(workload.spec, tower, layout, workload.element, stage)
    return chunks * layers * block + min(chunks, layout.micro_batches) * ends


def block_kept(tower: Tower, layout: ParallelSettings, element: int) -> tuple[float, float]:
    """Bytes that one block keeps of one sequence until its backward pass, and bytes that only live during it.

    Kept of each token are the block's input and the outputs of both norms and of the attention's residual sum (4
    widths), q, k and v (q and k also rotated), the attention's output, the MLP's hidden units before and after the
    activation (of a gated one five such widths, see `_units`); the statistics of each norm (LayerNorm's are two in the
    activations' type, RMSNorm's one in fp32, as CUDA's operator has it), and the fused attention's log-sum-exp of each
    head in fp32, the only thing that `selective` saves. Left out are the rotary angles, which all rows share.
    (Korthikanti et al. 2022, arXiv 2205.05198, equations 1 to 5, without dropout masks and attention scores.) With
    `full` recomputation only the input is kept, and the rest comes back for one block at a time.
    """
    tokens = -(-tower.tokens // layout.tensor) if layout.sequence else tower.tokens
    stream = tokens * tower.width * element
    rotated = 0 if tower.rope is None else tower.heads + tower.groups
    inside = (2 * tower.heads + 2 * tower.groups + rotated) * tower.head_dim + _units(tower) * tower.mlp
    statistics = 2 * 4 if tower.norm == "rms" else 4 * element
    whole = 4 * stream + tower.tokens * inside * element / layout.tensor + tokens * statistics
    whole += 2 * stream if tower.layer_scale else 0
    scores = 4 * tower.tokens * tower.heads / layout.tensor
    if layout.recompute == "full":
        return stream, whole + scores - stream
    return (whole, scores) if layout.recompute == "selective" else (whole + scores, 0.0)


def chunks_in_flight(layout: ParallelSettings, stage: int) -> int:
    """Forward passes of a chunk of layers whose backward has not come yet, at their most.

    1F1B: as many micro-batches as stages from here to the last; interleaved: 2 (stages behind this one) + (virtual - 1)
    pipeline + 1 chunks (Narayanan et al. 2021, arXiv 2104.04473, and megatron-core's schedule).
    """
    behind = layout.pipeline - 1 - stage
    warm_up = behind if layout.virtual == 1 else 2 * behind + (layout.virtual - 1) * layout.pipeline
    return min(warm_up + 1, layout.micro_batches * layout.virtual)


def _ends(spec: ModelSpec, tower: Tower, layout: ParallelSettings, element: int, stage: int) -> float:
    """Bytes kept of one sequence before the first and behind the last block."""
    kept = 0.0
    stream = tower.tokens * tower.width * element
    if stage == 0 and tower.name == "vision":
        patches = (tower.tokens - 1) * spec.params["visual.conv1.weight"].numel // tower.width * element
        kept += patches + (stream + 2 * tower.tokens * element if tower.ln_pre else 0)
    elif stage == 0:
        kept += tower.tokens * 8  # the tokens, int64
    if stage == layout.pipeline - 1 and tower.pool in ("tok", "first", "last"):
        kept += stream  # the pooled token is a view of all
    if stage == layout.pipeline - 1 and tower.pool == "none":  # what the final norm normalises
        kept += stream / (layout.tensor if layout.sequence else 1)
    return kept


def loss_kept(workload: Workload, layout: ParallelSettings, world: int) -> float:
    """The contrastive loss: normalised features of the whole batch in fp32, and for each caption and direction the
    scores of this rank's rows against them and their log-softmax. A language model's: the gradients of the states and
    (in fp32) of the head, which are made in the forward pass."""
    spec, rows = workload.spec, workload.batch / data_ranks(layout, world)
    if spec.is_language_model:
        tower = spec.towers["text"]
        tokens = micro_batch_rows(workload, layout, world) * tower.tokens
        return tokens * tower.width * workload.element + workload.counts.vocabulary_on_rank(layout) * 4
    features = workload.batch * spec.joint * (1 + workload.captions) * 4
    if "text" not in spec.towers:
        return features
    return features + 2 * 2 * workload.captions * rows * workload.batch * 4


def _token_loss(workload: Workload, layout: ParallelSettings, rows: float) -> float:
    """Bytes of the loss of a micro-batch of a language model at its most: the gradients of states and head, and the
    larger of what comes beside them, one after the other: of a chunk of tokens the logits, their softmax and the next
    logits, 12 bytes an entry (twice that where the teacher's are distilled); of the head's gradient the scaled copies
    in fp32 and in the weights' type. With a teacher the states and their projection in fp32, and the gradients of
    both."""
    tower, element = workload.spec.towers["text"], workload.element
    tokens, matrix = rows * tower.tokens, workload.counts.vocabulary_on_rank(layout)
    logits = min(workload.chunk, tokens) * matrix / tower.width * 12 * (2 if workload.distilled else 1)
    beside, aligned = max(logits, matrix * (4 + element)), 0
    if workload.teacher is not None:
        aligned = 2 * 4 * (tower.width + workload.teacher.towers["text"].width) * workload.states
    return tokens * (tower.width * element + aligned) + matrix * 4 + beside
