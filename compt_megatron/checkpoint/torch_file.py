"""A state dict that torch.save wrote, bare, inside a trainer's file or inside a whole model, read by boxes."""

from __future__ import annotations

import os
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from compt_megatron.checkpoint.contract import Region, TensorInfo
from compt_megatron.checkpoint.open_files import OpenFiles
from compt_megatron.checkpoint.saved_archive import SavedArchive, StoredTensor, not_installed
from compt_megatron.errors import UserError
from compt_megatron.torchvision_mend import ensure_torchvision_if_installed

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
    """An open file of torch.save. Tensors are read where they lie; what is no plain archive is loaded by torch.

    A whole model, pickled or as TorchScript, is taken where `trust_pickle` is given. Raises UserError if the file is
    damaged, holds no state dict, not only plain tensors, or objects of other classes and `trust_pickle` is not given.
    """

    def __init__(self, path: Path, trust_pickle: bool = False) -> None:
        self.path = path
        self._files = OpenFiles(os.O_RDONLY)
        self._archive: SavedArchive | None = None
        try:
            self._content = _state_dict(path, self._opened(trust_pickle))
        except BaseException:
            self.close()
            raise

    def _opened(self, trust_pickle: bool) -> Any:
        if zipfile.is_zipfile(self.path):
            try:
                self._archive = SavedArchive(self.path, self._files, trust_pickle)
                return self._archive.content
            except UserError:  # compressed, sparse tensors, other classes: torch reads it, or knows what is wrong
                pass
        return _loaded(self.path, trust_pickle)

    def tensors(self) -> dict[str, TensorInfo]:
        """Shape and dtype of every tensor, in the order of the file."""
        return {key: TensorInfo(tuple(value.shape), value.dtype) for key, value in self._content.items()}

    def read(self, key: str, region: Region) -> torch.Tensor:
        """A new tensor with the values of a box of tensor `key`."""
        value = self._content[key]
        if isinstance(value, StoredTensor):
            assert self._archive is not None
            return self._archive.read(value, region)
        return value[region].detach().clone(memory_format=torch.contiguous_format)

    def close(self) -> None:
        self._content = {}
        self._files.close()


def _loaded(path: Path, trust_pickle: bool) -> Any:
    if trust_pickle:
        ensure_torchvision_if_installed()
    try:
        mapped = zipfile.is_zipfile(path)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*TorchScript archive")
            return torch.load(path, map_location="cpu", weights_only=not trust_pickle, mmap=mapped)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"its pickle asks for {wanted.group(1)}" if wanted else "its pickle is not a plain one"
        raise UserError(
            f"{path}: holds more than tensors and is not loaded ({reason}); save its state dict alone, or pass "
            "--trust-pickle if you trust who wrote it"
        ) from error
    except ModuleNotFoundError as error:
        raise UserError(not_installed(path, error)) from error
    except Exception as error:  # damaged bytes raise nearly anything
        if not trust_pickle and "TorchScript" in str(error):
            raise UserError(
                f"{path}: a TorchScript model, whose code would run; save its state dict alone, or pass --trust-pickle "
                "if you trust who wrote it"
            ) from error
        reason = str(error).strip().splitlines()[0].partition(". ")[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: damaged or no torch file ({reason}); restore it or use another") from error


def _state_dict(path: Path, content: Any) -> dict[str, torch.Tensor | StoredTensor]:
    """The tensors by name of what a file holds: a model, a state dict, or a trainer's file with one as `state_dict`."""
    if isinstance(content, torch.nn.Module):
        content = content.state_dict(keep_vars=True)  # its tensors may be descriptions, which cannot be detached
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        content = {}
    found = {key: value for key, value in content.items() if isinstance(value, torch.Tensor | StoredTensor)}
    if not found:
        raise UserError(f"{path}: holds no state dict; give a file of model weights")
    for key, value in found.items():
        plain = isinstance(value, StoredTensor) or (value.layout is torch.strided and not value.is_quantized)
        if not isinstance(key, str) or not plain:
            raise UserError(f"{path}: {key!r} is no plain tensor under a name; save a state dict of dense tensors")
    return found
