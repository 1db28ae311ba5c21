"""Next-token prediction: cross entropy over a vocabulary that tensor-parallel ranks share out, a chunk of tokens at a
time, so that the logits of all tokens never exist at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from compt_megatron.errors import UserError
from compt_megatron.numerics import full_precision, math_dtype
from compt_megatron.objectives.base import ObjectiveResult
from compt_megatron.share import total
from compt_megatron.vocabulary import Head


class TokenBatch(Protocol):
    """The part of a batch of texts that this reads.

    targets [b, n] int64: what follows each token; mask [b, n], which targets count (false: padding, the first token of
    another document), None: all. Where it is false a target may be any number.
    """

    @property
    def targets(self) -> Tensor: ...

    @property
    def mask(self) -> Tensor | None: ...


class CausalLmObjective:
    """Mean cross entropy per token over those of the global batch that count, in nats.

    `z_loss` times the mean of log² Z, Z the sum of exponentiated logits, is added (PaLM, arXiv 2204.02311, section 5:
    1e-4; 0: none). `chunk`: tokens whose logits exist at once; they take chunk x vocabulary / ranks x 12 bytes or so.
    """

    name = "causal_lm"
    couples_rows = False

    def __init__(self, z_loss: float = 0.0, chunk: int = 1024) -> None:
        if not 0.0 <= z_loss < 1.0:
            raise UserError(f"objective.z_loss is {z_loss}; use a number from 0 to below 1 (PaLM's is 1e-4)")
        if chunk < 1:
            raise UserError(f"objective.chunk is {chunk}; use a number of tokens from 1")
        self.z_loss, self.chunk = z_loss, chunk

    def divisor(self, batch: Any, group: dist.ProcessGroup | None = None) -> Tensor:
        """How many tokens of the global batch count: fp32, 0-D, at least 1. batch: this rank's TokenBatch. Collective
        over `group`, the data-parallel ranks."""
        targets, mask = batch.targets, batch.mask
        counted = torch.tensor(float(targets.numel())) if mask is None else mask.sum()
        return total(counted.to(targets.device, torch.float32), group).clamp_min(1.0)

    def __call__(
        self,
        outputs: Mapping[str, Any],
        batch: Any,
        group: dist.ProcessGroup | None = None,
        divisor: Tensor | float | None = None,
    ) -> ObjectiveResult:
        """This rank's share. outputs: `hidden` [b, n, width] and `head`, a Head; batch: a TokenBatch.

        `divisor`: that of the global batch, where `batch` is a part of this rank's. `group`: the data-parallel ranks.
        Parts: causal_lm, and z_loss if there is one.
        """
        hidden, head = outputs["hidden"], outputs["head"]
        if divisor is None:
            divisor = self.divisor(batch, group)
        weights = torch.ones_like(batch.targets) if batch.mask is None else batch.mask
        found = chunked_cross_entropy(
            hidden.flatten(0, -2), head, batch.targets.flatten(), weights.flatten(), self.z_loss, self.chunk
        )
        parts = {"causal_lm": found.entropy, **({"z_loss": found.z} if self.z_loss else {})}
        return ObjectiveResult(found.loss / divisor, {name: part / divisor for name, part in parts.items()})


class CrossEntropy(NamedTuple):
    """0-D, summed over rows: the loss, with graph, and what it is the sum of, detached: entropy and z-loss."""

    loss: Tensor
    entropy: Tensor
    z: Tensor


def chunked_cross_entropy(
    hidden: Tensor, head: Head, targets: Tensor, weights: Tensor, z_loss: float = 0.0, chunk: int = 1024
) -> CrossEntropy:
    """Sums over rows of weight x (log Z - logit of the target + z_loss x log² Z).

    hidden [rows, width], targets [rows] int64 and weights [rows] (any dtype, no gradient) are alike on all ranks of
    `head.group`, and so is hidden's gradient. Products are in hidden's dtype, what follows in fp32 (fp64 for fp64).
    Gradients are made in the forward pass, while a chunk's logits are there: backward only scales them.
    """
    with full_precision(hidden.device):
        wanted = torch.is_grad_enabled()
        return CrossEntropy(
            *_ChunkedCrossEntropy.apply(hidden, head.weight, head, targets, weights, z_loss, chunk, wanted)
        )


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        head: Head,
        targets: Tensor,
        weights: Tensor,
        z_loss: float,
        chunk: int,
        wanted: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = math_dtype(hidden, weight)
        matrix = weight[: head.rows]
        entropy, z = (torch.zeros((), dtype=dtype, device=hidden.device) for _ in range(2))
        to_hidden = torch.empty_like(hidden) if wanted and ctx.needs_input_grad[0] else None
        # summed over chunks, so not in bf16
        to_weight = torch.zeros_like(weight, dtype=dtype) if wanted and ctx.needs_input_grad[1] else None
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            counts = weights[rows].to(dtype)
            found = _exponentiate((hidden[rows] @ matrix.t()).to(dtype), targets[rows] - head.first, head)
            log_z = found.log_z
            entropy += (counts * (log_z - found.target)).sum()
            z += (counts * z_loss * log_z.square()).sum()
            if to_hidden is None and to_weight is None:
                continue
            slope = found.exponentials  # over their sum: the softmax
            slope *= (counts * (1 + 2 * z_loss * log_z) / found.sums)[:, None]
            slope.scatter_add_(1, found.column[:, None], -(counts * found.here)[:, None])
            slope = slope.to(hidden.dtype)
            if to_hidden is not None:
                to_hidden[rows] = slope @ matrix
            if to_weight is not None:
                to_weight[: head.rows] += slope.t() @ hidden[rows]
        if to_hidden is not None and head.group is not None:
            dist.all_reduce(to_hidden, group=head.group)
        ctx.save_for_backward(to_hidden, to_weight)
        ctx.dtype = weight.dtype
        ctx.mark_non_differentiable(entropy, z)
        return entropy + z, entropy, z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        to_hidden, to_weight = ctx.saved_tensors
        return (
            None if to_hidden is None else (to_hidden * slope).to(to_hidden.dtype),
            None if to_weight is None else (to_weight * slope).to(ctx.dtype),
            *(None,) * 6,
        )


class _Exponentials(NamedTuple):
    """Of rows of logits, `exponentials` [rows, this rank's entries] is exp(logit - the row's largest).

    `sums` of them, log Z and the target's logit, [rows] each, are over the vocabulary of all ranks. `column`: of this
    rank's logits the target's, and `here` 1.0, where it has that (else column 0, and 0.0).
    """

    exponentials: Tensor
    sums: Tensor
    log_z: Tensor
    target: Tensor
    column: Tensor
    here: Tensor


def _exponentiate(logits: Tensor, targets: Tensor, head: Head) -> _Exponentials:
    """In place of `logits`. targets [rows] count from this rank's first entry."""
    inside = (targets >= 0) & (targets < head.rows)
    column, here = torch.where(inside, targets, 0), inside.to(logits.dtype)
    target = logits.gather(1, column[:, None])[:, 0] * here
    top = logits.amax(dim=1)
    if head.group is not None:
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=head.group)
    sums = logits.sub_(top[:, None]).exp_().sum(dim=1)
    if head.group is not None:
        both = torch.stack([sums, target])
        dist.all_reduce(both, group=head.group)
        sums, target = both.unbind()
    return _Exponentials(logits, sums, sums.log() + top, target, column, here)
