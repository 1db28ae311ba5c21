"""Objectives by name. Adding one: a file with its class, and a line here."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable
from typing import Any

from compt_megatron.errors import UserError
from compt_megatron.objectives.base import Objective
from compt_megatron.objectives.causal_lm import CausalLmObjective
from compt_megatron.objectives.classify import ClassifyObjective
from compt_megatron.objectives.clip import ClipObjective
from compt_megatron.objectives.siglip import SigLipObjective

OBJECTIVES: dict[str, Callable[..., Objective]] = {
    objective.name: objective for objective in (ClipObjective, SigLipObjective, ClassifyObjective, CausalLmObjective)
}


def build_objective(name: str, **options: Any) -> Objective:
    """Make the objective `name` with its options (a recipe's `objective:`); UserError for an unknown name or option."""
    if name not in OBJECTIVES:
        raise UserError(f"objective.name is '{name}', which is unknown; {_suggest(name, OBJECTIVES)}")
    known = inspect.signature(OBJECTIVES[name]).parameters
    for option in options:
        if option not in known:
            raise UserError(f"objective.{option} is no option of '{name}'; {_suggest(option, known)}")
    return OBJECTIVES[name](**options)


def _suggest(word: str, known: Iterable[str]) -> str:
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1)
    return f"did you mean '{close[0]}'?" if close else f"use one of: {', '.join(names)}"
