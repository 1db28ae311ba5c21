"""One file of a state dict, safetensors or torch's own: opened by content, and told whose model it holds by names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Protocol

import torch

from compt_megatron.checkpoint.contract import Region, TensorInfo
from compt_megatron.checkpoint.safetensors_file import SafetensorsFile, header_bytes, is_safetensors
from compt_megatron.checkpoint.torch_file import TorchFile, is_torch_file, pickle_bytes
from compt_megatron.errors import UserError

_POINTER = b"version https://git-lfs.github.com/spec"
_MOST_NAMES = 64 * 2**20  # bytes of a pickle that are looked through for names
# the token embeddings of language models in transformers; open_clip's models have a vision tower
_LANGUAGE_MODEL, _VISION = re.compile(rb"\b(wte|embed_tokens)\.weight"), re.compile(rb"\bvisual\.")


class StateFile(Protocol):
    """An open state dict: tensors under the names that the file gives them."""

    def tensors(self) -> dict[str, TensorInfo]: ...
    def read(self, key: str, region: Region) -> torch.Tensor: ...
    def close(self) -> None: ...


def open_state_file(path: Path, trust_pickle: bool = False) -> StateFile:
    """Open a state dict. Raises UserError if it is damaged or holds something else; `trust_pickle`: see TorchFile."""
    with open(path, "rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise UserError(f"{path}: is git-lfs's pointer to the weights; fetch the file itself with `git lfs pull`")
    if path.suffix == ".safetensors" or is_safetensors(path):
        return SafetensorsFile(path)
    return TorchFile(path, trust_pickle)


def is_state_file(path: Path) -> bool:
    """Whether `path` is a file that looks like a state dict in safetensors or torch's own format."""
    return path.is_file() and (is_safetensors(path) or is_torch_file(path))


def holds_language_model(path: Path) -> bool:
    """Whether a state file names a language model's tensors as transformers does. Reads its names, no tensors."""
    try:
        names = header_bytes(path) if is_safetensors(path) else pickle_bytes(path, _MOST_NAMES)
    except ValueError:
        return False
    return _LANGUAGE_MODEL.search(names) is not None and _VISION.search(names) is None
