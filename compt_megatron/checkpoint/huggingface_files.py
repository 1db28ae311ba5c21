"""Which files of a Hugging Face folder hold the weights, and one view of the tensors in all of them."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from compt_megatron.checkpoint.contract import Region, TensorInfo
from compt_megatron.checkpoint.guard import Guard
from compt_megatron.checkpoint.state_file import StateFile, open_state_file
from compt_megatron.errors import UserError
from compt_megatron.recipe.files import read_json

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
# in the order of preference: the hub often has both kinds of the same model
_KINDS = ((WEIGHTS, INDEX), ("pytorch_model.bin", "pytorch_model.bin.index.json"))
_SHARD = re.compile(r"(?:model|pytorch_model)-\d{5}-of-(\d{5})\.(?:safetensors|bin)")

Index = dict[str, str]  # key -> name of the file that holds it


def shard_name(index: int, count: int) -> str:
    """The name of shard `index`, counted from 0, of `count`."""
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def has_weights(folder: Path) -> bool:
    """Whether a folder has a file of weights, or of an index, by one of transformers' names."""
    return any((folder / name).is_file() for kind in _KINDS for name in kind) or _stray(folder) is not None


def weight_files(folder: Path) -> tuple[list[str], Index | None]:
    """The names of the files that hold the weights, and the index that says so where there is one.

    Raises UserError if there are none, an index is damaged, or two sets of weights lie side by side.
    """
    for single, index_name in _KINDS:
        index = _read_index(folder / index_name) if (folder / index_name).is_file() else None
        names = sorted(set(index.values())) if index is not None else [single]
        there = (folder / single).is_file()
        if index is not None and there and names != [single]:
            raise UserError(
                f"{folder}: holds two sets of weights, {single} and the shards of {index_name}; move one of them away"
            )
        if index is not None or there:
            return names, index
    if (stray := _stray(folder)) is not None:
        raise UserError(f"{folder}: has {stray} but no {INDEX}, which says what the shards hold; restore it")
    raise UserError(f"{folder}: has no {WEIGHTS} or {INDEX}; restore it or give the weights' own path")


def refuse_shard(path: Path) -> None:
    """Raise UserError if `path` is one shard of several by its name."""
    found = _SHARD.fullmatch(path.name)
    if found and int(found.group(1)) > 1:
        raise UserError(f"{path}: is one of {int(found.group(1))} shards; give the folder that holds them all")


def _stray(folder: Path) -> str | None:
    return min((path.name for path in folder.iterdir() if _SHARD.fullmatch(path.name)), default=None)


def _read_index(path: Path) -> Index:
    found = read_json(path).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise UserError(f"{path}: has no 'weight_map' from tensors to files; restore it")
    for key, name in found.items():
        if not isinstance(name, str) or Path(name).name != name:
            raise UserError(f"{path}: says that '{key}' lies in {name!r}, which is no file of this folder; restore it")
    return found


class Shards:
    """The tensors of one state dict that lies in one or several files of a folder.

    Opening reads the files' headers only. A file that has a checksum is checked before the first tensor of it is read.
    Raises UserError if a file is missing or damaged, or does not hold what the index says.
    """

    def __init__(self, guard: Guard, names: list[str], index: Index | None, trust_pickle: bool) -> None:
        self._guard, self._trust = guard, trust_pickle
        self._files: dict[str, StateFile] = {}
        self._infos: dict[str, TensorInfo] = {}
        self._home: Index = {}
        try:
            for name in names:
                self._add(name, index or {})
            for key, name in (index or {}).items():
                if key not in self._home:
                    raise UserError(
                        f"{guard.folder / name}: has no '{key}', which the index says it holds; restore both"
                    )
        except BaseException:
            self.close()
            raise

    def _add(self, name: str, index: Index) -> None:
        path = self._guard.folder / name
        if not path.is_file():
            raise UserError(f"{path}: this file of the checkpoint is missing; restore it or use another checkpoint")
        self._files[name] = open_state_file(path, self._trust)
        for key, info in self._files[name].tensors().items():
            if index.get(key, name) != name:
                continue
            if key in self._home:
                raise UserError(f"{path}: holds '{key}', and so does {self._home[key]}; restore the checkpoint")
            self._home[key], self._infos[key] = name, info

    def tensors(self) -> dict[str, TensorInfo]:
        return dict(self._infos)

    def read(self, key: str, region: Region) -> torch.Tensor:
        """A new tensor with the values of a box of tensor `key`."""
        name = self._home[key]
        self._guard.file(name)
        return self._files[name].read(key, region)

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files = {}
