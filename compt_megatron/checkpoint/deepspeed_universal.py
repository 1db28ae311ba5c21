"""DeepSpeed's universal checkpoints: those that its ds_to_universal makes (from ZeRO 1 and 2, and from 3), and ours.

What is read: `master/` from fp32.pt; `weight/` from the module where that is in the folder, else from fp32.pt in the
module's dtype (and no `master/` if that is fp32); `exp_avg/`, `exp_avg_sq/`, `step/`. A checkpoint of ours has what its
compt.json lists. deepspeed_writer.py says what lies where.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import Any

import torch

from compt_megatron.checkpoint.contract import Format, Region, TensorInfo, checked_region
from compt_megatron.checkpoint.deepspeed_files import UNIVERSAL, find_spec, universal_folder
from compt_megatron.checkpoint.deepspeed_writer import (
    MODEL_FILE,
    OPTIMIZER_FILE,
    PARAM,
    SHARDED_MODEL_FILE,
    STATE_FILES,
    STEP_FILE,
    DeepSpeedWriter,
    kind_and_parameter,
)
from compt_megatron.checkpoint.guard import Guard
from compt_megatron.checkpoint.manifest import MANIFEST, read_manifest, recorded_spec, recorded_tensors
from compt_megatron.checkpoint.module_names import ModulePlace, find_names, projection, projection_key
from compt_megatron.checkpoint.open_files import OpenFiles
from compt_megatron.checkpoint.saved_archive import SavedArchive, StoredTensor
from compt_megatron.errors import UserError
from compt_megatron.spec.megatron_names import Rows
from compt_megatron.spec.open_clip_names import named_as
from compt_megatron.spec.table import ModelSpec

_PREFIXES = ("weight", "master", "exp_avg", "exp_avg_sq", "step", "align")


class UniversalReader:
    """A universal checkpoint. The model is recorded in compt.json, given as `spec`, or by a config in the folder."""

    def __init__(self, path: Path, spec: ModelSpec | None = None, trust_pickle: bool = False) -> None:
        self.path = path
        folder = universal_folder(path)
        assert folder is not None, f"{path} is no universal checkpoint"
        self._folder, self._trust = folder, trust_pickle
        root = _root(path, folder)
        self._manifest = read_manifest(root)
        found = recorded_spec(self._manifest, spec, path) or find_spec(folder, spec)
        self._guard, self._inner = Guard(root, self._manifest), folder.relative_to(root)
        self._files = OpenFiles(os.O_RDONLY)
        self._archives: dict[str, SavedArchive] = {}
        self._held = {
            entry.name: {file.name for file in entry.iterdir()}
            for entry in (folder / UNIVERSAL).iterdir()
            if entry.is_dir()
        }
        self._names, self._notes = find_names(path, found, self._shapes())
        self.spec: ModelSpec | None = named_as(found, self._names.shapes)
        self._module = self._read_module()
        self._tensors = self._found() if self._manifest is None else self._recorded(self._manifest)

    # -- what is there -----------------------------------------------------------------------------------------------

    def _shapes(self) -> dict[str, tuple[int, ...] | None]:
        """The shape of every parameter that is there; those of our own checkpoints are known to be right."""
        weights = STATE_FILES["weight"]
        names = [name for name, files in self._held.items() if weights in files]
        if self._manifest is not None:
            return dict.fromkeys(names)
        return {name: self._tensor(f"{UNIVERSAL}/{name}/{weights}").shape for name in names}

    def _read_module(self) -> dict[str, StoredTensor]:
        """The module's tensors by name: whole ones, or empty ones that say which dtype it has."""
        for file in (MODEL_FILE, SHARDED_MODEL_FILE):
            if (self._folder / file).is_file():
                content = self._archive(file).content
                module = content.get("module") if isinstance(content, dict) else None
                return {key: value for key, value in (module or {}).items() if isinstance(value, StoredTensor)}
        raise UserError(
            f"{self._folder / MODEL_FILE}: this file of the checkpoint is missing; restore it or use another"
        )

    def _found(self) -> dict[str, TensorInfo]:
        """What a checkpoint that DeepSpeed made holds, by the names on the boundary."""
        assert self.spec is not None
        params = {name: (self._names.stored(place.key), self.spec.params[name].shape) for name, place in self._places()}
        for stored in self._held:
            if (beside := projection(stored)) is not None:
                params[f"align/{beside}"] = stored, self._tensor(f"{UNIVERSAL}/{stored}/{STATE_FILES['weight']}").shape
        tensors: dict[str, TensorInfo] = {}
        for name, (stored, shape) in params.items():
            full = self._tensor(f"{UNIVERSAL}/{stored}/{STATE_FILES['weight']}").dtype
            dtype = self._module[stored].dtype if stored in self._module else full
            tensors[name if name.startswith("align/") else f"weight/{name}"] = TensorInfo(shape, dtype)
            if dtype != full:
                tensors[f"master/{name}"] = TensorInfo(shape, full)
            moments = [kind for kind in ("exp_avg", "exp_avg_sq") if STATE_FILES[kind] in self._held[stored]]
            for kind in moments:
                file = f"{UNIVERSAL}/{stored}/{STATE_FILES[kind]}"
                tensors[f"{kind}/{name}"] = TensorInfo(shape, self._tensor(file).dtype)
            if moments:
                tensors[f"step/{name}"] = TensorInfo((), torch.float32)
        return tensors

    def _recorded(self, manifest: dict[str, Any]) -> dict[str, TensorInfo]:
        """What a checkpoint of ours holds; UserError if files of it are missing."""
        tensors = recorded_tensors(manifest)
        for name in tensors:
            kind, param = kind_and_parameter(name)
            if kind != "step" and not self._in_module(name, tensors):
                stored = self._stored(param)
                if STATE_FILES[kind] not in self._held.get(stored, ()):
                    file = self._folder / UNIVERSAL / stored / STATE_FILES[kind]
                    raise UserError(f"{file}: this file of the checkpoint is missing; restore it or use another")
        return tensors

    def _places(self) -> Iterable[tuple[str, ModulePlace]]:
        return self._names.places.items()

    def _stored(self, param: str) -> str:
        """The name in the folder of a parameter's tensor."""
        if param.startswith("align/"):
            key = projection_key(param.removeprefix("align/"))
            return next((stored for stored in self._held if projection(stored) and stored.endswith(key)), key)
        return self._names.stored(self._names.places[param].key)

    def _in_module(self, name: str, tensors: dict[str, TensorInfo]) -> bool:
        """Whether a tensor is a weight that is stored as such, beside its master."""
        kind, param = kind_and_parameter(name)
        return kind == "weight" and f"master/{param}" in tensors and self._module_has(self._stored(param))

    def _module_has(self, stored: str) -> bool:
        return stored in self._module and self._module[stored].numel > 0

    # -- reading -----------------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, TensorInfo]:
        return dict(self._tensors)

    def read(self, name: str, region: Region | None = None) -> torch.Tensor:
        info = self._tensors[name]
        box = checked_region(name, info.shape, region)
        kind, param = kind_and_parameter(name)
        if kind == "step":
            return torch.tensor(self._step(param), dtype=info.dtype)
        stored = self._stored(param)
        if self._in_module(name, self._tensors):
            archive, tensor = self._archive(self._model_file), self._module[stored]
        else:
            file = f"{UNIVERSAL}/{stored}/{STATE_FILES[kind]}"
            archive, tensor = self._archive(file), self._tensor(file)
        if param in self._names.places:
            place, shape = self._names.places[param], self._names.shapes[self._names.places[param].key]
        else:
            place, shape = ModulePlace(stored, 0, Rows(info.shape[0], info.shape[0], 0)), info.shape
        if tensor.numel != prod(shape):
            raise UserError(
                f"{archive.path}: holds {tensor.numel} elements of '{stored}' where {prod(shape)} are expected; use "
                "another checkpoint"
            )
        same = tensor.shape == shape  # ds_to_universal flattens what comes from ZeRO 3
        return place.read(
            box,
            info.dtype,
            lambda part: archive.read(tensor, part) if same else archive.read_flat(tensor, 0, shape, part),
        )

    def _archive(self, file: str) -> SavedArchive:
        """A file of the folder, opened once."""
        if file not in self._archives:
            path = self._guard.file(str(self._inner / file))
            self._archives[file] = SavedArchive(path, self._files, self._trust)
        return self._archives[file]

    def _tensor(self, file: str) -> StoredTensor:
        """The tensor of a parameter's file."""
        content = self._archive(file).content
        found = content.get(PARAM) if isinstance(content, dict) else content
        if not isinstance(found, StoredTensor):
            raise UserError(f"{self._folder / file}: holds no tensor; restore it or use another checkpoint")
        return found

    def _step(self, param: str) -> float:
        """The optimizer steps that a parameter has taken. ds_to_universal keeps them apart for ZeRO 1 and 2 only."""
        own = self._stored(param) if param in self._names.places or param.startswith("align/") else ""
        file = f"{UNIVERSAL}/{own}/{STEP_FILE}" if STEP_FILE in self._held.get(own, ()) else OPTIMIZER_FILE
        archive = self._archive(file)
        value = archive.content
        try:
            if file == OPTIMIZER_FILE:
                optimizer = value["optimizer_state_dict"]
                value = optimizer["state"][0].get("step", optimizer["param_groups"][0].get("step"))
            return float(archive.read(value, ())) if isinstance(value, StoredTensor) else float(value)
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise UserError(
                f"{self._folder / file}: does not say how many steps the optimizer has taken; use another checkpoint"
            ) from error

    def metadata(self) -> dict[str, Any]:
        if self._manifest is not None:
            return dict(self._manifest)
        content = self._archive(self._model_file).content
        step = int(content.get("global_steps") or 0)
        train = {"step": step, "samples": int(content.get("global_samples") or 0)} if step else None
        return {"train": train, "notes": list(self._notes)}

    @property
    def _model_file(self) -> str:
        return MODEL_FILE if (self._folder / MODEL_FILE).is_file() else SHARDED_MODEL_FILE

    def close(self) -> None:
        self._files.close()


def _root(path: Path, folder: Path) -> Path:
    """The folder that compt.json describes, if there is one: above a checkpoint's own, which a user may name too."""
    above = folder.parent
    return above if path != folder or ((above / MANIFEST).is_file() and universal_folder(above) == folder) else folder


def _recognises(path: Path) -> bool:
    return universal_folder(path) is not None


FORMAT = Format("deepspeed", _recognises, UniversalReader, DeepSpeedWriter, prefixes=_PREFIXES)
