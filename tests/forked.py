"""The server that the tests' processes are forked from: it has imported everything and run nothing.

A start costs a fork instead of the seconds that torch, DeepSpeed, megatron-core and open_clip take to import. There is
one server for all tests of a pytest process.
"""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing import forkserver

# What its imports must see: torch reads the threads, DeepSpeed chooses its device.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"}

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["tests.warm"])


def start_server() -> None:
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    os.environ.update(ENVIRONMENT)
    try:
        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})
