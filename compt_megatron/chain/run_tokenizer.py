"""The tokenizer of a run's data, for checkpoints of the run that have none beside them."""

from __future__ import annotations

from pathlib import Path

from compt_megatron.chain.ledger import FILENAME, Ledger
from compt_megatron.data.text.tokenizer import COMPANIONS, FILE
from compt_megatron.errors import UserError

_DEPTH = 3  # RUN/<member>/checkpoints/step_...


def with_companions(file: Path | None) -> dict[str, Path]:
    """{name in an exported folder: file}: a tokenizer.json, and what transformers wants beside it."""
    if file is None:
        return {}
    beside = {name: file.with_name(name) for name in COMPANIONS if file.with_name(name).is_file()}
    return {FILE: file, **beside}


def recorded_tokenizer(checkpoint: str | Path) -> Path | None:
    """The tokenizer.json of the data that a checkpoint was trained on, where it lies in a run folder that says so (or
    whose export has it); None elsewhere."""
    path = Path(checkpoint).resolve()
    for run_dir in path.parents[:_DEPTH]:
        if not (run_dir / FILENAME).is_file():
            continue
        member = path.relative_to(run_dir).parts[0]
        try:
            ledger = Ledger.load(run_dir)
            named = ledger.entry(member).tokenizer if ledger is not None else None
        except (UserError, KeyError):  # another program's chain.json, or none of its members
            return None
        files = [Path(named)] if named else []
        return next((file for file in [*files, run_dir / member / "export" / FILE] if file.is_file()), None)
    return None
