"""The results of llm_chain: one line of JSON a finished cell, added as soon as it is done."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

Record = dict[str, Any]


class Store:
    """Records by cell id, in one file that grows by a line at a time.

    A line that was cut off when its writer was killed counts as not written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def load(self) -> dict[str, Record]:
        """All records; of one that was written twice, the newest."""
        found: dict[str, Record] = {}
        for line in self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else []:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            found[record["id"]] = record
        return found

    def add(self, record: Record) -> None:
        """Append one record, on disk when this returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        torn = self.path.is_file() and not self.path.read_bytes().endswith(b"\n") and self.path.stat().st_size
        with self.path.open("a", encoding="utf-8") as file:
            file.write(("\n" if torn else "") + json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
