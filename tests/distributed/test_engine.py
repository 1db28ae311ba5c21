"""The DeepSpeed engine against a plain PyTorch step on open_clip's own model: losses, gradients, weights."""

from __future__ import annotations

from functools import cache
from math import cos, pi
from pathlib import Path
from typing import Any

import pytest
import torch

from compt_megatron.data.batch import Batch
from compt_megatron.spec.families import spec_from_config
from compt_megatron.spec.open_clip_names import open_clip_place, open_clip_shapes
from tests.distributed.engine_cases import (
    BETAS,
    CAPTIONS,
    CONFIG,
    DECAY,
    EPS,
    LR,
    ROWS,
    STEPS,
    TEACHER,
    Case,
    make_engine,
    rank_batch,
    start_weights,
    state_of,
    whole_batch,
    write_start,
)
from tests.distributed.spawn import run_ranks


def train(rank: int, world: int, start: str, cases: list[Case], precision: str, aligned: bool) -> dict[Case, Any]:
    """One engine after another: losses of STEPS steps, the moments after the first and the masters after the last."""
    from compt_megatron.engine.runtime import Runtime

    runtime = Runtime.start()
    found = {}
    for case in cases:
        engine = make_engine(runtime, case, precision, aligned)
        engine.load(Path(start))
        losses, norms, first = [], [], {}
        for step in range(STEPS):
            result = engine.step(rank_batch(step, rank, world))
            losses.append(result.loss)
            norms.append(result.grad_norm)
            if step == 0:
                first = state_of(engine, ["exp_avg"])
        found[case] = (losses, norms, first, state_of(engine, ["weight"]))
        engine.close()
    return found


# -- the oracle ------------------------------------------------------------------------------------------------------


def open_clip_model(config: dict[str, Any], seed: int) -> torch.nn.Module:
    from compt_megatron.torchvision_mend import ensure_torchvision

    ensure_torchvision()
    import open_clip

    spec = spec_from_config(config, "oracle")
    state = {key: torch.zeros(shape) for key, shape in open_clip_shapes(spec).items()}
    for name, value in start_weights(spec, seed).items():
        place = open_clip_place(spec, name)
        if place.rows is None:
            state[place.key] = value
        else:
            state[place.key][place.start : place.start + place.rows] = value
    model = open_clip.CLIP(**config)
    model.load_state_dict(state)
    return model


def oracle_loss(
    model: torch.nn.Module, batch: Batch, teacher: torch.nn.Module | None, maps: torch.nn.ModuleDict
) -> Any:
    """The loss of the whole batch written out: mean over caption slots of CLIP's symmetric cross-entropy, and 0.7 x
    the squared distance of unit vectors, towers summed."""
    assert batch.texts is not None
    image = model.encode_image(batch.images)
    text = model.encode_text(batch.texts.flatten(0, 1))
    unit = torch.nn.functional.normalize
    labels = torch.arange(ROWS)
    total = torch.zeros(())
    for slot in range(CAPTIONS):
        logits = model.logit_scale.exp() * unit(image, dim=-1) @ unit(text.view(ROWS, CAPTIONS, -1)[:, slot], dim=-1).T
        cross = torch.nn.functional.cross_entropy
        total = total + (cross(logits, labels) + cross(logits.T, labels)) / 2 / CAPTIONS
    if teacher is not None:
        with torch.no_grad():
            targets = {
                "image": teacher.encode_image(batch.images),
                "text": teacher.encode_text(batch.texts.flatten(0, 1)),
            }
        for tower, feature in (("image", image), ("text", text)):
            distance = (unit(maps[tower](feature), dim=-1) - unit(targets[tower], dim=-1)).square().sum(-1).mean()
            total = total + 0.7 * distance
    return total


@cache
def oracle(aligned: bool) -> dict[str, Any]:
    """Losses, gradients of the first step and final weights of a plain loop in one process, by open_clip's names."""
    model, teacher, maps = open_clip_model(CONFIG, 3), None, torch.nn.ModuleDict()
    if aligned:
        from compt_megatron.align.projection import Projections

        teacher = open_clip_model(TEACHER, 7).eval()
        projections = Projections.between(
            spec_from_config(CONFIG, "tiny"), spec_from_config(TEACHER, "teacher"), seed=0
        )
        maps = projections.layers
    params = [*model.named_parameters(), *((f"align.{name}", param) for name, param in maps.named_parameters())]
    groups = [
        {"params": [param for _, param in params if param.dim() >= 2], "weight_decay": DECAY},
        {"params": [param for _, param in params if param.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS, foreach=False)
    losses, gradients = [], {}
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = LR * 0.5 * (1 + cos(pi * step / 100))
        optimizer.zero_grad()
        loss = oracle_loss(model, whole_batch(step), teacher, maps)
        loss.backward()
        if step == 0:
            gradients = {name: param.grad.clone() for name, param in params if param.grad is not None}
        optimizer.step()
        losses.append(float(loss))
    return {"losses": losses, "gradients": gradients, "weights": {name: param.detach() for name, param in params}}


def as_oracle_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The student's parameters (or moments) under open_clip's names, fused as there."""
    from compt_megatron.models.state import split_fused

    spec = spec_from_config(CONFIG, "tiny")
    named = {key: torch.zeros(shape) for key, shape in open_clip_shapes(spec).items()}
    for name, tensor in state.items():
        if name.startswith("projections."):
            named["align." + name.removeprefix("projections.layers.")] = tensor
            continue
        for member, part in split_fused(spec, name.removeprefix("model."), tensor).items():
            place = open_clip_place(spec, member)
            if place.rows is None:
                named[place.key] = part.reshape(())
            else:
                named[place.key][place.start : place.start + place.rows] = part
    return named


def compare(found: tuple[Any, ...], expected: dict[str, Any]) -> None:
    losses, _, first, last = found
    assert losses == pytest.approx(expected["losses"], rel=1e-5)
    moments = {name.removeprefix("exp_avg/"): value for name, value in first.items() if name.startswith("exp_avg/")}
    for name, moment in as_oracle_names(moments).items():
        gradient = moment / (1 - BETAS[0])  # after one step from zero moments
        scale = expected["gradients"][name].abs().max().clamp_min(1e-3)
        assert (gradient - expected["gradients"][name]).abs().max() <= 1e-5 * scale + 1e-6, name
    for name, weight in as_oracle_names(last).items():
        # Adam's first steps are signs: an entry whose gradient is all rounding (a key bias) may step either way.
        gradient = expected["gradients"][name].abs()
        sure = gradient > 1e-3 * gradient.max()
        assert sure.any(), name
        torch.testing.assert_close(weight[sure], expected["weights"][name][sure], atol=1e-4, rtol=1e-4)


# Together they cover every stage with one and with several micro-batches, alone and over ranks, with and without a
# teacher; each process starts once and runs its engines one after another.
CASES: list[tuple[int, bool, list[Case]]] = [
    (1, False, [(0, 1), (2, 4), (3, 2)]),
    (1, True, [(1, 2), (3, 1)]),
    (2, False, [(0, 2), (1, 1)]),
    (2, True, [(2, 2), (3, 2)]),
    (4, True, [(0, 1), (1, 2), (3, 1)]),
]


@pytest.mark.parametrize(("world", "aligned", "cases"), CASES)
def test_every_stage_and_split_is_the_plain_step(world: int, aligned: bool, cases: list[Case], tmp_path: Path) -> None:
    start = write_start(tmp_path / "start")
    found = run_ranks(train, world, str(start), cases, "fp32", aligned)
    expected = oracle(aligned)
    for case in cases:
        compare(found[0][case], expected)
        for rank in range(1, world):
            assert found[rank][case][0] == found[0][case][0], "ranks report the same loss"


def test_bf16_stages_agree_and_follow_fp32(tmp_path: Path) -> None:
    start = write_start(tmp_path / "start")
    cases: list[Case] = [(0, 1), (1, 1), (2, 2), (3, 1)]
    found = run_ranks(train, 2, str(start), cases, "bf16", True)[0]
    for case in cases:
        losses, _, first, _ = found[case]
        assert losses == pytest.approx(oracle(True)["losses"], rel=3e-2), case
        moments = {name.removeprefix("exp_avg/"): value for name, value in first.items() if name.startswith("exp_avg/")}
        for name, moment in as_oracle_names(moments).items():
            gradient = oracle(True)["gradients"][name]
            if moment.dim() >= 2:
                likeness = torch.nn.functional.cosine_similarity(moment.flatten(), gradient.flatten(), dim=0)
                assert likeness > 0.99, (case, name, float(likeness))
