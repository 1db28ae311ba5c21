"""The weight of a term of the loss over the steps of a link."""

from __future__ import annotations

from math import cos, pi
from typing import Literal, get_args

from compt_megatron.errors import UserError

Schedule = Literal["constant", "cosine", "linear"]


class WeightSchedule:
    """`weight`, constant or with a cosine or linear decay to 0 at `end_step` (None: the link's last step).

    From `end_step` on the weight is 0, a constant one too. `section`: the recipe's section, for messages. Raises
    UserError for a setting that is none.
    """

    def __init__(
        self, weight: float, schedule: Schedule = "constant", end_step: int | None = None, section: str = "align"
    ) -> None:
        if schedule not in get_args(Schedule):
            raise UserError(f"{section}.schedule is '{schedule}'; use one of: {', '.join(get_args(Schedule))}")
        if not weight >= 0.0:
            raise UserError(f"{section}.weight is {weight}; use 0 or a positive number")
        if end_step is not None and end_step < 1:
            raise UserError(f"{section}.end_step is {end_step}; use a positive number of steps, or leave it out")
        self.weight, self.schedule, self.end_step = weight, schedule, end_step

    def at(self, step: int, total_steps: int) -> float:
        """The weight in step `step` (from 0). 0 from the end step on: the teacher need not run then."""
        end = self.end_step if self.end_step is not None else total_steps
        if step >= end:
            return 0.0
        if self.schedule == "cosine":
            return self.weight * 0.5 * (1.0 + cos(pi * step / end))
        return self.weight * (1.0 - step / end) if self.schedule == "linear" else self.weight
