"""How `compt` ends: exit status, one line for a user's mistake (`compt verify`: for each defect), `status.json` where a
launcher hides the status."""

from __future__ import annotations

import argparse
import errno
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from compt_megatron.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_RESUMABLE,
    EXIT_USER_ERROR,
    Defects,
    RunFolderTaken,
    StopRequested,
    Terminated,
    UserError,
    WorkerLost,
)

# what the system refuses because of what or where the user asked, not because of a bug
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT}
_REFUSED |= {errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP}
_WAIT_FOR_MAIN_S = 1.0
# what the bare install does not have: top-level module -> the extra that brings it
_EXTRA_OF = {
    **dict.fromkeys(("megatron", "deepspeed", "open_clip", "torchvision", "timm", "webdataset", "matplotlib"), "train"),
    **dict.fromkeys(("tensorboard", "psutil", "PIL"), "train"),  # PIL comes with torchvision, and with `data`
    **dict.fromkeys(("emoji", "resvg_py"), "data"),
    **dict.fromkeys(("tokenizers", "zstandard", "transformers"), "llm"),
}


def guarded(parse: Callable[[], argparse.Namespace]) -> int:
    """Parse and run a command; its exit status. Only a bug shows a traceback (a mistake does under --debug)."""
    started, args = time.time(), argparse.Namespace()
    if sys.stdout is None:  # closed by whoever started us
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - it lives as long as the process
    try:
        args = parse()
        args.command(args)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output has gone, such as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except (Exception, KeyboardInterrupt) as error:
        code, message = _judge(error)
        said = isinstance(error, KeyboardInterrupt | WorkerLost)
        if (code == EXIT_FAILED and not said) or getattr(args, "debug", False):
            traceback.print_exception(error)
        if isinstance(error, Defects) and getattr(args, "name", None) == "verify":
            message = "\n".join(" ".join(line.split()) for line in error.lines)
        _tell(args, code, message, started, said=said, record=not isinstance(error, RunFolderTaken))
        return code
    _tell(args, EXIT_DONE, "", started)
    return EXIT_DONE


def _judge(error: BaseException) -> tuple[int, str]:
    """The exit status of an error, and the line that says it."""
    line = " ".join(str(error).split())
    if isinstance(error, UserError):
        return EXIT_USER_ERROR, line
    if isinstance(error, StopRequested | Terminated):
        return EXIT_RESUMABLE, line or "stopped on request; start it again to go on"
    if isinstance(error, KeyboardInterrupt):
        return EXIT_FAILED, "interrupted"
    if isinstance(error, WorkerLost):
        return EXIT_FAILED, line
    if isinstance(error, OSError) and error.errno in _REFUSED:
        return EXIT_USER_ERROR, f"{error.filename or 'disk'}: {error.strerror}; choose a place that can be written"
    if isinstance(error, ModuleNotFoundError) and (missing := (error.name or "").partition(".")[0]) in _EXTRA_OF:
        extra = f"pip install 'compt-megatron[{_EXTRA_OF[missing]}]'"
        return EXIT_USER_ERROR, f"{missing} is not installed, which this command needs; {extra}"
    return EXIT_FAILED, f"{type(error).__name__}: {line}"


def _tell(
    args: argparse.Namespace, code: int, message: str, started: float, said: bool = False, record: bool = True
) -> None:
    """What is said on stderr, from rank 0 alone (another rank speaks if rank 0 does not end), and `status.json`."""
    given = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    rank = int(given) if given.isdecimal() else 0
    launched = "RANK" in os.environ or "SLURM_PROCID" in os.environ
    folder = _run_folder(args)
    if rank and folder is not None and code != EXIT_DONE:
        from compt_megatron.chain.status import reported_since

        if reported_since(folder, started, _WAIT_FOR_MAIN_S):
            return
    elif rank:
        return
    if code in (EXIT_USER_ERROR, EXIT_RESUMABLE) or said:
        for line in message.splitlines():
            print(line if line.startswith("compt") else f"compt: {line}", file=sys.stderr)
    if record and folder is not None and (launched or _is_run(folder)):
        from compt_megatron.chain.status import write_status

        try:
            write_status(folder, code, message)
        except OSError as error:
            print(f"compt: {folder}: no status.json ({error.strerror})", file=sys.stderr)


def _is_run(folder: Path) -> bool:
    try:
        return (folder / "chain.json").is_file()
    except OSError:  # a name too long, a folder that may not be entered
        return False


def _run_folder(args: argparse.Namespace) -> Path | None:
    """The run folder of `compt train`; None for other commands."""
    if getattr(args, "name", None) != "train" or args.print_recipe:
        return None
    folder: Path = args.run_dir or Path("runs") / Path(args.recipe).stem
    return folder
