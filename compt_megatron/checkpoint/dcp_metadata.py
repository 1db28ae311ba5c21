"""The `.metadata` file of torch.distributed.checkpoint, read without running what a pickle may ask for.

Reading makes plain records of our own in the place of torch's classes: importing those takes as long as torch itself.
"""

from __future__ import annotations

import importlib
import os
import pathlib
import pickle
import sys
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import torch

from compt_megatron.errors import UserError

_TORCH = "torch.distributed.checkpoint."  # the package of the classes that the file names


class _Record:
    """An object of one of torch's data classes: its attributes, whichever that version has."""

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state)


class Metadata(_Record):
    """The whole file."""

    state_dict_metadata: dict[str, Any]
    storage_data: dict[Any, Any]


class TensorStorage(_Record):
    """A tensor: its properties, size, and stored boxes (`chunks`)."""

    properties: Properties
    size: torch.Size
    chunks: list[Any]


class Properties(_Record):
    """A tensor's dtype, and what else torch remembers of it."""

    dtype: torch.dtype

    def __setstate__(self, state: Any) -> None:
        self.dtype = state[0] if isinstance(state, tuple) else state["dtype"]


@dataclass(frozen=True)
class Index:
    """Names a stored box by its tensor and its offset, or an object."""

    fqn: str
    offset: torch.Size | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({"fqn": state["fqn"], "offset": state.get("offset")})


def _memory_format(value: Any) -> Any:
    return value


_CLASSES: dict[tuple[str, str], Any] = {
    (f"{_TORCH}metadata", "Metadata"): Metadata,
    (f"{_TORCH}metadata", "TensorStorageMetadata"): TensorStorage,
    (f"{_TORCH}metadata", "TensorProperties"): Properties,
    (f"{_TORCH}metadata", "MetadataIndex"): Index,
    (f"{_TORCH}metadata", "_MEM_FORMAT_ENCODING"): _memory_format,
    **{
        (f"{_TORCH}metadata", name): _Record for name in ("BytesStorageMetadata", "ChunkStorageMetadata", "StorageMeta")
    },
    (f"{_TORCH}filesystem", "_StorageInfo"): _Record,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "set"): set,
    **{(module, "PosixPath"): pathlib.PurePosixPath for module in ("pathlib", "pathlib._local")},
}


_UNUSED = ("megatron.core.", "torch.distributed.checkpoint.", "nvidia_resiliency_ext.")


class _Inert:
    """Stands for an object that we do not use, such as the plan of the save; none of its code runs."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any, trust: bool) -> None:
        super().__init__(file)
        self._trust = trust

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _CLASSES:
            return _CLASSES[module, name]
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        if module.startswith(_UNUSED):
            return _Inert
        if self._trust:
            return super().find_class(module, name)
        raise PermissionError(f"{module}.{name}")


def read_dcp_metadata(path: Path, trust_pickle: bool) -> Metadata:
    """Unpickle a `.metadata` file; only plain data classes are made unless `trust_pickle`.

    Raises UserError if it is damaged or asks for anything else.
    """
    try:
        with open(path, "rb") as file:
            found = _Unpickler(file, trust_pickle).load()
    except PermissionError as error:
        raise UserError(
            f"{path}: its pickle asks for {error}; if you trust who wrote it, pass --trust-pickle"
        ) from error
    except Exception as error:  # a damaged pickle raises nearly anything
        raise UserError(f"{path}: damaged ({error}); restore it or use another checkpoint") from error
    if not isinstance(found, Metadata) or not isinstance(getattr(found, "storage_data", None), dict):
        raise UserError(f"{path}: is not the metadata of a torch.distributed.checkpoint folder; use another checkpoint")
    return found


def import_beside() -> None:
    """Begin to import what `dcp_metadata_bytes` needs, in a thread: who will call it has other things to do first."""
    if f"{_TORCH}filesystem" not in sys.modules:
        thread = Thread(target=importlib.import_module, args=(f"{_TORCH}filesystem",), daemon=True)
        thread.start()
        os.register_at_fork(before=thread.join)  # a module that is half imported would stay so in the child


def dcp_metadata_bytes(
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]],
    chunks: list[tuple[str, tuple[int, ...], tuple[int, ...], str, int, int]],
    blobs: list[tuple[str, str, int, int]],
) -> bytes:
    """Pickle the metadata of a folder.

    `tensors`: key -> (global shape, dtype); `chunks`: (key, offsets, sizes, file, byte offset, byte length) of each
    stored box; `blobs`: (key, file, byte offset, byte length) of each stored object.
    """
    from torch.distributed.checkpoint import filesystem, metadata

    state: dict[str, Any] = {}
    storage: dict[Any, Any] = {}
    for key, (shape, dtype) in tensors.items():
        properties = metadata.TensorProperties(dtype=dtype)
        state[sys.intern(key)] = metadata.TensorStorageMetadata(properties, torch.Size(shape), [])
    # interned: equal strings are one object, whether or not they come from a journal, so that the pickle is the same
    for key, offsets, sizes, file, start, length in sorted(chunks):
        state[key].chunks.append(metadata.ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
        place = metadata.MetadataIndex(sys.intern(key), offsets)
        storage[place] = filesystem._StorageInfo(sys.intern(file), start, length)
    for key, file, start, length in sorted(blobs):
        state[sys.intern(key)] = metadata.BytesStorageMetadata()
        storage[metadata.MetadataIndex(sys.intern(key))] = filesystem._StorageInfo(sys.intern(file), start, length)
    content = metadata.Metadata(state, None, storage, metadata.StorageMeta(), "1.0.0")
    return pickle.dumps(content)
