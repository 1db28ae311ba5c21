"""The checkpoints of a link in training: the newest one's place, what it records, which are kept."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from compt_megatron.chain.member import Member
from compt_megatron.chain.progress import Progress
from compt_megatron.checkpoint.commit import committed, is_partial, remove_checkpoint, write_pointer
from compt_megatron.checkpoint.formats import open_reader
from compt_megatron.engine.runtime import Runtime
from compt_megatron.engine.training_step import TrainingEngine
from compt_megatron.errors import UserError


def remove_leftovers(folder: Path, runtime: Runtime) -> None:
    """Free the disk of what a killed run was writing or deleting. Collective."""
    with runtime.main_first():
        if runtime.is_main and folder.is_dir():
            for path in folder.iterdir():
                if is_partial(path) and path.is_dir():
                    shutil.rmtree(path)


def recorded_state(checkpoint: Path, member: Member) -> dict[str, Any]:
    """The training position that a run checkpoint of the member records. UserError if it is another
    model's, or has no optimizer state."""
    reader = open_reader(checkpoint, member.spec)
    try:
        if not any(name.startswith("exp_avg/") for name in reader.tensors()):
            raise UserError(
                f"{checkpoint}: holds weights only, no training to go on with; name it as the link's 'init'"
            )
        return dict(reader.metadata().get("train") or {})
    finally:
        reader.close()


def save(
    engine: TrainingEngine,
    folder: Path,
    progress: Progress,
    lineage: list[dict[str, Any]],
    keep: int,
    runtime: Runtime,
) -> None:
    """Write a checkpoint, move the pointer to it, then delete those that are over `keep`. Collective."""
    name = f"step_{engine.global_step:08d}"
    engine.save(folder / name, progress.recorded(engine.global_step, runtime.world), lineage)
    with runtime.main_first():
        if runtime.is_main:
            write_pointer(folder, name)
            # Those of later steps are of a past that --resume PATH left: not counted, and never removed.
            for old in [path for path in committed(folder) if path.name <= name][:-keep]:
                remove_checkpoint(old)
