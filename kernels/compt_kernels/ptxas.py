"""What ptxas says about compiled kernels: registers, shared memory, and spills, which there should be none of."""

from __future__ import annotations

import re
from dataclasses import dataclass

_ENTRY = re.compile(r"Compiling entry function '(?P<name>[^']+)' for '(?P<architecture>sm_\w+)'")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")


@dataclass(frozen=True)
class Kernel:
    """One kernel compiled for one architecture; sizes in bytes a thread."""

    name: str  # mangled
    architecture: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int


def kernels(report: str) -> list[Kernel]:
    """The kernels of a report of `nvcc -Xptxas=-v`. Raises ValueError where one's figures are not found."""
    found = []
    entries = list(_ENTRY.finditer(report))
    for entry, after in zip(entries, [*(e.start() for e in entries[1:]), len(report)]):
        text = report[entry.end() : after]
        spills, used = _SPILLS.search(text), _USED.search(text)
        if not spills or not used:
            raise ValueError(f"no figures for {entry['name']} on {entry['architecture']}:\n{text}")
        stack, stores, loads = map(int, spills.groups())
        found.append(Kernel(entry["name"], entry["architecture"], int(used[1]), stack, stores, loads))
    return found
