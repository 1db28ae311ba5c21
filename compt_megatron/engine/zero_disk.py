"""Optimizer state, and weights, that ZeRO 3 keeps on a disk: sub-groups of parameters, one of them at a time in memory.

DeepSpeed's own access to a parameter's state reads the whole sub-group, and writes it all back, for every parameter
and every kind of state. Here a sub-group stays until another is asked for, and is written only if it has changed.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from contextlib import suppress
from pathlib import Path
from tempfile import mkstemp
from typing import Any, TextIO

from compt_megatron.errors import UserError

_PREFIX = "compt-"


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


class DiskFolder:
    """A folder of this process's own under the one that a recipe names for offloading: DeepSpeed's files are called
    after ranks and parameters only, and several jobs may use one disk.

    A lock beside it, which the system drops when the process ends, says that it is in use: flock's, as a record lock
    would not keep away another of the same process. What killed processes have left is removed by the next that starts
    there.
    """

    def __init__(self, root: str) -> None:
        """Raises UserError where `root` cannot be written to."""
        try:
            Path(root).mkdir(parents=True, exist_ok=True)
            for lock in Path(root).glob(f"{_PREFIX}*.lock"):
                _remove_if_left(lock)
            self._lock = _new_lock(Path(root))
            self.path = Path(self._lock.name).with_suffix("")
            self.path.mkdir()
        except OSError as error:
            raise UserError(
                f"parallel.offload_path: {root} cannot be written to ({error.strerror}); name a folder on a local disk "
                "of each node"
            ) from error

    def remove(self) -> None:
        """Remove it with all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        Path(self._lock.name).unlink(missing_ok=True)
        self._lock.close()


def _new_lock(root: Path) -> TextIO:
    while True:
        descriptor, name = mkstemp(prefix=_PREFIX, suffix=".lock", dir=root)
        os.close(descriptor)
        lock = open(name, "w")  # noqa: SIM115  it is held as long as the folder
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # another took it for one that was left, and removes it
            lock.close()
            continue
        except OSError:  # a file system without locks: nothing there is ever taken for left
            return lock
        if Path(name).exists():
            return lock
        lock.close()


def _remove_if_left(lock: Path) -> None:
    with suppress(OSError), open(lock) as held:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
        lock.unlink()
