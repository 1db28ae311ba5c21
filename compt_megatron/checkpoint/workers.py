"""Several processes that make one checkpoint: started here (`together`), or by torchrun (`launched`).

All they need from each other is an all-gather of small objects. Processes started here talk to the one that started
them, over a socket each; those of torchrun to its store. A worker that dies ends the whole command: what it had
written stays in `DST.partial/`, and the same command goes on from there.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

from compt_megatron.checkpoint.contract import Exchange
from compt_megatron.checkpoint.messages import function_of, name_of, packed, unpacked
from compt_megatron.errors import UserError, WorkerLost
from compt_megatron.heap import one_heap

_POLL_S = 0.005
_CHECK_S = 0.2  # how often a worker looks whether its starter still lives
_PATIENCE = timedelta(days=7)  # of a worker of torchrun; a dead peer is torchrun's to notice
_COMMAND = "import sys; sys.path[:] = {path!r}; from compt_megatron.checkpoint.workers import _child; _child({number})"

Progress = Callable[[int, int, int], None]  # bytes that are written, bytes in all, and those from an earlier run


class Place(NamedTuple):
    """Which worker this is, and how it talks to the others."""

    rank: int = 0
    world: int = 1
    exchange: Exchange | None = None
    progress: Progress | None = None

    @property
    def shard(self) -> tuple[int, int]:
        return self.rank, self.world


# -- started by torchrun -----------------------------------------------------------------------------------------------


def launched() -> Place | None:
    """This process's place among those of torchrun or another launcher that sets its variables; None if it is alone."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1 or "RANK" not in os.environ or "MASTER_ADDR" not in os.environ:
        return None
    return Place(int(os.environ["RANK"]), world, _store_exchange(int(os.environ["RANK"]), world))


def _store_exchange(rank: int, world: int) -> Exchange:
    from torch.distributed import PrefixStore, TCPStore

    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    hosts = rank == 0 and not agent
    store = TCPStore(address, port, world, hosts, timeout=_PATIENCE)
    run = f"{os.environ.get('TORCHELASTIC_RUN_ID', '')}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    shared = PrefixStore(f"compt/{run}", store)
    count = 0

    def exchange(value: Any) -> list[Any]:
        nonlocal count
        shared.set(f"{count}/{rank}", packed(value))  # type: ignore[arg-type]  # takes bytes, too
        rows = [unpacked(shared.get(f"{count}/{other}")) for other in range(world)]
        if count:  # all have read what came before the round that is now complete
            shared.delete_key(f"{count - 1}/{rank}")
        shared.add(f"{count}/heard", 1)
        while hosts and shared.add(f"{count}/heard", 0) < world:  # the store ends with its host
            time.sleep(_POLL_S)
        count += 1
        return rows

    return exchange


# -- started here ------------------------------------------------------------------------------------------------------


def together(work: Callable[..., Any], world: int, progress: Progress | None, **arguments: Any) -> Any:
    """Call `work(place=..., **arguments)` in `world` new processes; returns what worker 0 returned.

    `work` is a function of a module; arguments and result are what `messages.packed` takes. Raises UserError if a
    worker did, WorkerLost if one died; no worker is left behind.
    """
    crew = _Crew(world, progress)
    try:
        crew.start((name_of(work), arguments))
        return crew.run()
    finally:
        crew.end()


class _Crew:
    """The workers, seen from the process that started them."""

    def __init__(self, world: int, progress: Progress | None) -> None:
        self._world, self._progress = world, progress
        self._processes: list[subprocess.Popen[bytes]] = []
        self._pipes: list[Connection] = []
        self._rows: dict[int, Any] = {}
        self._ended: dict[int, Any] = {}
        self._errors: list[tuple[bool, str]] = []
        self._bytes = [(0, 0, 0)] * world

    def start(self, call: Any) -> None:
        threads = max(1, (os.cpu_count() or 1) // self._world)
        env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        message = packed(call)
        for rank in range(self._world):
            ours, theirs = socket.socketpair()
            command = _COMMAND.format(path=sys.path, number=theirs.fileno())
            with theirs:
                self._processes.append(
                    subprocess.Popen([sys.executable, "-c", command], pass_fds=[theirs.fileno()], env=env)
                )
            self._pipes.append(Connection(ours.detach()))
            self._pipes[rank].send_bytes(packed((rank, self._world)))
            self._pipes[rank].send_bytes(message)

    def run(self) -> Any:
        while len(self._ended) < self._world:
            for pipe in wait([pipe for rank, pipe in enumerate(self._pipes) if rank not in self._ended]):
                rank = self._pipes.index(pipe)  # type: ignore[arg-type]
                try:
                    self._hear(rank, *unpacked(self._pipes[rank].recv_bytes()))
                except (EOFError, ConnectionError):
                    self._mourn(rank)
        if self._errors:
            user, text = min(self._errors, key=lambda error: not error[0])
            raise UserError(text) if user else RuntimeError(text)
        return self._ended[0]

    def _hear(self, rank: int, what: str, value: Any) -> None:
        if what == "progress":
            self._bytes[rank] = value
            if self._progress is not None:
                self._progress(*(sum(column) for column in zip(*self._bytes, strict=True)))
        elif what == "gather":
            self._rows[rank] = value
        else:
            self._ended[rank] = value if what == "done" else None
            if what == "error":
                self._errors.append(value)
        if self._errors or len(self._rows) == self._world:
            answer = [self._rows[r] for r in range(self._world)] if len(self._rows) == self._world else None
            for waiting in self._rows:
                self._pipes[waiting].send_bytes(packed(answer))
            self._rows = {}

    def _mourn(self, rank: int) -> None:
        code = self._processes[rank].wait()
        how = f"was killed by signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"ended with status {code}"
        raise WorkerLost(f"worker {rank} of {self._world} {how}; the same command goes on where it stopped")

    def end(self) -> None:
        for process in self._processes:
            if process.poll() is None and len(self._ended) < self._world:
                process.kill()
        for process in self._processes:
            process.wait()
        for pipe in self._pipes:
            pipe.close()


# what a worker says that only heard of another's failure: the first cause alone is shown
_FOLLOWING = ("another worker failed", "another rank gave up")


def _child(number: int) -> None:
    """A worker's whole life."""
    one_heap()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the starter hears it and ends us
    threading.Thread(target=die_with, args=(os.getppid(),), daemon=True).start()
    pipe = Connection(number)
    lock = threading.Lock()

    def say(what: str, value: Any) -> None:
        with lock:
            pipe.send_bytes(packed((what, value)))

    def exchange(value: Any) -> list[Any]:
        say("gather", value)
        rows = unpacked(pipe.recv_bytes())
        if rows is None:
            raise RuntimeError("another worker failed")
        return list(rows)

    rank, world = unpacked(pipe.recv_bytes())
    try:
        name, arguments = unpacked(pipe.recv_bytes())
        place = Place(rank, world, exchange, lambda *counts: say("progress", counts))
        say("done", function_of(name)(place=place, **arguments))
    except Exception as error:
        user = isinstance(error, UserError)
        if not user and not any(text in str(error) for text in _FOLLOWING):
            traceback.print_exc()
        say("error", (user, str(error) if user else f"worker {rank} of {world}: {error!r}"))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # spares half a second of torch's clearing up


def die_with(starter: int) -> None:
    """End this process when it is no longer a child of process `starter`; for a thread."""
    while os.getppid() == starter:
        time.sleep(_CHECK_S)
    os._exit(1)
