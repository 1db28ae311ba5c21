"""Counts what one rank hands to torch.distributed: every collective and transfer of a piece of code, with its bytes.

It listens where torch dispatches c10d's operators: it sees what torch, DeepSpeed and megatron-core really start, by
whatever name they have imported it.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

# operator of torch.ops.c10d -> what it is called here, and which argument has the whole tensor(s)
_OPERATORS = {
    "allreduce_": ("all_reduce", 0),
    "allreduce_coalesced_": ("all_reduce", 0),
    "_allgather_base_": ("all_gather", 0),
    "allgather_": ("all_gather", 0),
    "allgather_into_tensor_coalesced_": ("all_gather", 0),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "reduce_scatter_": ("reduce_scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1),
    "broadcast_": ("broadcast", 0),
    "reduce_": ("reduce", 0),
    "send": ("send", 0),
    "recv_": ("recv", 0),
}
_NO_DATA = {"barrier", "monitored_barrier_"}
# who asks, by the file it is in; the first that is found up the stack
_PURPOSES = {"compt_kernels/exchange.py": "features", "align/teacher.py": "teacher"}
_NOTES = {"all_reduce", "broadcast"}  # of these, what has no more than _NOTE bytes is a loss, a norm, a flag, a count
_NOTE = 32


@dataclass(frozen=True)
class Seen:
    """One kind of call: `whole` is the size of its tensor in bytes, all ranks' pieces together."""

    kind: str
    ranks: tuple[int, ...]
    purpose: str  # of `_PURPOSES`, or nothing
    whole: int

    @property
    def is_data(self) -> bool:
        return self.kind != "recv" and (self.kind not in _NOTES or self.whole > _NOTE)

    @property
    def sent(self) -> float:
        """Bytes that one rank sends, collectives counted as rings send them."""
        share = (len(self.ranks) - 1) / len(self.ranks)
        return self.whole * {"all_reduce": 2 * share, "all_gather": share, "reduce_scatter": share}.get(self.kind, 1)


class CommunicationTrace(TorchDispatchMode):
    """While open, `calls` counts what this thread starts. (On a CPU the backward pass runs in the thread that asks.)"""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[Seen] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func.name().partition("::")
        if namespace == "c10d" and name.split(".")[0] not in _NO_DATA:
            self._note(name.split(".")[0], args)
        return func(*args, **(kwargs or {}))

    def _note(self, name: str, args: Any) -> None:
        kind, at = _OPERATORS[name]  # an operator that is not there must be added, not overlooked
        group = next(
            dist.ProcessGroup.unbox(arg) for arg in args if isinstance(arg, torch.ScriptObject) and _is_group(arg)
        )
        ranks = tuple(dist.get_process_group_ranks(group))
        self.calls[Seen(kind, ranks, _purpose(), sum(map(_bytes, _flat(args[at]))))] += 1

    def total(self, ranks: tuple[int, ...], purpose: str = "", kinds: Sequence[str] = ()) -> tuple[float, int]:
        """Bytes that this rank sends among `ranks`, and calls, of these kinds (none: all). Left out: `_NOTES`."""
        found = [
            (seen.sent * count, count)
            for seen, count in self.calls.items()
            if seen.ranks == ranks and seen.purpose == purpose and (not kinds or seen.kind in kinds) and seen.is_data
        ]
        return sum(sent for sent, _ in found), sum(count for _, count in found)


def _is_group(value: torch.ScriptObject) -> bool:
    return str(value._type()).endswith("c10d.ProcessGroup")


def _flat(value: Any) -> list[torch.Tensor]:
    return [value] if isinstance(value, torch.Tensor) else [tensor for part in value for tensor in _flat(part)]


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _purpose() -> str:
    frame = sys._getframe(2)
    while frame is not None:
        for ending, purpose in _PURPOSES.items():
            if frame.f_code.co_filename.endswith(ending):
                return purpose
        frame = frame.f_back  # type: ignore[assignment]
    return ""
