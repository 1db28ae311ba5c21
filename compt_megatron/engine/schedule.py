"""Learning-rate schedules: linear warm-up, then cosine or constant, as open_clip's trainer has them."""

from __future__ import annotations

from math import cos, pi

from compt_megatron.recipe.sections import OptimizerSettings


def learning_rate(settings: OptimizerSettings, step: int, total_steps: int) -> float:
    """The rate of step `step` (counted from 0) of `total_steps`."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return settings.lr
    done = (step - settings.warmup_steps) / max(1, total_steps - settings.warmup_steps)
    return settings.final_lr + 0.5 * (1 + cos(pi * min(1.0, done))) * (settings.lr - settings.final_lr)
