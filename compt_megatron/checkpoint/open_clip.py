"""open_clip's files: a state dict as `.pt` or safetensors, alone or in a folder with `open_clip_config.json`.

They hold weights only. What we write is loaded by open_clip strictly; q, k and v are fused as open_clip fuses them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from compt_megatron.checkpoint.commit import SINGLE_FILES
from compt_megatron.checkpoint.contract import (
    Format,
    Layout,
    Region,
    Task,
    TensorInfo,
    checked_region,
    region_shape,
    split_name,
)
from compt_megatron.checkpoint.deepspeed_files import is_deepspeed
from compt_megatron.checkpoint.flat_file import FlatFile
from compt_megatron.checkpoint.guard import Guard
from compt_megatron.checkpoint.manifest import read_manifest, recorded_spec, under_name
from compt_megatron.checkpoint.out_file import HashedFile, OutFile
from compt_megatron.checkpoint.state_file import holds_language_model, is_state_file, open_state_file
from compt_megatron.checkpoint.writing import BoxWriter, FileRow, one_dtype
from compt_megatron.errors import UserError
from compt_megatron.recipe.files import read_json
from compt_megatron.spec.families import spec_from_config
from compt_megatron.spec.open_clip_names import FilePlace, open_clip_place, open_clip_shapes
from compt_megatron.spec.table import ModelSpec

CONFIG = "open_clip_config.json"
WEIGHTS = "open_clip_model.safetensors"
_FOLDER_WEIGHTS = (WEIGHTS, "open_clip_pytorch_model.bin")
# entries of older files that are no parameters: open_clip drops them too
_NO_PARAMETERS = ("input_resolution", "context_length", "vocab_size", "attn_mask", "visual.attn_mask")
# the image normalisation that every open_clip model uses unless its config says otherwise
_PREPROCESS = {
    "mean": [0.48145466, 0.4578275, 0.40821073],
    "std": [0.26862954, 0.26130258, 0.27577711],
}


class OpenClipReader:
    """An open_clip state dict, in a folder or alone. The model is recorded, or given as `spec`."""

    def __init__(self, path: Path, spec: ModelSpec | None = None, trust_pickle: bool = False) -> None:
        self.path = path
        self._manifest = read_manifest(path)
        file, self._config = path, None
        if path.is_dir():
            guard = Guard(path, self._manifest)
            file = path / _weights_name(path)
            if (path / CONFIG).is_file():
                self._config = read_json(guard.file(CONFIG))
        else:
            guard = Guard(path.parent, under_name(self._manifest, path.name))
        found = self._find_spec(spec)
        self.spec: ModelSpec | None = found
        guard.file(file.name)
        self._state = open_state_file(file, trust_pickle)
        self._places = {f"weight/{name}": open_clip_place(found, name) for name in found.params}
        stored = self._state.tensors()
        wrapped = "module." if stored and all(key.startswith("module.") for key in stored) else ""
        self._keys = {key.removeprefix(wrapped): key for key in stored}
        self._stored = {key: stored[full] for key, full in self._keys.items()}
        self._check_shapes(found)

    def _find_spec(self, given: ModelSpec | None) -> ModelSpec:
        found = recorded_spec(self._manifest, given, self.path)
        if self._manifest is None and self._config is not None:
            found = spec_from_config(self._config, self.path.name)
            if given is not None and given.digest != found.digest:
                raise UserError(f"{self.path}: checkpoint of another model than '{given.name}': see its {CONFIG}")
        if found is None:
            raise UserError(f"{self.path}: does not record which model it holds; name its model config with --from")
        return found

    def _check_shapes(self, spec: ModelSpec) -> None:
        expected = open_clip_shapes(spec)
        for key, shape in expected.items():
            if key not in self._stored:
                raise UserError(
                    f"{self.path}: checkpoint of another model than '{spec.name}': it has no '{key}'; "
                    "name the right model config with --from"
                )
            if (stored := self._stored[key].shape) != shape:
                raise UserError(
                    f"{self.path}: checkpoint of another model than '{spec.name}': '{key}' has shape {stored}, "
                    f"the model needs {shape}; name the right model config with --from"
                )
        for key in self._stored:
            if key not in expected and key not in _NO_PARAMETERS:
                raise UserError(
                    f"{self.path}: checkpoint of another model than '{spec.name}': it also has '{key}'; "
                    "name the right model config with --from"
                )

    def tensors(self) -> dict[str, TensorInfo]:
        assert self.spec is not None
        return {
            name: TensorInfo(self.spec.params[split_name(name)[1]].shape, self._stored[place.key].dtype)
            for name, place in self._places.items()
        }

    def read(self, name: str, region: Region | None = None) -> torch.Tensor:
        assert self.spec is not None
        place = self._places[name]
        box = checked_region(name, self.spec.params[split_name(name)[1]].shape, region)
        if not all(region_shape(box)):
            return torch.empty(region_shape(box), dtype=self._stored[place.key].dtype)
        if box:
            box = (slice(box[0].start + place.start, box[0].stop + place.start), *box[1:])
        return self._state.read(self._keys[place.key], box)

    def metadata(self) -> dict[str, Any]:
        preprocess = (self._config or {}).get("preprocess_cfg")
        return ({"preprocess_cfg": preprocess} if preprocess else {}) | (self._manifest or {})

    def close(self) -> None:
        self._state.close()


def _weights_name(folder: Path) -> str:
    for name in _FOLDER_WEIGHTS:
        if (folder / name).is_file():
            return name
    raise UserError(f"{folder}: has no {' or '.join(_FOLDER_WEIGHTS)}; restore it or give the weights' own path")


class OpenClipWriter(BoxWriter):
    """Writes a folder with weights and config, or one `.pt` or `.safetensors` file.

    Weights go straight to their place in a safetensors file; a `.pt` is made from that file at the end.
    """

    format_name = "open_clip"

    def __init__(self, task: Task) -> None:
        if task.spec.is_language_model:
            raise UserError(f"{task.path}: open_clip has no language models; write '{task.spec.name}' as hf")
        self._places: dict[str, FilePlace] = {name: open_clip_place(task.spec, name) for name in task.spec.params}
        self._file: FlatFile | None = None
        super().__init__(task)
        self.copies = 2 if task.path.suffix == ".pt" else 1

    def _accept(self, tensors: dict[str, TensorInfo]) -> None:
        for name in tensors:
            prefix, rest = split_name(name)
            if prefix != "weight" or rest not in self._places:
                raise UserError(
                    f"{self.destination.path}: open_clip files hold weights only, '{name}' has no place there"
                )
        if self._file is not None:
            assert not tensors, "an open_clip file is declared at once"
            return
        missing = [name for name in self._places if f"weight/{name}" not in self.declared]
        assert not missing, f"{missing[0]} and {len(missing) - 1} others are not declared"
        stored = {}
        for key, shape in open_clip_shapes(self.spec).items():
            members = [f"weight/{name}" for name, place in self._places.items() if place.key == key]
            stored[key] = TensorInfo(shape, one_dtype(key, members, self.declared))
        name = self.destination.path.name if self.destination.path.suffix == ".safetensors" else WEIGHTS
        self._file = FlatFile(self.folder / name, stored)
        self.party.lead(self._file.create)
        self._file.open()

    def _put(self, name: str, offsets: tuple[int, ...], tensor: torch.Tensor) -> None:
        assert self._file is not None
        place = self._places[split_name(name)[1]]
        if offsets:
            offsets = (offsets[0] + place.start, *offsets[1:])
        self._file.write(place.key, offsets, tensor)

    def _out_files(self) -> Iterable[OutFile]:
        return [self._file.out] if self._file is not None else []

    def _read_back(self, name: str, region: Region) -> torch.Tensor:
        assert self._file is not None
        place = self._places[split_name(name)[1]]
        if region:
            region = (slice(region[0].start + place.start, region[0].stop + place.start), *region[1:])
        return self._file.read_back(place.key, region)

    def _position(self, name: str) -> tuple[int, int]:
        assert self._file is not None
        place = self._places[split_name(name)[1]]
        return self._file.position(place.key), place.start

    @classmethod
    def file_sizes(
        cls, path: Path, spec: ModelSpec, tensors: dict[str, TensorInfo], layout: Layout, workers: int
    ) -> dict[str, int]:
        total = sum(info.nbytes for info in tensors.values())
        return {path.name: total} if path.suffix in SINGLE_FILES else {WEIGHTS: total, CONFIG: 0}

    def _finish_rank(self) -> tuple[list[FileRow], Any]:
        assert self._file is not None, "commit without declare"
        self._file.finish()
        return [], None

    def _finish_folder(self, parts: list[Any], metadata: dict[str, Any]) -> list[FileRow]:
        assert self._file is not None
        weights = self._file.path
        if self.destination.path.suffix == ".pt":
            file = HashedFile(self.folder / self.destination.path.name)
            torch.save(self._file.mapped(), file)  # type: ignore[arg-type]
            weights.unlink()
            return [file.finish()]
        files = [self._file_row(weights)]
        if not self.destination.single:
            preprocess = metadata.get("preprocess_cfg") or _PREPROCESS
            config = {"model_cfg": self.spec.config, "preprocess_cfg": preprocess}
            written = HashedFile(self.folder / CONFIG)
            written.write((json.dumps(config, indent=2) + "\n").encode())
            files.append(written.finish())
            for name, source in metadata.pop("attachments", {}).items():
                attached = HashedFile(self.folder / name)
                attached.write(Path(source).read_bytes())
                files.append(attached.finish())
        return files

    def _release(self) -> None:
        if self._file is not None:
            self._file.close()


def _recognises(path: Path) -> bool:
    if path.is_dir():
        # a DeepSpeed folder may have the config as well, to say which model it is
        config = (path / CONFIG).is_file() and not is_deepspeed(path)
        return config or any((path / name).is_file() for name in _FOLDER_WEIGHTS)
    return is_state_file(path) and not holds_language_model(path)


FORMAT = Format("open_clip", _recognises, OpenClipReader, OpenClipWriter, prefixes=("weight",), attachments=True)
