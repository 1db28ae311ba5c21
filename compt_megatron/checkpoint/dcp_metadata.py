"""The `.metadata` file of torch.distributed.checkpoint, read without running what a pickle may ask for.

Neither reading nor writing imports torch's classes, which takes nearly as long as importing torch: plain records of our
own stand for them.
"""

from __future__ import annotations

import pathlib
import pickle
import sys
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
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


def dcp_metadata_bytes(
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]],
    chunks: list[tuple[str, tuple[int, ...], tuple[int, ...], str, int, int]],
    blobs: list[tuple[str, str, int, int]],
) -> bytes:
    """Pickle the metadata of a folder.

    `tensors`: key -> (global shape, dtype); `chunks`: (key, offsets, sizes, file, byte offset, byte length) of each
    stored box; `blobs`: (key, file, byte offset, byte length) of each stored object.
    """
    make = _makers()
    state: dict[str, Any] = {}
    storage: dict[Any, Any] = {}
    for key, (shape, dtype) in tensors.items():
        properties = make.TensorProperties(dtype=dtype)
        state[sys.intern(key)] = make.TensorStorageMetadata(properties=properties, size=torch.Size(shape), chunks=[])
    # interned: equal strings are one object, whether or not they come from a journal, so that the pickle is the same
    for key, offsets, sizes, file, start, length in sorted(chunks):
        box = make.ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(sizes))
        state[key].chunks.append(box)
        place = make.MetadataIndex(fqn=sys.intern(key), index=None, offset=torch.Size(offsets))
        storage[place] = make._StorageInfo(relative_path=sys.intern(file), offset=start, length=length)
    for key, file, start, length in sorted(blobs):
        state[sys.intern(key)] = make.BytesStorageMetadata()
        place = make.MetadataIndex(fqn=sys.intern(key), index=None)
        storage[place] = make._StorageInfo(relative_path=sys.intern(file), offset=start, length=length)
    about = make.StorageMeta(checkpoint_id=None, save_id=None, load_id=None, modules=[])
    content = make.Metadata(
        state_dict_metadata=state, planner_data=None, storage_data=storage, storage_meta=about, version="1.0.0"
    )
    with _named_as_torch(make):
        return pickle.dumps(content, protocol=4)


def _makers() -> SimpleNamespace:
    """Torch's classes if they are loaded, else classes of ours that pickle writes as torch's."""
    modules = [sys.intern(f"{_TORCH}{name}") for name in ("metadata", "filesystem")]
    if all(module in sys.modules for module in modules):
        return SimpleNamespace(**{name: getattr(sys.modules[modules[kind]], name) for name, kind in _WRITTEN.items()})
    made: dict[str, Any] = {
        name: type(name, (_Plain,), {"__module__": modules[kind]}) for name, kind in _WRITTEN.items()
    }
    contiguous = made["_MEM_FORMAT_ENCODING"]()
    made["_MEM_FORMAT_ENCODING"].__reduce__ = lambda self: (type(self), (0,))
    made["TensorProperties"].__getstate__ = lambda self: (self.dtype, torch.strided, False, contiguous, False)
    return SimpleNamespace(**made)


class _Plain:
    """An object whose attributes are what it is made with."""

    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)


# torch's classes that are written, and whether they are of its module `metadata` (0) or `filesystem` (1)
_WRITTEN = {
    "BytesStorageMetadata": 0,
    "ChunkStorageMetadata": 0,
    "Metadata": 0,
    "MetadataIndex": 0,
    "StorageMeta": 0,
    "TensorProperties": 0,
    "TensorStorageMetadata": 0,
    "_MEM_FORMAT_ENCODING": 0,
    "_StorageInfo": 1,
}


@contextmanager
def _named_as_torch(make: SimpleNamespace) -> Iterator[None]:
    """Inside, pickle finds the classes of ours where torch's would be: it writes no name that it cannot look up."""
    stubs: dict[str, ModuleType] = {}
    for name, made in vars(make).items():
        if made.__module__ not in sys.modules or made.__module__ in stubs:
            setattr(stubs.setdefault(made.__module__, ModuleType(made.__module__)), name, made)
    sys.modules.update(stubs)
    try:
        yield
    finally:
        for name in stubs:
            del sys.modules[name]
