"""open_clip's files: a state dict as `.pt` or safetensors, alone or in a folder with `open_clip_config.json`.

They hold weights only. What we write is loaded by open_clip strictly; q, k and v are fused as open_clip fuses them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from compt_megatron.checkpoint.contract import (
    Format,
    Region,
    TensorInfo,
    checked_region,
    region_shape,
    split_name,
)
from compt_megatron.checkpoint.deepspeed_files import is_deepspeed
from compt_megatron.checkpoint.guard import Guard
from compt_megatron.checkpoint.manifest import read_manifest, recorded_spec, under_name
from compt_megatron.checkpoint.open_clip_writer import CONFIG, WEIGHTS, OpenClipWriter
from compt_megatron.checkpoint.state_file import holds_language_model, is_state_file, open_state_file
from compt_megatron.errors import Defects, UserError
from compt_megatron.recipe.files import read_json
from compt_megatron.spec.families import spec_from_config
from compt_megatron.spec.open_clip_names import named_as, open_clip_place, open_clip_shapes
from compt_megatron.spec.table import ModelSpec

_FOLDER_WEIGHTS = (WEIGHTS, "open_clip_pytorch_model.bin")
# entries of older files that are no parameters: open_clip drops them too
_NO_PARAMETERS = ("input_resolution", "context_length", "vocab_size", "attn_mask", "visual.attn_mask", "text.attn_mask")


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
        guard.file(file.name)
        self._state = open_state_file(file, trust_pickle)
        stored = self._state.tensors()
        wrapped = "module." if stored and all(key.startswith("module.") for key in stored) else ""
        self._keys = {key.removeprefix(wrapped): key for key in stored}
        self._stored = {key: stored[full] for key, full in self._keys.items()}
        found = named_as(found, self._stored)
        self.spec: ModelSpec | None = found
        self._places = {f"weight/{name}": open_clip_place(found, name) for name in found.params}
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
        expected, wrong = open_clip_shapes(spec), []
        for key, shape in expected.items():
            if key not in self._stored:
                wrong.append(f"it has no '{key}'; name {_right_config(key, 'without')} with --from")
            elif (stored := self._stored[key].shape) != shape:
                misfit = f"'{key}' has shape {stored}, the model needs {shape}"
                wrong.append(f"{misfit}; name the right model config with --from")
        for key in self._stored:
            if key not in expected and key not in _NO_PARAMETERS:
                wrong.append(f"it also has '{key}'; name {_right_config(key, 'with')} with --from")
        if wrong:
            raise Defects([f"{self.path}: checkpoint of another model than '{spec.name}': {line}" for line in wrong])

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


def _right_config(key: str, with_or_without: str) -> str:
    """What the user should name, `key` being the tensor that is missing or should not be there."""
    scale = key.endswith((".ls_1.gamma", ".ls_2.gamma"))
    return f"a model config {with_or_without} ls_init_value" if scale else "the right model config"


def _weights_name(folder: Path) -> str:
    for name in _FOLDER_WEIGHTS:
        if (folder / name).is_file():
            return name
    raise UserError(f"{folder}: has no {' or '.join(_FOLDER_WEIGHTS)}; restore it or give the weights' own path")


def _recognises(path: Path) -> bool:
    if path.is_dir():
        # a DeepSpeed folder may have the config as well, to say which model it is
        config = (path / CONFIG).is_file() and not is_deepspeed(path)
        return config or any((path / name).is_file() for name in _FOLDER_WEIGHTS)
    return is_state_file(path) and not holds_language_model(path)


FORMAT = Format("open_clip", _recognises, OpenClipReader, OpenClipWriter, prefixes=("weight",), attachments=True)
