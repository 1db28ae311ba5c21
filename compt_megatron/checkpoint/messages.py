"""What workers say to each other, as bytes: plain values, dtypes, paths and this project's records, and nothing else.

The bytes are a pickle, read by an unpickler that makes only those: whoever can reach a launcher's store can put bytes
there, and they must not be able to run anything.
"""

from __future__ import annotations

import importlib
import io
import pathlib
import pickle
from collections.abc import Callable
from dataclasses import is_dataclass
from typing import Any

import torch

_PACKAGE = __name__.partition(".")[0]
_PLAIN: dict[tuple[str, str], Any] = {
    ("builtins", "slice"): slice,
    ("torch", "Size"): torch.Size,
    **{(module, "PosixPath"): pathlib.PosixPath for module in ("pathlib", "pathlib._local")},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _PLAIN:
            return _PLAIN[module, name]
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        ours = module.partition(".")[0] == _PACKAGE
        found = getattr(importlib.import_module(module), name, None) if ours else None
        if isinstance(found, type) and (is_dataclass(found) or issubclass(found, tuple)):
            return found
        raise pickle.UnpicklingError(f"a worker's message asks for {module}.{name}")


def packed(value: Any) -> bytes:
    """The bytes of numbers, strings, bytes, slices, paths, dtypes, this package's dataclasses and named tuples, and
    containers of such."""
    return pickle.dumps(value)


def unpacked(message: bytes) -> Any:
    """The value of `packed` bytes. Raises pickle.UnpicklingError for bytes that ask for anything else."""
    return _Unpickler(io.BytesIO(message)).load()


def name_of(function: Callable[..., Any]) -> tuple[str, str]:
    """What a module's function is called, for `function_of` in a process that this one starts."""
    return function.__module__, function.__qualname__


def function_of(name: tuple[str, str]) -> Callable[..., Any]:
    """The inverse of `name_of`."""
    found: Callable[..., Any] = getattr(importlib.import_module(name[0]), name[1])
    return found
