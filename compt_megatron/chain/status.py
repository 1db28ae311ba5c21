"""`status.json` in a run folder: how the last start ended. Requeue scripts read it, as launchers hide exit statuses."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

FILENAME = "status.json"
_STATES = {0: "done", 1: "failed", 2: "user_error", 3: "stopped"}


def write_status(run_dir: Path, exit_code: int, message: str = "") -> None:
    """Record how a start ended: {state, exit_code, message, time}. States: done, failed, user_error, stopped."""
    run_dir.mkdir(parents=True, exist_ok=True)
    status = {"state": _STATES[exit_code], "exit_code": exit_code, "message": message, "time": time.time()}
    partial = run_dir / f"{FILENAME}.partial"
    partial.write_text(json.dumps(status, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, run_dir / FILENAME)


def read_status(run_dir: Path) -> dict[str, Any] | None:
    """The last recorded end, None where there is none."""
    try:
        status: dict[str, Any] = json.loads((run_dir / FILENAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return status


def reported_since(run_dir: Path, start: float, wait_s: float) -> bool:
    """Whether rank 0 has recorded an end after `start` (seconds since the epoch), waiting up to `wait_s` for it."""
    deadline = time.monotonic() + wait_s
    while True:
        status = read_status(run_dir)
        if status is not None and status.get("time", 0) >= start:
            return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.05)
