"""Values of model configs, checked: what every family's reader shares."""

from __future__ import annotations

from math import inf
from typing import Any

from compt_megatron.errors import UserError

MOST, MOST_LAYERS = 2**24, 1024  # so that a slip of the finger is not a table of a billion rows


def positive_integer(value: Any, field: str, where: str, layers: bool = False) -> int:
    """`value` of `field` in the config `where`. Raises UserError for anything else, or more than is supported."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{where}: '{field}' must be a positive integer, not {value!r}")
    most = MOST_LAYERS if layers else MOST
    if value > most:
        raise UserError(f"{where}: '{field}' is {value}; no more than {most} is supported")
    return value


def finite_number(value: Any, what: str, above: float = -inf) -> float:
    """`value` of `what` ("CONFIG: 'field'"), above `above`. Raises UserError for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not above < value < inf:
        raise UserError(f"{what} must be a number{f' above {above:g}' if above > -inf else ''}, not {value!r}")
    return float(value)
