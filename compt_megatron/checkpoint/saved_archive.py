"""Look into a file that torch.save wrote: its objects, with tensors as descriptions that are read box by box.

The pickle inside is unpickled by a restricted unpickler. It makes plain containers, torch's sizes and dtypes, and for
the classes that DeepSpeed leaves in its files inert stand-ins that run nothing. DeepSpeed need not be installed.
"""

from __future__ import annotations

import collections
import io
import os
import pickle
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compt_megatron.checkpoint.contract import Region
from compt_megatron.checkpoint.open_files import OpenFiles
from compt_megatron.checkpoint.saved_tensor import LOCAL_HEADER, STORAGES, FileSlice, fill, read_strided, strides
from compt_megatron.errors import UserError
from compt_megatron.torchvision_mend import ensure_torchvision_if_installed


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the file: its elements begin at byte `start`, `stride` elements apart; the file holds no more than
    `room` elements from there on."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    stride: tuple[int, ...]
    start: int
    room: int

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def span(self) -> int:
        """Elements from the first to the last one."""
        return sum((size - 1) * step for size, step in zip(self.shape, self.stride)) + 1 if self.numel else 0


class Inert:
    """Stands for an object of a class that is not loaded, such as a loss scaler or the arguments of a trainer; `args`
    and `state` are what it would have been made of."""

    args: tuple[Any, ...] = ()
    state: Any = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __call__(self, *args: Any, **kwargs: Any) -> Inert:
        """What a function would make."""
        return Inert(*args)

    def append(self, value: Any) -> None:
        """What a list would keep."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """What a dict would keep."""


_CLASSES: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("collections", "defaultdict"): collections.defaultdict,
    ("torch", "Size"): torch.Size,
    ("torch", "device"): Inert,
    ("torch", "Tensor"): Inert,
    ("torch.nn.parameter", "Parameter"): Inert,
    ("argparse", "Namespace"): Inert,
    ("deepspeed.runtime.zero.config", "ZeroStageEnum"): int,
    **{("builtins", kind.__name__): kind for kind in (set, frozenset, slice, complex, dict, list, int)},
    **{("torch", name): dtype for name, dtype in STORAGES.items()},
}
_UNUSED = ("deepspeed.",)  # the beginnings of the module names whose classes become inert


class _Unpickler(pickle.Unpickler):
    """Makes the objects of `data.pkl`; `place` finds a storage's first byte and its number of bytes by its key."""

    def __init__(self, file: Any, places: dict[str, tuple[int, int]], trust: bool, inert: tuple[str, ...]) -> None:
        super().__init__(file)
        self._places, self._trust, self._inert = places, trust, inert

    def find_class(self, module: str, name: str) -> Any:
        module = "builtins" if module == "__builtin__" else module  # torch pickles for Python 2 too
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _described
        if module == "torch._utils" and name in ("_rebuild_parameter", "_rebuild_parameter_with_state"):
            return lambda tensor, *rest: tensor
        if (module, name) == ("torch._tensor", "_rebuild_from_type_v2"):  # a tensor that somebody gave attributes
            return lambda build, kind, args, state: build(*args)
        if (module, name) in _CLASSES:
            return _CLASSES[module, name]
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        if module.startswith(self._inert):
            return Inert
        if self._trust:
            if module not in sys.modules:  # a model's class: its module may import torchvision
                ensure_torchvision_if_installed()
            return super().find_class(module, name)
        raise PermissionError(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        _, dtype, key, _, _ = pid
        return dtype, self._places[key]


def _described(storage: Any, offset: int, size: Any, stride: Any, *rest: Any) -> StoredTensor:
    dtype, (start, length) = storage
    room = length // dtype.itemsize - offset
    found = StoredTensor(tuple(size), dtype, tuple(stride), start + offset * dtype.itemsize, room)
    if found.span > room:
        raise ValueError(f"a tensor of {found.span} elements where {room} are stored")
    return found


def not_installed(path: Path, error: ModuleNotFoundError) -> str:
    """What is said of a pickle whose classes are in a package that is not here."""
    return f"{path}: its pickle needs the package '{error.name}'; install it, or save the model's state dict alone"


class SavedArchive:
    """A file of torch.save. `content`: what was saved, tensors as `StoredTensor`; `files` opens it for reading.

    Raises UserError if the file is damaged, or its pickle asks for other classes and `trust_pickle` is not given.
    """

    def __init__(
        self,
        path: Path,
        files: OpenFiles,
        trust_pickle: bool = False,
        inert: tuple[str, ...] = _UNUSED,
        span: tuple[int, int] | None = None,
    ) -> None:
        """`inert`: the beginnings of the module names whose classes become inert; `span`: first byte and length of the
        archive, where it is not all of the file."""
        self.path, self._files = path, files
        try:
            self._start, length = span or (0, path.stat().st_size)
            stream: Any = io.BufferedReader(FileSlice(files.descriptor(path), self._start, length))
            with zipfile.ZipFile(stream) as archive:
                entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
                order = archive.read(entries["byteorder"]) if "byteorder" in entries else b"little"
                if order != b"little" or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.values()):
                    raise ValueError("compressed or big-endian")
                pickled = archive.read(entries["data.pkl"])
            places = {
                name.removeprefix("data/"): (self._data_start(entry), entry.file_size)
                for name, entry in entries.items()
                if name.startswith("data/")
            }
            self.content = _Unpickler(io.BytesIO(pickled), places, trust_pickle, inert).load()
        except PermissionError as error:
            if error.errno is not None:  # the file's own permissions
                raise UserError(f"{path}: cannot be read ({error.strerror}); change its permissions") from error
            raise UserError(
                f"{path}: its pickle asks for {error}; if you trust who wrote it, pass --trust-pickle"
            ) from error
        except ModuleNotFoundError as error:
            raise UserError(not_installed(path, error)) from error
        except Exception as error:  # damaged bytes raise nearly anything
            reason = " ".join(str(error).split()).partition(". ")[0] or type(error).__name__
            raise UserError(
                f"{path}: damaged or no file of torch.save ({reason}); restore it or use another"
            ) from error

    def _data_start(self, entry: zipfile.ZipInfo) -> int:
        at = self._start + entry.header_offset
        header = LOCAL_HEADER.unpack(os.pread(self._files.descriptor(self.path), LOCAL_HEADER.size, at))
        return int(at + LOCAL_HEADER.size + header[-2] + header[-1])

    def read(self, tensor: StoredTensor, box: Region) -> torch.Tensor:
        """The values of a box of a tensor of this file, as a new tensor. Memory: the rows that the box touches."""
        try:
            descriptor = self._files.descriptor(self.path)
            if tensor.stride == strides(tensor.shape) or tensor.numel <= 1:
                return read_strided(descriptor, tensor.start, tensor.shape, tensor.dtype, box)
            span = torch.empty(tensor.span, dtype=tensor.dtype)  # in another memory format, such as channels last
            fill(descriptor, tensor.start, span.view(torch.uint8).numpy().data)
            return span.as_strided(tensor.shape, tensor.stride)[box].clone(memory_format=torch.contiguous_format)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error}); restore it or use another checkpoint") from error

    def read_flat(self, tensor: StoredTensor, at: int, shape: tuple[int, ...], box: Region) -> torch.Tensor:
        """The values of a box of a tensor of `shape` that lies in a flat tensor of this file, from element `at` on."""
        start = tensor.start + at * tensor.dtype.itemsize
        return self.read(StoredTensor(shape, tensor.dtype, strides(shape), start, tensor.room - at), box)
