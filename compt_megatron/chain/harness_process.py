"""lm-eval in a process of its own: training must share neither its seeds and signals nor the memory it leaves taken."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from compt_megatron.checkpoint.messages import packed, unpacked
from compt_megatron.checkpoint.workers import die_with
from compt_megatron.errors import UserError, WorkerLost

_COMMAND = "import sys; sys.path[:] = {path!r}; from compt_megatron.chain.harness_process import child; child({number})"
# what a launcher told this process: lm-eval would take itself for one of several
_LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # ours to hear; we end it


class HarnessProcess:
    """The process, seen from its starter, with which it ends. It keeps the tasks that it has loaded."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None

    def ask(self, **request: Any) -> None:
        """Send a request (see `child`), to a new process if there is none."""
        if self._process is None:
            ours, theirs = socket.socketpair()
            command = _COMMAND.format(path=sys.path, number=theirs.fileno())
            env = {name: value for name, value in os.environ.items() if name not in _LAUNCHERS}
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-c", command], pass_fds=[theirs.fileno()], env=env, stdin=subprocess.DEVNULL
                )
            self._pipe = Connection(ours.detach())
        assert self._pipe is not None
        self._pipe.send_bytes(packed(request))

    def answered(self, seconds: float) -> bool:
        """Whether there is an answer, or nobody left to give one; waits so long for it."""
        assert self._pipe is not None
        return self._pipe.poll(seconds)

    def answer(self) -> Any:
        """The results of the last request. Raises what went wrong: UserError, RuntimeError, or WorkerLost where the
        process has died."""
        assert self._pipe is not None
        assert self._process is not None
        try:
            what, value = unpacked(self._pipe.recv_bytes())
        except (EOFError, ConnectionError):
            code = self._process.wait()
            self.end()
            how = f"was killed by signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"ended ({code})"
            raise WorkerLost(f"lm-eval's process {how}; the same command goes on where it stopped") from None
        if what == "done":
            return value
        raise UserError(value) if what == "user" else RuntimeError(f"lm-eval: {value}")

    def end(self) -> None:
        """Kill it, whatever it does; all that it has taken is free afterwards."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None


def child(number: int) -> None:
    """The life of the process: answers requests on a socket until it is closed.

    A request has `settings` (of `evaluate.harness`): their tasks are loaded, with their data. With a `folder` they are
    run on that export, on `device`; if there is a `checkpoint`, the export is made of it first, with `attachments`.
    `log` gets what lm-eval says.
    """
    for stop in _STOPS:
        signal.signal(stop, signal.SIG_IGN)
    threading.Thread(target=die_with, args=(os.getppid(),), daemon=True).start()
    pipe = Connection(number)
    loaded: dict[str, Any] = {}
    while True:
        try:
            request = unpacked(pipe.recv_bytes())
        except (EOFError, ConnectionError):
            os._exit(0)
        try:
            answer = ("done", _carry_out(loaded, **request))
        except UserError as error:
            answer = ("user", str(error))
        except BaseException:
            answer = ("failed", traceback.format_exc())
        pipe.send_bytes(packed(answer))


def _carry_out(
    loaded: dict[str, Any], settings: dict[str, Any], folder: Path | None = None, checkpoint: Path | None = None,
    attachments: dict[str, Path] | None = None, device: str = "cpu", log: Path | None = None,
) -> Any:  # fmt: skip
    from compt_megatron.chain.export import export
    from compt_megatron.evaluate.harness import Tasks

    _speak_to(log)
    key = repr((settings["tasks"], settings["include"]))
    if key not in loaded:
        loaded[key] = Tasks(settings["tasks"], settings["include"])
    if folder is None:
        return None
    if checkpoint is not None:
        shutil.rmtree(folder, ignore_errors=True)
        export(checkpoint, folder, "hf", attachments=attachments)
    return loaded[key].run(folder, device, settings["limit"], settings["shots"], settings["batch_size"])


def _speak_to(log: Path | None) -> None:
    """Send stdout and stderr to a new file, or nowhere."""
    target = os.open(log or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for descriptor in (1, 2):
        os.dup2(target, descriptor)
    os.close(target)
