"""Chain-of-Models Pre-Training at scale: grow a model into the next larger one, align it, train the whole family."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from compt_megatron.chain.export import export
    from compt_megatron.chain.planner import make_plan as plan
    from compt_megatron.chain.runner import run as train
    from compt_megatron.chain.verify import verify
    from compt_megatron.checkpoint.api import convert, inspect
    from compt_megatron.growth.api import grow
    from compt_megatron.observe.report import write_report as report
    from compt_megatron.recipe.load import load_recipe

# What each command of the command line is as a function. Loaded on first use: the bare install is the grow tool, and
# importing the package costs nothing.
_PUBLIC = {
    "load_recipe": ("compt_megatron.recipe.load", "load_recipe"),
    "plan": ("compt_megatron.chain.planner", "make_plan"),
    "train": ("compt_megatron.chain.runner", "run"),
    "grow": ("compt_megatron.growth.api", "grow"),
    "convert": ("compt_megatron.checkpoint.api", "convert"),
    "inspect": ("compt_megatron.checkpoint.api", "inspect"),
    "verify": ("compt_megatron.chain.verify", "verify"),
    "export": ("compt_megatron.chain.export", "export"),
    "report": ("compt_megatron.observe.report", "write_report"),
}

__all__ = [
    "__version__",
    "load_recipe",
    "plan",
    "train",
    "grow",
    "convert",
    "inspect",
    "verify",
    "export",
    "report",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _PUBLIC[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_PUBLIC))
