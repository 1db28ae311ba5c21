"""DeepSpeed's training checkpoints, ZeRO 0 to 3, read where they lie: no rank count, no DeepSpeed, no merging first.

What is read: `weight/` in the dtype of the module; `master/` where that is not fp32; `exp_avg/`, `exp_avg_sq/` and
`step/`. Under which names a user's module has the parameters is found out (module_names.py). DeepSpeed continues from
the universal checkpoints of deepspeed_universal.py, which is what is written.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from compt_megatron.checkpoint.contract import Format, Region, TensorInfo, checked_region, split_name
from compt_megatron.checkpoint.deepspeed_files import find_spec, zero_folder
from compt_megatron.checkpoint.deepspeed_zero import ZeroFolder
from compt_megatron.checkpoint.module_names import find_names, projection
from compt_megatron.spec.open_clip_names import named_as
from compt_megatron.spec.table import ModelSpec

_STEP = torch.float32


class DeepSpeedReader:
    """A folder that DeepSpeed's `save_checkpoint` wrote. The model is given as `spec`, or by a config in the folder."""

    def __init__(self, path: Path, spec: ModelSpec | None = None, trust_pickle: bool = False) -> None:
        self.path = path
        folder = zero_folder(path)
        assert folder is not None, f"{path} is no DeepSpeed checkpoint"
        found = find_spec(folder, spec)
        self._folder = ZeroFolder(folder, trust_pickle)
        self._names, self._notes = find_names(path, found, self._folder.shapes)
        self.spec: ModelSpec | None = named_as(found, self._names.shapes)
        self._tensors = self._named(found)

    def _named(self, spec: ModelSpec) -> dict[str, TensorInfo]:
        tensors: dict[str, TensorInfo] = {}
        for prefix, state in self._folder.states.items():
            for name, place in self._names.places.items():
                if (dtype := state.dtypes.get(self._names.stored(place.key))) is not None:
                    tensors[f"{prefix}/{name}"] = TensorInfo(spec.params[name].shape, dtype)
            for stored, dtype in state.dtypes.items():
                if (beside := projection(stored)) is not None:
                    before = "" if prefix == "weight" else f"{prefix}/"
                    tensors[f"{before}align/{beside}"] = TensorInfo(self._folder.shapes[stored], dtype)
        for name, place in self._names.places.items():
            if self._names.stored(place.key) in self._folder.steps:
                tensors[f"step/{name}"] = TensorInfo((), _STEP)
        return tensors

    def tensors(self) -> dict[str, TensorInfo]:
        return dict(self._tensors)

    def read(self, name: str, region: Region | None = None) -> torch.Tensor:
        info = self._tensors[name]
        box = checked_region(name, info.shape, region)
        prefix, rest = split_name(name)
        if prefix == "step":
            return torch.tensor(self._folder.steps[self._names.stored(self._names.places[rest].key)], dtype=_STEP)
        if name.startswith("align/") or rest.startswith("align/"):
            state = self._folder.states["weight" if prefix == "align" else prefix]
            stored = next(key for key in state.pieces if projection(key) == rest.removeprefix("align/"))
            return state.read(stored, info.shape, box)
        place, state = self._names.places[rest], self._folder.states[prefix]
        key, shape = self._names.stored(place.key), self._names.shapes[place.key]
        return place.read(box, info.dtype, lambda stored: state.read(key, shape, stored))

    def metadata(self) -> dict[str, Any]:
        model = self._folder.model
        step = int(model.get("global_steps") or 0)
        train = {"step": step, "samples": int(model.get("global_samples") or 0)} if step else None
        return {"train": train, "notes": [*self._folder.notes, *self._notes]}

    def close(self) -> None:
        self._folder.close()


def _recognises(path: Path) -> bool:
    return zero_folder(path) is not None


FORMAT = Format("deepspeed-zero", _recognises, DeepSpeedReader, None)
