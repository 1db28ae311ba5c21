"""An estimate of the device memory of one rank. It sizes a layout; it does not replace a first step on the machine."""

from __future__ import annotations

from dataclasses import dataclass

from compt_megatron.chain.member import Member
from compt_megatron.spec.table import ModelSpec

_BYTES = {"fp32": 4, "bf16": 2}
# Elements that the backward pass of a block keeps for each token and unit of width: inputs of norms, projections,
# attention and MLP (Korthikanti et al., 2022, equation 2, without the attention matrix that SDPA never stores).
_KEPT_PER_UNIT = 17


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank, estimated: model states exactly as ZeRO shards them, activations roughly."""

    weights: float
    gradients: float
    optimizer: float
    teacher: float
    activations: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.teacher + self.activations


def memory_per_rank(member: Member, teacher: ModelSpec | None, world: int) -> Memory:
    """The estimate for one rank of `world`."""
    layout, precision = member.settings.parallel, member.settings.precision
    parts = layout.tensor * layout.pipeline
    ranks = max(1, world // parts)
    own = member.spec.numel / parts
    size = _BYTES[precision]
    # Adam's two moments in fp32, and the fp32 master copy of bf16 weights
    states = own * (8 + (4 if precision == "bf16" else 0)) / (ranks if layout.zero >= 1 else 1)
    return Memory(
        weights=own * size / (ranks if layout.zero == 3 else 1),
        gradients=own * size / (ranks if layout.zero >= 2 else 1),
        optimizer=0.0 if layout.offload == "optimizer" else states,
        teacher=teacher.numel * size if teacher is not None else 0.0,
        activations=_activations(member, ranks),
    )


def _activations(member: Member, ranks: int) -> float:
    layout, data = member.settings.parallel, member.settings.data
    rows = data.batch_size / ranks / layout.micro_batches
    size = _BYTES[member.settings.precision]
    towers = 0.0
    for tower in member.spec.towers.values():
        sequences = rows * (data.captions if tower.name == "text" else 1)
        kept = 1 if layout.recompute == "full" else _KEPT_PER_UNIT / layout.tensor
        one_block = _KEPT_PER_UNIT if layout.recompute == "full" else 0
        units = sequences * tower.tokens * tower.width
        towers += units * size * (kept * tower.layers / layout.pipeline + one_block)
    gathered = data.batch_size * member.spec.joint * (1 + data.captions) * 4  # every rank sees all features, in fp32
    logits = 2 * (data.batch_size / ranks) * data.batch_size * 4 if "text" in member.spec.towers else 0
    return towers + gathered + logits
