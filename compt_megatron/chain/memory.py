"""An estimate of the device memory of one rank. It sizes a layout; it does not replace a first step on the machine.

Model states are counted exactly, activations by a formula that `benchmarks/memory_model.py` holds against real towers.
Left out: the CUDA context, NCCL's buffers and the allocator's fragmentation, for which `Hardware.usable` keeps room.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from compt_megatron.chain.workload import Workload, data_ranks, micro_batch_rows
from compt_megatron.recipe.sections import ParallelSettings
from compt_megatron.spec.table import ModelSpec, Tower

# DeepSpeed's defaults: elements of its reduce buckets, and of weights that ZeRO-3 keeps gathered at a time
_BUCKET, _LIVE = 500_000_000, 1_000_000_000


@dataclass(frozen=True)
class Memory:
    """Bytes on the rank that needs most. `buffers`: DeepSpeed's reduce buckets and gathered weights."""

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
    stages = {0, layout.pipeline - 1}
    return max((_stage(workload, layout, world, stage) for stage in stages), key=lambda memory: memory.total)


def _stage(workload: Workload, layout: ParallelSettings, world: int, stage: int) -> Memory:
    own, ranks, element = workload.counts.on_rank(layout, stage), data_ranks(layout, world), workload.element
    weights = own * element / (ranks if layout.zero == 3 else 1)
    gradients = own * gradient_bytes(workload, layout) / (ranks if layout.zero >= 2 else 1)
    optimizer = own * state_bytes(workload) / (ranks if layout.zero >= 1 else 1)
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
        activations=_activations(workload, layout, world, stage) + _features(workload, layout, world),
        buffers=_buffers(own * element, layout, ranks, element),
    )


def gradient_bytes(workload: Workload, layout: ParallelSettings) -> int:
    """Bytes of a parameter's gradient: fp32, except where DeepSpeed's stage 0 leaves it in the weight's type."""
    return workload.element if layout.engine == "deepspeed" and layout.zero == 0 else 4


def state_bytes(workload: Workload) -> int:
    """Bytes of a parameter's optimizer state: two fp32 moments, and the fp32 master of a bf16 weight."""
    return 8 if workload.precision == "fp32" else 12


def _buffers(weights: float, layout: ParallelSettings, ranks: int, element: int) -> float:
    if layout.engine == "megatron" or layout.zero == 0 or ranks == 1:
        return 0.0  # megatron-core reduces and gathers in the buffers of gradients and weights
    bucket = min(weights, _BUCKET * element)
    return bucket + (min(weights, _LIVE * element) if layout.zero == 3 else 0.0)


def _teacher(workload: Workload, layout: ParallelSettings, world: int) -> float:
    """The frozen model, whole on every rank, and the widest tensors of a block's forward pass without a graph."""
    if workload.teacher is None:
        return 0.0
    rows = micro_batch_rows(workload, layout, world) / (layout.tensor * layout.pipeline)
    block = max(
        workload.sequences(tower, rows) * tower.tokens * (2 * tower.width + 2 * tower.mlp)
        for tower in workload.teacher.towers.values()
    )
    return (workload.teacher.numel + block) * workload.element


# -- activations -----------------------------------------------------------------------------------------------------


def _activations(workload: Workload, layout: ParallelSettings, world: int, stage: int) -> float:
    """What the backward passes of the micro-batches in flight keep, and the largest buffers of one block's backward.

    In a pipeline the towers come one after another, so that only one of them has activations at a time.
    """
    rows = micro_batch_rows(workload, layout, world)
    kept, working = [], []
    for tower in workload.spec.towers.values():
        sequences = workload.sequences(tower, rows)
        block, inner = block_kept(tower, layout, workload.element)
        chunks = chunks_in_flight(layout, stage)
        layers = tower.layers / (layout.pipeline * layout.virtual)
        ends = _ends(workload.spec, tower, layout, workload.element, stage)
        kept.append(sequences * (chunks * layers * block + min(chunks, layout.micro_batches) * ends))
        gradients = 2 * tower.mlp / layout.tensor + 2 * tower.width
        working.append(sequences * (inner + tower.tokens * gradients * workload.element))
    return max(map(sum, zip(kept, working))) if layout.pipeline > 1 else sum(kept) + max(working)


def block_kept(tower: Tower, layout: ParallelSettings, element: int) -> tuple[float, float]:
    """Bytes that one block keeps of one sequence until its backward pass, and bytes that only live during it.

    Kept of each token are the block's input and the outputs of both norms and of the attention's residual sum (4
    widths), q, k and v, the attention's output, the MLP's hidden units before and after the activation; each norm's
    two statistics, and the fused attention's log-sum-exp of each head in fp32, the only thing that `selective` saves.
    (Korthikanti et al. 2022, arXiv 2205.05198, equations 1 to 5, without dropout masks and attention scores.) With
    `full` recomputation only the input is kept, and the rest comes back for one block at a time.
    """
    tokens = -(-tower.tokens // layout.tensor) if layout.sequence else tower.tokens
    stream = tokens * tower.width * element
    inside = (2 * tower.heads + 2 * tower.groups) * tower.head_dim + (3 if tower.gated else 2) * tower.mlp
    whole = 4 * stream + tower.tokens * inside * element / layout.tensor + tokens * 4 * element
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
    return kept


def _features(workload: Workload, layout: ParallelSettings, world: int) -> float:
    """The loss: features of the whole batch in fp32, and logits of this rank's rows against them.

    For each caption and direction the scores, their scaled copy's log-softmax and its gradient.
    """
    width, spec = workload.spec.joint, workload.spec
    features = workload.batch * width * (1 + workload.captions) * 4
    if "text" not in spec.towers:
        return features
    logits = (workload.batch / data_ranks(layout, world)) * workload.batch * 4
    return features + logits * (2 * 2 * workload.captions + 1)
