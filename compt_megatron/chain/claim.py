"""A run folder belongs to one job at a time, and a job that fails before its first checkpoint leaves none behind."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import socket
from pathlib import Path

from compt_megatron.chain.status import FILENAME as STATUS
from compt_megatron.errors import RunFolderTaken, UserError

LOCK = ".lock"


class RunFolder:
    """Rank 0's claim on a run folder: a record lock on RUN/.lock, which the system drops when the process ends.

    A record lock, unlike flock, is not inherited by data-loading workers that outlive a kill by some seconds, and
    works over NFS. Where the file system has no locks at all, the claim is not checked.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._new_parents: list[Path] = []  # folders made for it, inmost first
        self._is_new = False
        self._descriptor: int | None = None

    def claim(self, is_run: bool) -> None:
        """Make the folder and lock it; `is_run`: it holds a run already. Raises UserError where another process holds
        it, or it holds something else."""
        if not is_run and self.path.is_dir() and (foreign := _foreign(self.path)):
            said = ", ".join(foreign[:3])
            raise UserError(f"{self.path}: not empty ({said}) and not a run of compt; choose another --run-dir")
        new = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise UserError(f"{self.path}: a file is in the way; choose another --run-dir") from None
        self._new_parents, self._is_new = new, not is_run
        descriptor = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(descriptor, 200).decode("utf-8", "replace").strip()
            if error.errno in (errno.EAGAIN, errno.EACCES):
                os.close(descriptor)
                raise RunFolderTaken(
                    f"{self.path}: another compt is at work in it ({holder or 'process unknown'}); wait for it, stop "
                    "it, or choose another --run-dir"
                ) from None
        else:
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        self._descriptor = descriptor

    def release(self) -> None:
        """Let others have the folder."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def undo(self) -> None:
        """Remove what this job wrote into a folder that was new or empty, unless a checkpoint is there."""
        if self._descriptor is None or not self._is_new or any(self.path.glob("*/checkpoints/latest")):
            return
        for entry in self.path.iterdir():
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        self.release()
        for folder in self._new_parents:
            if any(folder.iterdir()):
                break
            folder.rmdir()


def _foreign(path: Path) -> list[str]:
    """What lies in a folder besides the leftovers of a job that failed at once."""
    return sorted(entry.name for entry in path.iterdir() if entry.name not in (LOCK, STATUS))
