"""The `.metadata` file of torch.distributed.checkpoint, read without running what a pickle may ask for."""

from __future__ import annotations

import pathlib
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata

from compt_megatron.errors import UserError

_CLASSES: dict[tuple[str, str], Any] = {
    **{
        ("torch.distributed.checkpoint.metadata", name): getattr(metadata, name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    },
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): filesystem._StorageInfo,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "set"): set,
    **{(module, "PosixPath"): pathlib.PurePosixPath for module in ("pathlib", "pathlib._local")},
}


_UNUSED = ("megatron.core.", "torch.distributed.checkpoint.")


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


def read_dcp_metadata(path: Path, trust_pickle: bool) -> metadata.Metadata:
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
    if not isinstance(found, metadata.Metadata) or not isinstance(found.storage_data, dict):
        raise UserError(f"{path}: is not the metadata of a torch.distributed.checkpoint folder; use another checkpoint")
    return found


def dcp_metadata_bytes(
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]],
    chunks: list[tuple[str, tuple[int, ...], tuple[int, ...], str, int, int]],
    blobs: list[tuple[str, str, int, int]],
) -> bytes:
    """Pickle the metadata of a folder.

    `tensors`: key -> (global shape, dtype); `chunks`: (key, offsets, sizes, file, byte offset, byte length) of each
    stored box; `blobs`: (key, file, byte offset, byte length) of each stored object.
    """
    state: dict[str, Any] = {}
    storage: dict[Any, Any] = {}
    for key, (shape, dtype) in tensors.items():
        properties = metadata.TensorProperties(dtype=dtype)
        state[key] = metadata.TensorStorageMetadata(properties, torch.Size(shape), [])
    for key, offsets, sizes, file, start, length in sorted(chunks):
        state[key].chunks.append(metadata.ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
        storage[metadata.MetadataIndex(key, offsets)] = filesystem._StorageInfo(file, start, length)
    for key, file, start, length in sorted(blobs):
        state[key] = metadata.BytesStorageMetadata()
        storage[metadata.MetadataIndex(key)] = filesystem._StorageInfo(file, start, length)
    content = metadata.Metadata(state, None, storage, metadata.StorageMeta(), "1.0.0")
    return pickle.dumps(content)
