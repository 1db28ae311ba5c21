"""The ledger of a run, `chain.json`: each link's state, hashes, cost and metrics. Written atomically, by rank 0."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from compt_megatron.errors import UserError

FILENAME = "chain.json"
FORMAT_VERSION = 1

State = Literal["pending", "started", "training", "trained", "done"]


@dataclass
class Entry:
    """One link (or control) of the run.

    `state`: `started`, its first weights are written; `training`, a checkpoint of its own exists; `trained`, all steps
    are done; `done`, evaluated and exported too. Paths are relative to the run folder. `macs` are multiply-accumulates.
    """

    name: str
    model: str
    state: State = "pending"
    kind: Literal["link", "control"] = "link"
    parent: str | None = None
    identity: str = ""  # hash of everything that decides the final weights; guards a resume with another recipe
    seed: int = 0
    parameters: int = 0
    steps: int = 0
    total_steps: int = 0
    samples: int = 0
    macs: dict[str, float] = field(default_factory=dict)
    chain_macs_before: float = 0.0  # what the chain had cost when this link began; 0 for a control
    budget_macs: float | None = None  # a control's: what it may spend
    wall_s: float = 0.0
    cpu_s: float = 0.0
    initial: str | None = None
    checkpoint: str | None = None
    weight_hash: str | None = None
    certificate: dict[str, Any] | None = None
    align_at_step0: dict[str, float] = field(default_factory=dict)
    skipped_steps: int = 0
    final_loss: float | None = None
    evaluation: dict[str, dict[str, float]] = field(default_factory=dict)
    tasks: dict[str, dict[str, float]] = field(default_factory=dict)  # lm-eval's
    tokenizer: str | None = None  # the tokenizer.json of a language model's data, an absolute path
    export: str | None = None


@dataclass
class Ledger:
    """The whole of `chain.json`."""

    name: str
    recipe: str
    recipe_digest: str
    command: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    links: list[Entry] = field(default_factory=list)
    controls: list[Entry] = field(default_factory=list)
    format_version: int = FORMAT_VERSION

    def entry(self, name: str) -> Entry:
        """The entry of a link or control. Raises KeyError if there is none of that name."""
        for entry in (*self.links, *self.controls):
            if entry.name == name:
                return entry
        raise KeyError(name)

    def save(self, run_dir: Path) -> None:
        """Write `chain.json` beside and rename it over the old one."""
        run_dir.mkdir(parents=True, exist_ok=True)
        target = run_dir / FILENAME
        beside = target.with_suffix(".json.partial")
        with beside.open("w", encoding="utf-8") as file:
            json.dump(asdict(self), file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, target)

    @classmethod
    def load(cls, run_dir: Path) -> Ledger | None:
        """The ledger of a run folder, None where there is none. Raises UserError if it cannot be understood."""
        path = run_dir / FILENAME
        if not path.is_file():
            return None
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if values.get("format_version") != FORMAT_VERSION:
                raise UserError(
                    f"{path}: format version {values.get('format_version')!r}, this compt reads {FORMAT_VERSION}"
                )
            for group in ("links", "controls"):
                values[group] = [_known(Entry, entry) for entry in values.get(group, [])]
            return _known(cls, values)
        except (ValueError, RecursionError, AttributeError, TypeError) as error:
            raise UserError(f"{path}: not a ledger of compt ({error}); restore it or use another --run-dir") from error


def _known(kind: Any, values: dict[str, Any]) -> Any:
    names = {item.name for item in fields(kind)}
    return kind(**{key: value for key, value in values.items() if key in names})
