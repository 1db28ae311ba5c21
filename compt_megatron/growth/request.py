"""What an operator is asked for."""

from __future__ import annotations

from dataclasses import dataclass

from compt_megatron.spec.table import ModelSpec


@dataclass(frozen=True)
class Request:
    """A pair of models that growth connects, and the user's choices (None or empty: the operator's own)."""

    source: ModelSpec
    target: ModelSpec
    depth: str | None
    axes: dict[str, str]
    seed: int
    allow_approximate: bool
