"""The engine that a recipe names."""

from __future__ import annotations

from compt_megatron.align.alignment import Alignment
from compt_megatron.align.projection import Projections
from compt_megatron.align.teacher import Teacher
from compt_megatron.engine.runtime import Runtime
from compt_megatron.engine.training_step import TrainingEngine
from compt_megatron.objectives.base import Objective
from compt_megatron.recipe.schema import Settings
from compt_megatron.spec.table import ModelSpec


def build_engine(
    spec: ModelSpec,
    settings: Settings,
    objective: Objective,
    runtime: Runtime,
    *,
    total_steps: int,
    teacher: Teacher | None = None,
    alignment: Alignment | None = None,
    projections: Projections | None = None,
) -> TrainingEngine:
    """The student of one link in training, without weights (`load`), in the layout of `settings.parallel`. Collective.

    The teacher must have been made for the same layout's process groups.
    """
    if settings.parallel.engine == "megatron":
        from compt_megatron.engine.megatron import MegatronEngine as Engine
    else:
        from compt_megatron.engine.deepspeed import DeepSpeedEngine as Engine  # type: ignore[assignment]
    return Engine(
        spec,
        settings,
        objective,
        runtime,
        total_steps=total_steps,
        teacher=teacher,
        alignment=alignment,
        projections=projections,
    )
