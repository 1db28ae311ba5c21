"""Optimizer state, and weights, that ZeRO 3 keeps on a disk: sub-groups of parameters, one of them at a time in memory.

DeepSpeed's own access to a parameter's state reads the whole sub-group, and writes it all back, for every parameter
and every kind of state. Here a sub-group stays until another is asked for, and is written only if it has changed.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any


class DiskGroups:
    """The sub-groups of a stage 3 optimizer. Without a disk every method does nothing."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._inside: int | None = None
        self._changed = False

    def is_away(self, group: int) -> bool:
        """Whether a sub-group's optimizer state, or some of its weights, is on the disk."""
        return self._has_state(group) or self._has_weights(group)

    def _has_state(self, group: int) -> bool:
        return bool(self._optimizer._swappable_optimizer_subgroup(group))

    def _has_weights(self, group: int) -> bool:
        return self._optimizer.fp16_partitioned_groups_flat[group] is None

    def bring(self, group: int, change: bool = False) -> None:
        """Have a sub-group in memory; `change` says that it will be written to."""
        if group != self._inside:
            self.rest()
            if not self.is_away(group):
                return
            if self._has_state(group):
                self._optimizer._optimizer_states_and_gradient_swap_in(group)
            self._inside = group
        self._changed = self._changed or change

    def rest(self) -> None:
        """Put away what is in memory, as DeepSpeed expects it before a step."""
        group, changed = self._inside, self._changed
        self._inside, self._changed = None, False
        if group is None:
            return
        if changed and self._has_weights(group):
            self._optimizer._partitioned_params_swap_out(group)  # from the masters
        if self._has_state(group):
            if changed:
                self._optimizer._optimizer_states_and_gradient_swap_out(group)
            else:
                self._optimizer._release_swap_buffers(group)


def remove_files(folder: str, rank: int) -> None:
    """Remove what DeepSpeed has left of a rank under a folder for offloading."""
    for kind in ("optimizer", "float32params", "bfloat16params"):
        shutil.rmtree(Path(folder) / "zero_stage_3" / kind / f"rank{rank}", ignore_errors=True)
