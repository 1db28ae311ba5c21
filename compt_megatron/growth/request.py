"""What an operator is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from compt_megatron.spec.table import ModelSpec

Moments = Literal["fresh", "grow", "grow-all"]  # "grow-all": later copies keep their first moments too


@dataclass(frozen=True)
class Request:
    """A pair of models that growth connects, and the user's choices (None or empty: the operator's own)."""

    source: ModelSpec
    target: ModelSpec
    depth: str | None
    axes: dict[str, str]
    seed: int
    allow_approximate: bool
    noise: float = 0.0  # parts the copies that `tile` makes, in units of a fresh value
    moments: Moments = "fresh"
