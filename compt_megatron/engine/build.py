"""The engine that a recipe names."""

from __future__ import annotations

import torch

from compt_megatron.engine.layers import check_layers
from compt_megatron.engine.optimizer import uses_apex
from compt_megatron.engine.training_step import TrainingEngine
from compt_megatron.engine.zero_config import check_disk
from compt_megatron.recipe.parallel_section import ParallelSettings
from compt_megatron.recipe.schema import Settings


def engine_class(parallel: ParallelSettings) -> type[TrainingEngine]:
    """The class of a layout's engine; see `TrainingEngine` for what it is made with."""
    if parallel.engine == "megatron":
        from compt_megatron.engine.megatron import MegatronEngine

        return MegatronEngine
    from compt_megatron.engine.deepspeed import DeepSpeedEngine

    return DeepSpeedEngine


def check_machine(settings: Settings, device: torch.device) -> None:
    """Raise UserError for what a link's settings name and this machine has not: Transformer Engine, apex, libaio."""
    check_layers(settings.parallel, device)
    check_disk(settings.parallel)
    uses_apex(settings.optimizer, {device.type}, settings.parallel.tensor > 1)
