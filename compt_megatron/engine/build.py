"""The engine that a recipe names."""

from __future__ import annotations

from compt_megatron.engine.training_step import TrainingEngine
from compt_megatron.recipe.parallel_section import ParallelSettings


def engine_class(parallel: ParallelSettings) -> type[TrainingEngine]:
    """The class of a layout's engine; see `TrainingEngine` for what it is made with."""
    if parallel.engine == "megatron":
        from compt_megatron.engine.megatron import MegatronEngine

        return MegatronEngine
    from compt_megatron.engine.deepspeed import DeepSpeedEngine

    return DeepSpeedEngine
