"""A tiny engine on fixed batches: what the tests of the engine and of its checkpoints share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from compt_megatron.data.batch import Batch
from compt_megatron.data.text.batch import TokenBatch
from compt_megatron.spec.families import spec_from_config
from compt_megatron.spec.huggingface_names import head_key
from compt_megatron.spec.random import initial
from compt_megatron.spec.table import ModelSpec

CONFIG: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 2, "ls_init_value": 0.5},
}
TEACHER = {**CONFIG, "embed_dim": 12}
ROWS, CAPTIONS, STEPS, LR, DECAY, BETAS, EPS = 16, 2, 3, 1e-2, 0.1, (0.9, 0.98), 1e-6
LAYERS = {0: 0, 2: 1, 3: 1}  # of a language model: student's -> teacher's
Case = tuple[int, int]  # ZeRO stage, micro-batches


def whole_batch(step: int, config: dict[str, Any] = CONFIG) -> Any:
    """Images with texts, or with labels for the config of a plain ViT; tokens for a language model's, of which rows
    count unequally."""
    generator = torch.Generator().manual_seed(step)
    if "model_type" in config:
        ids = torch.randint(0, config["vocab_size"], (ROWS, 12), generator=generator)
        mask = torch.rand(ROWS, 11, generator=generator) < torch.linspace(0.2, 1, ROWS)[:, None]
        return TokenBatch(ids[:, :-1], ids[:, 1:], mask, [str(row) for row in range(ROWS)], step)
    images = torch.randn(ROWS, 3, 16, 16, generator=generator)
    texts = torch.randint(1, 64, (ROWS, CAPTIONS, 8), generator=generator)
    names = [str(row) for row in range(ROWS)]
    if "text_cfg" in config:
        return Batch(images, texts, None, names, step)
    return Batch(images, None, texts[:, 0, 0] % config["embed_dim"], names, step)


def rank_batch(step: int, rank: int, world: int) -> Batch:
    return whole_batch(step).split(world)[rank]


def start_weights(spec: ModelSpec, seed: int = 3) -> dict[str, torch.Tensor]:
    return {name: initial(param, seed) for name, param in spec.params.items()}


def make_engine(runtime: Any, case: Case, precision: str = "fp32", aligned: bool = False, **optimizer: Any) -> Any:
    zero, micro_batches = case
    return engine_of(runtime, {"zero": zero, "micro_batches": micro_batches}, precision, aligned, **optimizer)


def engine_of(
    runtime: Any,
    parallel: dict[str, Any],
    precision: str = "fp32",
    aligned: bool = False,
    config: dict[str, Any] = CONFIG,
    factors: dict[str, tuple[float, float]] | None = None,
    **optimizer: Any,
) -> Any:
    """An engine in the layout `parallel`, a recipe's own section; it needs weights."""
    from compt_megatron.align.alignment import Alignment
    from compt_megatron.align.distillation import Distillation
    from compt_megatron.align.projection import Projections
    from compt_megatron.align.teacher import Teacher
    from compt_megatron.engine.build import engine_class
    from compt_megatron.engine.topology import Topology
    from compt_megatron.models.part import ModelPart
    from compt_megatron.objectives.registry import build_objective
    from compt_megatron.recipe.load import recipe_from

    values = {
        "name": "test",
        "precision": precision,
        "data": {"train": "emoji/train", "batch_size": ROWS, "captions": CAPTIONS},
        "optimizer": {"lr": LR, "weight_decay": DECAY, "betas": list(BETAS), "eps": EPS, **optimizer},
        "parallel": parallel,
        "links": [{"model": "ViT-B-32", "steps": 100}],
    }
    settings = recipe_from(values).link_settings(0)
    spec = spec_from_config(config, "tiny")
    teacher = alignment = distillation = projections = None
    if aligned:
        teacher_spec = spec_from_config(teacher_config(config), "teacher")
        weights = start_weights(teacher_spec, 7)
        topology, entries = Topology.start(settings.parallel), None
        alignment = Alignment(weight=0.7)
        if spec.is_language_model:  # of a teacher that a whole copy's ranks split, if it can be
            entries = ModelPart.current(spec).box(head_key(spec))[0] if topology.has_outputs else None
            alignment = Alignment(weight=0.7, towers=("hidden",), layers=LAYERS)
            distillation = Distillation(0.5, temperature=2.0, top_k=20, chunk=7)
        split = topology.neighbours(settings.parallel.tensor) if spec.is_language_model else None
        teacher = Teacher.build(teacher_spec, weights.__getitem__, topology.model_group, split, entries=entries)
        projections = Projections.between(spec, teacher_spec, seed=0, states=alignment.towers or ())
    objective = build_objective(
        "causal_lm" if spec.is_language_model else "clip" if "text_cfg" in config else "classify"
    )
    return engine_class(settings.parallel)(
        spec, settings, objective, runtime, total_steps=100,
        teacher=teacher, alignment=alignment, distillation=distillation, projections=projections, factors=factors,
    )  # fmt: skip


def teacher_config(config: dict[str, Any]) -> dict[str, Any]:
    """A model of the same kind, of another width where it meets the student."""
    if "model_type" in config:
        return {**config, "hidden_size": 24, "num_hidden_layers": 2}
    return {key: value for key, value in TEACHER.items() if key in config}


def write_start(path: Path, config: dict[str, Any] = CONFIG) -> Path:
    from compt_megatron.growth.fresh import write_fresh

    return write_fresh(spec_from_config(config, "tiny"), path, seed=3)


KINDS = ("weight", "exp_avg", "exp_avg_sq")


def state_of(engine: Any, kinds: Sequence[str] = KINDS) -> dict[str, torch.Tensor]:
    """Full masters and moments by the student's parameter names. Collective: one gather a tensor, so ask for few."""
    state = {}
    for name, param in engine._student.named_parameters():
        for kind in kinds:
            value = engine._state.master(param) if kind == "weight" else engine._state.moment(param, kind)
            state[name if kind == "weight" else f"{kind}/{name}"] = value.clone()
    return state


Pieces = list[tuple[str, tuple[slice, ...], torch.Tensor]]


def pieces_of(engine: Any, kinds: Sequence[str] = KINDS) -> Pieces:
    """What this rank has of weights (masters) and moments, by canonical names: name, region, values. Collective."""
    checkpoint, found = engine._checkpoint, []
    for held in checkpoint._held:
        for kind in kinds:
            value = engine._state.master(held.param) if kind == "weight" else engine._state.moment(held.param, kind)
            found += [(f"{kind}/{name}", region, part.clone()) for name, region, part in checkpoint._mine(held, value)]
    return found


def joined(spec: ModelSpec, ranks: list[Pieces]) -> dict[str, torch.Tensor]:
    """The whole tensors of all ranks' pieces. Pieces that several ranks have must be the same."""
    whole: dict[str, torch.Tensor] = {}
    for name, region, values in (piece for rank in ranks for piece in rank):
        shape = values.shape if "/align/" in name else spec.params[name.partition("/")[2]].shape
        target = whole.setdefault(name, torch.full(shape, torch.nan))
        known = target[region][~target[region].isnan()]
        assert known.numel() == 0 or torch.equal(target[region], values), name
        target[region] = values
    assert not any(value.isnan().any() for value in whole.values())
    return whole
