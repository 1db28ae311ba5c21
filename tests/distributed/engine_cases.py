"""A tiny engine on fixed batches: what the tests of the engine and of its checkpoints share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from compt_megatron.data.batch import Batch
from compt_megatron.spec.families import spec_from_config
from compt_megatron.spec.random import initial
from compt_megatron.spec.table import ModelSpec

CONFIG: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 2, "ls_init_value": 0.5},
}
TEACHER = {**CONFIG, "embed_dim": 12}
ROWS, CAPTIONS, STEPS, LR, DECAY, BETAS, EPS = 16, 2, 3, 1e-2, 0.1, (0.9, 0.98), 1e-6
Case = tuple[int, int]  # ZeRO stage, micro-batches


def whole_batch(step: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(ROWS, 3, 16, 16, generator=generator)
    texts = torch.randint(1, 64, (ROWS, CAPTIONS, 8), generator=generator)
    return Batch(images, texts, None, [str(row) for row in range(ROWS)], step)


def rank_batch(step: int, rank: int, world: int) -> Batch:
    return whole_batch(step).split(world)[rank]


def start_weights(spec: ModelSpec, seed: int = 3) -> dict[str, torch.Tensor]:
    return {name: initial(param, seed) for name, param in spec.params.items()}


def make_engine(runtime: Any, case: Case, precision: str = "fp32", aligned: bool = False, **optimizer: Any) -> Any:
    from compt_megatron.align.alignment import Alignment
    from compt_megatron.align.projection import Projections
    from compt_megatron.align.teacher import Teacher
    from compt_megatron.engine.deepspeed import DeepSpeedEngine
    from compt_megatron.models.build import build_model
    from compt_megatron.models.state import load_canonical
    from compt_megatron.objectives.registry import build_objective
    from compt_megatron.recipe.load import recipe_from

    zero, micro_batches = case
    values = {
        "name": "test",
        "precision": precision,
        "data": {"train": "emoji/train", "batch_size": ROWS, "captions": CAPTIONS},
        "optimizer": {"lr": LR, "weight_decay": DECAY, "betas": list(BETAS), "eps": EPS, **optimizer},
        "parallel": {"zero": zero, "micro_batches": micro_batches},
        "links": [{"model": "ViT-B-32", "steps": 100}],
    }
    settings = recipe_from(values).link_settings(0)
    spec = spec_from_config(CONFIG, "tiny")
    teacher = alignment = projections = None
    if aligned:
        teacher_spec = spec_from_config(TEACHER, "teacher")
        model = build_model(teacher_spec)
        weights = start_weights(teacher_spec, 7)
        load_canonical(model, teacher_spec, weights.__getitem__)
        teacher, alignment = Teacher(model, teacher_spec), Alignment(weight=0.7)
        projections = Projections.between(spec, teacher_spec, seed=0)
    return DeepSpeedEngine(
        spec, settings, build_objective("clip"), runtime, total_steps=100,
        teacher=teacher, alignment=alignment, projections=projections,
    )  # fmt: skip


def write_start(path: Path) -> Path:
    from compt_megatron.growth.fresh import write_fresh

    return write_fresh(spec_from_config(CONFIG, "tiny"), path, seed=3)


def state_of(engine: Any) -> dict[str, torch.Tensor]:
    """Full masters and first moments by the student's parameter names. Collective."""
    state = {}
    for name, param in engine._student.named_parameters():
        state[name] = engine._state.master(param).clone()
        state[f"exp_avg/{name}"] = engine._state.moment(param, "exp_avg").clone()
        state[f"exp_avg_sq/{name}"] = engine._state.moment(param, "exp_avg_sq").clone()
    return state
