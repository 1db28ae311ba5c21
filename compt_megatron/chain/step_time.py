"""How long one training step should take on a machine: a sum of a few terms, none of them fitted.

    compute        2 FLOPs a MAC: the forward passes and the backward pass (2 forwards) of a rank's share, at the
                   sustained share of the peak, less for few tokens, and no block faster than its kernels are launched
                   (twice as slow under ZeRO-3, whose hooks run at every module)
    bubble         (pipeline - 1) / (virtual x micro_batches) of what goes through the pipeline, for each tower alike;
                   a language model's head is the last stage's alone, for which the others wait
    communication  bytes over bandwidth and latency of every call, nothing of it hidden behind compute, except
                   the gathering of weights under ZeRO-3, which DeepSpeed starts ahead of the layers
    teacher        its forward pass, shared out over all ranks

(Narayanan et al. 2021, arXiv 2104.04473, section 2.2 for the bubble.) The optimizer's own arithmetic is left out.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from compt_megatron.chain.communication import forwards, traffic
from compt_megatron.chain.hardware import Hardware
from compt_megatron.chain.workload import Workload, data_ranks, micro_batch_rows
from compt_megatron.recipe.parallel_section import ParallelSettings

_BACKWARD = 2  # in forward passes


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step by what they go to, and `useful`: those of its own MACs alone at the peak, `world` ranks
    together."""

    compute: float
    recompute: float
    teacher: float
    bubble: float
    tensor: float
    pipeline: float
    data: float
    useful: float

    @property
    def total(self) -> float:
        return sum(asdict(self).values()) - self.useful

    @property
    def mfu(self) -> float:
        """Share of the peak that the step's own MACs reach: one forward, one backward, the teacher; no second ones."""
        return self.useful / self.total

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with the derived figures."""
        return asdict(self) | {"total": self.total, "mfu": self.mfu}


def step_time(workload: Workload, layout: ParallelSettings, world: int, hardware: Hardware) -> StepTime:
    """The prediction for a layout that fits the model and `world` ranks."""
    rows = micro_batch_rows(workload, layout, world)
    forward, head = 0.0, 0.0  # seconds of a forward pass of a rank's blocks, and of the last stage's head, all told
    for name, tower in workload.spec.towers.items():
        rate = hardware.rate(workload.precision, workload.sequences(tower, rows) * tower.tokens) * layout.tensor
        product = 2 * (workload.macs[name] - workload.head_macs) * rows / (rate * layout.pipeline)
        launch = hardware.launch * tower.layers / layout.pipeline * (2 if layout.zero == 3 else 1)
        forward += max(product, launch) * layout.micro_batches
        head += 2 * workload.head_macs * rows / rate * layout.micro_batches
    own = (forward + head) * (1 + _BACKWARD)
    again = forward * (forwards(workload, layout) - 1) + _core_attention(workload, layout, world, hardware)
    teacher = workload.teacher_macs * workload.teacher_share * workload.batch / world
    teacher *= 2 / (hardware.peak(workload.precision) * hardware.sustained)
    sent = {"tensor": 0.0, "pipeline": 0.0, "data": 0.0, "model": 0.0}
    hidden = 0.0
    for part in traffic(workload, layout, world):
        seconds = part.bytes / hardware.bandwidth(part.ranks, part.stride) + part.calls * hardware.latency
        if layout.zero == 3 and part.purpose == "weights":
            hidden += seconds
        else:
            sent[part.group] += seconds
    sent["data"] += max(0.0, hidden - own - again)
    useful = sum(workload.macs.values()) * (1 + _BACKWARD) + workload.teacher_macs * workload.teacher_share
    piped = own + again + sent["tensor"] + sent["pipeline"]
    return StepTime(
        compute=own,
        recompute=again,
        teacher=teacher,
        bubble=piped * (layout.pipeline - 1) / (layout.virtual * layout.micro_batches),
        tensor=sent["tensor"] + sent["model"],
        pipeline=sent["pipeline"],
        data=sent["data"],
        useful=useful * workload.batch * 2 / (hardware.peak(workload.precision) * world),
    )


def _core_attention(workload: Workload, layout: ParallelSettings, world: int, hardware: Hardware) -> float:
    """Seconds of the core attention that `selective` recomputes."""
    if layout.recompute != "selective":
        return 0.0
    rows = workload.batch / data_ranks(layout, world)
    macs = sum(
        workload.sequences(tower, rows) * tower.layers * 2 * tower.tokens**2 * tower.heads * tower.head_dim
        for tower in workload.spec.towers.values()
    )
    return 2 * macs / (hardware.peak(workload.precision) * hardware.sustained * layout.tensor * layout.pipeline)
