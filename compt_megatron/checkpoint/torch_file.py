"""A state dict that torch.save wrote, bare or inside a trainer's file, mapped and not read whole."""

from __future__ import annotations

import pickle
import re
import zipfile
from pathlib import Path

import torch

from compt_megatron.checkpoint.contract import Region, TensorInfo
from compt_megatron.errors import UserError

_ZIP, _LEGACY_PICKLE = b"PK\x03\x04", b"\x80\x02"


def is_torch_file(path: Path) -> bool:
    """Whether the file begins as a file of torch.save does (a zip archive, or the bare pickle of older versions)."""
    with open(path, "rb") as file:
        head = file.read(4)
    return head == _ZIP or head[:2] == _LEGACY_PICKLE


def pickle_bytes(path: Path, limit: int) -> bytes:
    """At most `limit` bytes of the pickle that names the tensors of a file of torch.save; none if it is damaged."""
    if not zipfile.is_zipfile(path):
        with open(path, "rb") as file:
            return file.read(limit)
    try:
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
            with archive.open(name) as entry:
                return entry.read(limit)
    except (zipfile.BadZipFile, StopIteration, OSError, ValueError, EOFError, NotImplementedError, RuntimeError):
        return b""


class TorchFile:
    """An open file of torch.save. Raises UserError if it is damaged, holds no state dict or not only plain tensors."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except pickle.UnpicklingError as error:
            wanted = re.search(r"GLOBAL (\S+)", str(error))
            reason = f"its pickle asks for {wanted.group(1)}" if wanted else "its pickle is not a plain one"
            raise UserError(
                f"{path}: holds more than tensors and is not loaded ({reason}); save its state dict alone"
            ) from error
        except Exception as error:  # damaged bytes raise nearly anything
            reason = str(error).strip().splitlines()[0].partition(". ")[0] if str(error) else type(error).__name__
            raise UserError(f"{path}: damaged or no torch file ({reason}); restore it or use another") from error
        if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
            content = content["state_dict"]
        if not isinstance(content, dict) or not any(isinstance(value, torch.Tensor) for value in content.values()):
            raise UserError(f"{path}: holds no state dict; give a file of model weights")
        found = {key: value for key, value in content.items() if isinstance(value, torch.Tensor)}
        for key, value in found.items():
            if not isinstance(key, str) or value.layout is not torch.strided or value.is_quantized:
                raise UserError(f"{path}: {key!r} is no plain tensor under a name; save a state dict of dense tensors")
        self._content = found

    def tensors(self) -> dict[str, TensorInfo]:
        """Shape and dtype of every tensor, in the order of the file."""
        return {key: TensorInfo(tuple(value.shape), value.dtype) for key, value in self._content.items()}

    def read(self, key: str, region: Region) -> torch.Tensor:
        """A new tensor with the values of a box of tensor `key`."""
        return self._content[key][region].detach().clone(memory_format=torch.contiguous_format)

    def close(self) -> None:
        self._content = {}
