"""The ways in which compt stops and says why. Everything else is a bug and keeps its traceback."""

from __future__ import annotations

from collections.abc import Sequence

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_RESUMABLE = 3


class UserError(Exception):
    """The input or the usage is wrong. The message is one line: what, where, and how to mend it. Exit status 2."""


class Defects(UserError):
    """What is wrong with a checkpoint. `lines`: a line for each defect, or for the first of `count`. The message is the
    first line, with the number of the others; `compt verify` prints them all."""

    def __init__(self, lines: Sequence[str], count: int | None = None) -> None:
        self.lines, self.count = tuple(lines), len(lines) if count is None else count
        more = self.count - 1
        super().__init__(self.lines[0] + (f" (and {more} more, see compt verify)" if more else ""))


class RunFolderTaken(UserError):
    """Another job is at work in the run folder: nothing is written there, not even how this one ended."""


class WorkerLost(RuntimeError):
    """A worker process was killed. Nothing is wrong with the input, and the same command goes on. Exit status 1."""


def lines_of(error: UserError) -> list[str]:
    """One line for each thing that an error is about."""
    return list(error.lines) if isinstance(error, Defects) else [" ".join(str(error).split())]


class StopRequested(Exception):
    """A signal asked the job to stop; it wrote a checkpoint and can be started again. Exit status 3."""


class Terminated(KeyboardInterrupt):
    """SIGTERM stopped a command that the same command continues. Exit status 3."""
