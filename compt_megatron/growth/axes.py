"""The registry of axis modes: the rules by which one logical axis grows.

A mode is one class in one file of `modes/`, its docstring the formula, the conditions and the source; adding one is
that file and one entry here. Which mode an axis gets is the operator's choice (`operators.py`) or the user's.
"""

from __future__ import annotations

from typing import Protocol

from compt_megatron.errors import UserError
from compt_megatron.growth.modes.append import Append
from compt_megatron.growth.modes.corner import Corner
from compt_megatron.growth.modes.identity import Identity
from compt_megatron.growth.modes.joint_pad import JointPad
from compt_megatron.growth.modes.mean_pad import MeanPad
from compt_megatron.growth.modes.tile import Tile
from compt_megatron.growth.modes.zero_pad import ZeroPad
from compt_megatron.growth.segments import Segment, Site


class AxisMode(Protocol):
    """One rule. `axes`: the logical axes that it can grow; `exact`: whether the grown model's function is the same."""

    name: str
    axes: frozenset[str]
    exact: bool

    def segments(self, site: Site) -> list[Segment]:
        """Segments that cover the target's indices of one dimension. Raises UserError for sizes it cannot connect."""
        ...


MODES: dict[str, AxisMode] = {
    mode.name: mode for mode in (Identity(), MeanPad(), ZeroPad(), Tile(), Append(), Corner(), JointPad())
}


def axis_mode(name: str, axis: str) -> AxisMode:
    """The mode called `name`, which must be able to grow `axis`. Raises UserError otherwise."""
    able = [mode.name for mode in MODES.values() if axis in mode.axes]
    if name not in able:
        raise UserError(f"axis {axis!r} has no growth mode {name!r}; choose one of {', '.join(able)}")
    return MODES[name]
