"""Starts `compt` in processes of its own, one or several ranks, so that tests can kill them and read what they said.

Ranks are forked from the server of tests/forked.py and have the environment that torchrun gives its ranks. The
launchers themselves are run as they are in test_launchers.py and test_two_nodes.py.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.forked import ENVIRONMENT, context, start_server

ROOT = Path(__file__).parents[2]


@dataclass
class Result:
    """How a job ended: exit status of each rank, and what all ranks wrote."""

    codes: list[int]
    stdout: str
    stderr: str

    @property
    def code(self) -> int:
        return max(self.codes, key=abs)


class Job:
    """A running `compt` command in `world` processes."""

    def __init__(self, arguments: Sequence[str | Path], folder: Path, world: int = 1) -> None:
        self.folder = folder
        self._files = [folder / f"{name}.{time.monotonic_ns()}" for name in ("stdout", "stderr")]
        port = free_port()
        start_server()
        self.ranks: list[Any] = []
        for rank in range(world):
            environment = dict(ENVIRONMENT)
            if world > 1:
                environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
                environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            call = ([str(argument) for argument in arguments], str(folder), *map(str, self._files), environment)
            process = context.Process(target=_compt, args=call)
            process.start()
            self.ranks.append(process)

    def wait_for(self, condition: Callable[[], bool], timeout: float = 120) -> None:
        """Wait until `condition` holds; AssertionError if the job ends before, or after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while not condition():
            over = time.monotonic() > deadline or not any(rank.is_alive() for rank in self.ranks)
            if over and not condition():
                raise AssertionError(f"it did not happen: {self.finish(0)}")
            time.sleep(0.002)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to every rank at once."""
        for rank in range(len(self.ranks)):
            self.kill_one(rank, number)

    def kill_one(self, rank: int, number: int) -> None:
        """Send a signal to one rank, if it still runs."""
        if self.ranks[rank].is_alive():
            os.kill(self.ranks[rank].pid, number)

    def finish(self, timeout: float = 120) -> Result:
        """Wait for the end; ranks still running after `timeout` seconds are killed, and it shows in their codes."""
        deadline = time.monotonic() + timeout
        for rank in self.ranks:
            rank.join(max(0.0, deadline - time.monotonic()))
        for rank in self.ranks:
            if rank.is_alive():
                rank.kill()
            rank.join()
        out, err = (path.read_text() if path.exists() else "" for path in self._files)
        return Result([rank.exitcode for rank in self.ranks], out, err)


def compt(*arguments: str | Path, folder: Path, world: int = 1) -> Result:
    """Run a command to its end in `folder`."""
    return Job(arguments, folder, world).finish()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def launcher_environment(**more: str) -> dict[str, str]:
    """The environment of a real launcher: this interpreter's programs first on PATH, the checkout importable."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, **ENVIRONMENT, "PATH": path, "PYTHONPATH": str(ROOT), **more}


def _compt(arguments: list[str], folder: str, stdout: str, stderr: str, environment: dict[str, str]) -> None:
    os.chdir(folder)
    os.environ.update(environment)
    for path, descriptor in ((stdout, 1), (stderr, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    sys.argv = ["compt", *arguments]
    from compt_megatron.cli import main

    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
