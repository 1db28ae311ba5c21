"""DeepSpeed's folders: where the checkpoint lies, which kind it is, which files belong to it.

A folder given by a user is that of one checkpoint (`global_step100`), or the one above it, in which a small file names
it: `latest` for a checkpoint as training saves it, `latest_universal` for a universal one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from compt_megatron.errors import UserError
from compt_megatron.recipe.files import read_json
from compt_megatron.spec.families import spec_from_config
from compt_megatron.spec.table import ModelSpec

LATEST, LATEST_UNIVERSAL = "latest", "latest_universal"
UNIVERSAL = "zero"  # the folder inside a universal checkpoint that has one folder a parameter
_CONFIGS = ("open_clip_config.json", "config.json")
_MODEL_FILE = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_OPTIMIZER_FILE = re.compile(r"((?:bf16_|fp16_)?)zero_pp_rank_(\d+)_mp_rank_(\d+)_?optim_states\.pt")
_EXPERT_FILE = re.compile(r"(?:layer_\d+_)?expert_\d+_.*|expp_rank_\d+_.*")
_LAYER_FILE = re.compile(r"layer_\d+-.*model_states\.pt")


def universal_folder(path: Path) -> Path | None:
    """The folder of the universal checkpoint that `path` is or names, or None."""
    return _found(path, (LATEST_UNIVERSAL, LATEST), _is_universal)


def zero_folder(path: Path) -> Path | None:
    """The folder of the checkpoint as DeepSpeed's training saves it that `path` is or names, or None."""
    return _found(path, (LATEST,), _is_native)


def is_deepspeed(path: Path) -> bool:
    return universal_folder(path) is not None or zero_folder(path) is not None


def _found(path: Path, pointers: tuple[str, ...], is_one: object) -> Path | None:
    assert callable(is_one)
    if not path.is_dir():
        return None
    if is_one(path):
        return path
    for pointer in pointers:
        if (path / pointer).is_file():
            tag = (path / pointer).read_text(errors="replace").strip()
            if tag and Path(tag).name == tag and is_one(path / tag):
                return path / tag
    return None


def _is_universal(folder: Path) -> bool:
    if not (folder / UNIVERSAL).is_dir():
        return False
    return any(_MODEL_FILE.fullmatch(entry.name) for entry in folder.iterdir()) or any(
        (entry / "fp32.pt").is_file() for entry in (folder / UNIVERSAL).iterdir()
    )


def _is_native(folder: Path) -> bool:
    if not folder.is_dir() or _is_universal(folder):
        return False
    return any(_MODEL_FILE.fullmatch(entry.name) or _OPTIMIZER_FILE.fullmatch(entry.name) for entry in folder.iterdir())


@dataclass(frozen=True)
class ZeroFiles:
    """The files of one checkpoint, ordered by rank. `model`: one, or with ZeRO 3 one a rank; `optimizer`: one a rank,
    none without ZeRO."""

    model: list[Path]
    optimizer: list[Path]


def zero_files(folder: Path) -> ZeroFiles:
    """List the files of a checkpoint. Raises UserError where ranks are missing, or for a layout that is not read."""
    model: dict[int, Path] = {}
    whole: dict[int, Path] = {}  # by the model-parallel rank
    optimizer: dict[str, dict[int, Path]] = {}
    for entry in sorted(folder.iterdir()):
        if _EXPERT_FILE.fullmatch(entry.name):
            raise UserError(f"{entry}: experts are not supported; only dense models can be read")
        if _LAYER_FILE.fullmatch(entry.name):
            raise UserError(f"{entry}: pipeline stages are not supported; save it from a module that is not pipelined")
        if found := _MODEL_FILE.fullmatch(entry.name):
            rank, parallel = found.groups()
            _one_model_rank(entry, parallel)
            (whole if rank is None else model)[int(rank or 0)] = entry
        elif found := _OPTIMIZER_FILE.fullmatch(entry.name):
            _one_model_rank(entry, found[3])
            optimizer.setdefault(found[1], {})[int(found[2])] = entry
    if (whole and model) or len(optimizer) > 1:
        kinds = [files[min(files)].name for files in (whole, model, *optimizer.values()) if files]
        raise UserError(f"{folder}: holds files of two checkpoints ({', '.join(kinds)}); move one to its own folder")
    found_optimizer = next(iter(optimizer.values()), {})
    for files in (model, found_optimizer):
        for rank in range(max(files, default=-1)):
            if rank not in files:
                name = files[max(files)].name.replace(f"rank_{max(files)}_", f"rank_{rank}_", 1)
                raise UserError(f"{folder / name}: this file of the checkpoint is missing; restore it or use another")
    if not (whole or model):
        raise UserError(f"{folder}: has no *_model_states.pt; restore it or use another checkpoint")
    ordered = [[files[rank] for rank in sorted(files)] for files in (whole or model, found_optimizer)]
    return ZeroFiles(*ordered)


def _one_model_rank(path: Path, rank: str) -> None:
    if int(rank):
        raise UserError(
            f"{path}: is a part of a model split by tensor or pipeline parallelism, which is not supported; make a "
            "universal checkpoint of it with deepspeed's ds_to_universal"
        )


def find_spec(folder: Path, given: ModelSpec | None) -> ModelSpec:
    """The model of a folder that has no compt.json: the given one, or that of a config in it or in the folder above.

    Raises UserError if there is none.
    """
    if given is not None:
        return given
    for place in (folder, folder.parent):
        for name in _CONFIGS:
            if (place / name).is_file():
                return spec_from_config(read_json(place / name), place.name)
    raise UserError(f"{folder}: does not record which model it holds; name its model config with --from")
