"""Whether NVIDIA's Transformer Engine is here, and megatron-core's wrappers of it: used where they are, never required.

megatron-core expects Transformer Engine to be there and whole, or absent. One that is installed and cannot be imported
(built for another torch, without its libraries), or that megatron-core's wrappers do not fit, would stop megatron-core
from being imported at all: it is hidden from this process, and why is kept for whoever asks.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable

PACKAGE = "transformer_engine"

_hidden: str | None = None  # why it was hidden


def import_beside(dependants: str, import_them: Callable[[], object]) -> None:
    """Import Transformer Engine, if it is installed, and what makes use of it (modules whose names start with
    `dependants`); where either fails, import those without it."""
    if importlib.util.find_spec(PACKAGE) is None:
        import_them()
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of names that it has renamed
            importlib.import_module(f"{PACKAGE}.pytorch")
    except Exception as error:
        _hide(f"Transformer Engine cannot be imported ({in_one_line(error)})")
        import_them()
        return
    try:
        import_them()
    except Exception as error:
        _hide(f"megatron-core cannot use this Transformer Engine ({in_one_line(error)})")
        _forget(dependants)
        import_them()


def absence() -> str | None:
    """Why its layers cannot be built in this process, in words; None if they can. Imports nothing new."""
    if _hidden is not None:
        return _hidden
    if importlib.util.find_spec(PACKAGE) is None:
        return "Transformer Engine is not installed"
    wrappers = importlib.import_module("megatron.core.extensions.transformer_engine")
    return None if wrappers.HAVE_TE else "megatron-core does not find this Transformer Engine's modules"


def in_one_line(error: Exception) -> str:
    """An error's type and the first line of what it says, shortened."""
    said = str(error).strip().partition("\n")[0][:200]
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def _hide(reason: str) -> None:
    global _hidden
    _hidden = reason
    _forget(PACKAGE)
    sys.modules[PACKAGE] = None  # type: ignore[assignment]  # now its import raises ModuleNotFoundError


def _forget(package: str) -> None:
    for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
        del sys.modules[name]
