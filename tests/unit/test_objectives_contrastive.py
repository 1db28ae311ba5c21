"""CLIP's and SigLIP's losses against fp64 loops and open_clip."""

from __future__ import annotations

from math import exp, log, log1p, sqrt
from types import SimpleNamespace

import pytest
import torch

from compt_megatron.errors import UserError
from compt_megatron.objectives.captions import hash_tokens
from compt_megatron.objectives.registry import build_objective


def pairs(rows=5, captions=3, width=8, dtype=torch.float32, seed=0):
    """Outputs and a batch in which some captions occur twice within a slot and across slots."""
    torch.manual_seed(seed)
    outputs = {
        "image": torch.randn(rows, width, dtype=dtype),
        "text": torch.randn(rows * captions, width, dtype=dtype),
        "logit_scale": torch.tensor(7.0, dtype=dtype),
        "logit_bias": torch.tensor(-2.0, dtype=dtype),
    }
    return outputs, SimpleNamespace(texts=torch.randint(0, 2, (rows, captions, 2)), labels=None, captions=captions)


def logits_by_loops(outputs, rows, captions, slot):
    def unit(row):
        norm = sqrt(sum(v * v for v in row))
        return [v / norm for v in row]

    images = [unit(row) for row in outputs["image"].double().tolist()]
    texts = [unit(row) for row in outputs["text"].double().tolist()][slot::captions]
    scale = float(outputs["logit_scale"])
    return [[scale * sum(a * b for a, b in zip(images[i], texts[j])) for j in range(rows)] for i in range(rows)]


def is_positive(batch, same_caption, slot, i, j):
    if same_caption == "separate":
        return i == j
    return batch.texts[i, slot].tolist() == batch.texts[j, slot].tolist()


def clip_by_loops(outputs, batch, rows, captions, same_caption):
    loss = 0.0
    for slot in range(captions):
        logits = logits_by_loops(outputs, rows, captions, slot)
        for direction in (logits, [list(column) for column in zip(*logits)]):
            for i in range(rows):
                whole = log(sum(exp(v) for v in direction[i]))
                chosen = [j for j in range(rows) if is_positive(batch, same_caption, slot, i, j)]
                loss += sum(whole - direction[i][j] for j in chosen) / len(chosen)
    return loss / (2 * rows * captions)


def siglip_by_loops(outputs, batch, rows, captions, same_caption):
    loss, bias = 0.0, float(outputs["logit_bias"])
    for slot in range(captions):
        logits = logits_by_loops(outputs, rows, captions, slot)
        for i in range(rows):
            for j in range(rows):
                z = 1 if is_positive(batch, same_caption, slot, i, j) else -1
                loss += log1p(exp(-z * (logits[i][j] + bias)))
    return loss / (rows * captions)


ORACLES = {"clip": clip_by_loops, "siglip": siglip_by_loops}


@pytest.mark.parametrize("name", ["clip", "siglip"])
@pytest.mark.parametrize("captions", [1, 3])
@pytest.mark.parametrize("same_caption", ["separate", "shared"])
def test_equals_the_formula(name, captions, same_caption):
    outputs, batch = pairs(captions=captions)
    objective = build_objective(name, same_caption=same_caption)
    want = ORACLES[name](outputs, batch, 5, captions, same_caption)
    got = objective(outputs, batch)
    assert got.loss.dtype == torch.float32
    assert float(got.loss) == pytest.approx(want, rel=1e-6)
    assert float(got.parts[name]) == pytest.approx(want, rel=1e-6)
    assert not got.parts[name].requires_grad
    double = {key: value.double() for key, value in outputs.items()}
    assert float(objective(double, batch).loss) == pytest.approx(want, rel=1e-12)


def test_shared_targets_change_the_loss():
    outputs, batch = pairs()
    separate, shared = (build_objective("clip", same_caption=mode)(outputs, batch) for mode in ("separate", "shared"))
    assert abs(float(separate.loss - shared.loss)) > 1e-2


@pytest.mark.parametrize("name", ["clip", "siglip"])
@pytest.mark.parametrize("same_caption", ["separate", "shared"])
def test_gradient(name, same_caption):
    outputs, batch = pairs(rows=3, captions=2, width=4, dtype=torch.float64)
    objective = build_objective(name, same_caption=same_caption)
    names = list(outputs)
    values = [outputs[name].requires_grad_() for name in names]
    unused = [value for key, value in zip(names, values) if name == "clip" and key == "logit_bias"]
    for value in unused:
        value.requires_grad_(False)
    assert torch.autograd.gradcheck(lambda *args: objective(dict(zip(names, args)), batch).loss, values)


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_equals_open_clip(name):
    from compt_megatron.torchvision_mend import ensure_torchvision

    ensure_torchvision()
    from open_clip.loss import ClipLoss, SigLipLoss

    outputs, batch = pairs(rows=9, captions=1)
    leaves = {key: value.clone().requires_grad_() for key, value in outputs.items()}
    theirs = {key: value.clone().requires_grad_() for key, value in outputs.items()}
    build_objective(name)(leaves, batch).loss.backward()
    image, text = (torch.nn.functional.normalize(theirs[key], dim=-1) for key in ("image", "text"))
    if name == "clip":
        ClipLoss()(image, text, theirs["logit_scale"]).backward()
    else:
        SigLipLoss()(image, text, theirs["logit_scale"], theirs["logit_bias"]).backward()
    for key, value in theirs.items():
        if value.grad is not None:
            torch.testing.assert_close(leaves[key].grad, value.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_low_precision_features_are_computed_in_fp32(name):
    outputs, batch = pairs(rows=8)
    low = {key: value.bfloat16() for key, value in outputs.items()}
    double = {key: value.double() for key, value in low.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = build_objective(name)(low, batch).loss
    assert got.dtype == torch.float32
    assert float(got) == pytest.approx(float(build_objective(name)(double, batch).loss), rel=1e-6)


def test_a_zero_feature_has_a_finite_gradient():
    outputs, batch = pairs(captions=1)
    outputs["image"][2] = 0
    outputs["image"].requires_grad_()
    build_objective("clip")(outputs, batch).loss.backward()
    assert torch.isfinite(outputs["image"].grad).all()
    assert torch.equal(outputs["image"].grad[2], torch.zeros(8))


def test_hash_tells_captions_apart():
    """All 2-token captions over 200 tokens, and captions that differ in order or in padding only."""
    grid = torch.cartesian_prod(torch.arange(200), torch.arange(200))
    assert hash_tokens(grid).unique().numel() == len(grid)
    wide = torch.zeros(3, 77, dtype=torch.int64)
    wide[0, :2], wide[1, 1:3], wide[2, :3] = torch.tensor([4, 5]), torch.tensor([4, 5]), torch.tensor([4, 5, 1])
    assert hash_tokens(wide).unique().numel() == 3
    assert torch.equal(hash_tokens(wide), hash_tokens(wide.clone()))


def test_siglip_without_bias_says_what_to_do():
    outputs, batch = pairs()
    del outputs["logit_bias"]
    with pytest.raises(UserError, match="init_logit_bias"):
        build_objective("siglip")(outputs, batch)
