"""Runs a function in several gloo processes on this machine."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import pickle
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from tests.forked import context, start_server


def run_ranks(
    function: Callable[..., Any], world: int, *args: Any, timeout: float = 120, env: dict[str, str] | None = None
) -> list[Any]:
    """Call `function(rank, world, *args)` in `world` processes whose default process group is gloo.

    `function` is a module's top-level function; arguments and results are pickled (so return detached tensors on the
    CPU, and no views of large ones). `env` is set in the children before the call; they run with one OpenMP thread.
    Returns the results in rank order. Raises AssertionError with the child's traceback if one fails, and with the
    stacks of those still running if not all are done after `timeout` seconds; no child outlives the call.
    """
    start_server()
    folder = Path(tempfile.mkdtemp(prefix="ranks_"))
    children: list[Any] = []
    pipes: list[Connection] = []
    # Plain pickle: multiprocessing's own would pass tensors as shared memory, which dies with the process.
    call = pickle.dumps((function, args))
    try:
        for rank in range(world):
            ours, theirs = context.Pipe(duplex=False)
            child_args = (theirs, str(folder), rank, world, env or {}, call)
            child = context.Process(target=_child, args=child_args, name=f"rank{rank}")
            child.start()
            theirs.close()
            children.append(child)
            pipes.append(ours)
        return _collect(pipes, children, folder, timeout)
    finally:
        for child in children:
            if child.is_alive():
                child.kill()
            child.join()
        for pipe in pipes:
            pipe.close()
        shutil.rmtree(folder, ignore_errors=True)


def _collect(pipes: list[Connection], children: list[Any], folder: Path, timeout: float) -> list[Any]:
    deadline = time.monotonic() + timeout
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    while len(results) + len(failures) < len(pipes):
        pending: dict[Any, int] = {
            pipe: rank for rank, pipe in enumerate(pipes) if rank not in results and rank not in failures
        }
        ready = wait(list(pending), timeout=max(deadline - time.monotonic(), 0))
        if not ready and failures:
            break  # the others wait for the one that failed
        if not ready:
            stacks = "\n".join(f"rank {rank}:\n{_stack(children[rank], folder, rank)}" for rank in pending.values())
            raise AssertionError(f"ranks {sorted(pending.values())} not done after {timeout} s\n{stacks}")
        for pipe in ready:
            rank = pending[pipe]
            try:
                message = pipe.recv_bytes()
                if b"megatron.core" in message:  # its later versions put a function of theirs into pickled tensors
                    import compt_megatron.models  # noqa: F401  it must be imported by this
                good, value = pickle.loads(message)
            except EOFError:
                children[rank].join(10)
                good, value = False, f"died with exit code {children[rank].exitcode}"
            (results if good else failures)[rank] = value
        if failures:  # its peers fail next, of a broken connection: hear them, so that the cause is in the message
            deadline = min(deadline, time.monotonic() + 1)
    if failures:
        raise AssertionError("\n".join(f"rank {rank} of {len(pipes)}: {why}" for rank, why in failures.items()))
    return [results[rank] for rank in range(len(pipes))]


def _stack(child: Any, folder: Path, rank: int) -> str:
    """Ask a running child for the stacks of its threads."""
    path = folder / f"stack{rank}"
    if not path.exists():
        return "(not started)"
    with contextlib.suppress(ProcessLookupError):
        os.kill(child.pid, signal.SIGUSR1)
    until = time.monotonic() + 2
    while not path.read_text().endswith("\n") and time.monotonic() < until:
        time.sleep(0.05)
    return path.read_text()


def _child(
    pipe: Connection,
    folder: str,
    rank: int,
    world: int,
    env: dict[str, str],
    call: bytes,
) -> None:
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)})
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.update(env)
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    with open(Path(folder) / f"stack{rank}", "w") as stack:
        faulthandler.register(signal.SIGUSR1, file=stack)
        try:
            function, args = pickle.loads(call)
            dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
            message = pickle.dumps((True, function(rank, world, *args)))
            dist.barrier()  # nobody leaves while another still talks to it
        except BaseException:
            message = pickle.dumps((False, traceback.format_exc()))
        pipe.send_bytes(message)
        faulthandler.unregister(signal.SIGUSR1)
