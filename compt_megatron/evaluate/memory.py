"""How much memory this process may still take."""

from __future__ import annotations

import os
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
# (limit, usage) of a control group, version 2 and version 1
_LIMITS = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))


def available_memory() -> int:
    """Bytes that can be taken without swapping, as the kernel estimates them, within the limit of the container.

    What a file cache holds counts as free. Where the system does not say, all of its memory.
    """
    found = [_from_meminfo(), *(_from_cgroup(_CGROUP / limit, _CGROUP / usage) for limit, usage in _LIMITS)]
    known = [count for count in found if count is not None]
    return min(known) if known else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _from_meminfo() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


def _from_cgroup(limit: Path, usage: Path) -> int | None:
    try:
        most, used = int(limit.read_text()), int(usage.read_text())
        stat = dict(line.split() for line in (limit.parent / "memory.stat").read_text().splitlines())
        cached = int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0))
        return max(most - used + cached, 0)
    except (OSError, ValueError):  # no control group, or "max": no limit
        return None
