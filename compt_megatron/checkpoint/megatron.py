"""The run checkpoint: Megatron's `torch_dist` folder and compt.json. Both engines write and read it.

Which keys it has is in docs/checkpoint.md. Parameters lie where Megatron looks for them (`megatron_names`): all layers
of one in a tensor with a leading layer axis, q, k and v fused and interleaved per query group. Folders that Megatron
itself wrote are read as well, in any of its spellings (`megatron_foreign`).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from compt_megatron.checkpoint.contract import Format, Region, TensorInfo, checked_region, split_name
from compt_megatron.checkpoint.megatron_foreign import Foreign
from compt_megatron.checkpoint.megatron_home import find_home
from compt_megatron.checkpoint.megatron_keys import STATE, Found, MegatronKeys, read_place
from compt_megatron.checkpoint.megatron_writer import BACKEND_FILE, MegatronWriter
from compt_megatron.checkpoint.torch_dist import METADATA, TorchDistFolder
from compt_megatron.errors import Defects, UserError
from compt_megatron.spec.table import ModelSpec


class MegatronReader:
    """A run checkpoint, or a torch_dist folder that Megatron wrote for one of our models."""

    def __init__(self, path: Path, spec: ModelSpec | None = None, trust_pickle: bool = False) -> None:
        self.path = path
        self._home = find_home(path)
        found = self._home.spec(spec)
        self.spec: ModelSpec | None = found
        self._keys = MegatronKeys(found)
        guard = self._home.guard()
        self._folder = TorchDistFolder(self._home.folder, lambda name: guard.file(self._home.name(name)), trust_pickle)
        try:
            self._foreign = Foreign(found, self._folder, path) if self._home.manifest is None else None
            self._found: dict[str, Found] = {}
            self._padding = 0
            self._tensors = dict(self._parameters()) | self._others()
            self._check_complete(found)
        except BaseException:
            self.close()
            raise

    def _parameters(self) -> Iterator[tuple[str, TensorInfo]]:
        for prefix in STATE:
            for name in self._keys.places:
                found = self._keys.find(prefix, name, self._folder.tensors)
                if found is None:
                    continue
                stored = self._folder.tensors[found.key]
                padding = found.padding(stored.shape)
                if padding is None:
                    raise UserError(
                        f"{self.path}: checkpoint of another model: '{found.key}' has shape {stored.shape}, the model "
                        f"needs {found.shape}; name the right model config with --from"
                    )
                self._padding = max(self._padding, padding)
                self._found[f"{prefix}/{name}"] = found
                yield f"{prefix}/{name}", TensorInfo(self._keys.spec.params[name].shape, stored.dtype)

    def _others(self) -> dict[str, TensorInfo]:
        params = {found.key for found in self._found.values()}
        if self._foreign is not None:
            self._foreign.check_strangers(key for key in self._folder.tensors if key not in params)
            return self._foreign.steps(name for name in self._found if name.startswith("exp_avg/"))
        others: dict[str, TensorInfo] = {}
        for key, info in self._folder.tensors.items():
            if key in params:
                continue
            name = self._keys.other_name(key)
            if name is None:
                raise UserError(
                    f"{self.path}: checkpoint of another model: unknown tensor '{key}'; name the right config"
                )
            others[name] = info
        return others

    def _check_complete(self, spec: ModelSpec) -> None:
        missing = [name for name in spec.params if f"weight/{name}" not in self._tensors]
        # Ours may hold something else than weights; a foreign folder without any is one of another model.
        if missing and (len(missing) < len(spec.params) or self._foreign is not None):
            another = f"{self.path}: checkpoint of another model than '{spec.name}'"
            raise Defects([f"{another}: it has no '{name}'; name the right model config" for name in missing])

    def tensors(self) -> dict[str, TensorInfo]:
        return dict(self._tensors)

    def read(self, name: str, region: Region | None = None) -> torch.Tensor:
        info = self._tensors[name]
        box = checked_region(name, info.shape, region)
        found = self._found.get(name)
        if found is not None:
            return read_place(lambda part: self._read_rows(found, part), found.rows, found.transposed, box, info.dtype)
        if self._foreign is not None:
            return self._foreign.step.to(info.dtype)
        return self._folder.read(self._keys.key(*split_name(name)), box)

    def _read_rows(self, found: Found, box: Region) -> torch.Tensor:
        if found.lead is None:
            return self._folder.read(found.key, box)
        return self._folder.read(found.key, (slice(found.lead, found.lead + 1), *box))[0]

    def metadata(self) -> dict[str, Any]:
        if self._foreign is None:
            return dict(self._home.manifest or {})
        return self._foreign.metadata(self._padding)

    def close(self) -> None:
        self._folder.close()


def _recognises(path: Path) -> bool:
    return path.is_dir() and (path / METADATA).is_file() and (path / BACKEND_FILE).is_file()


FORMAT = Format("megatron", _recognises, MegatronReader, MegatronWriter, layouts=True)
