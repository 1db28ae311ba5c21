"""The teacher: a checkpoint's own features, frozen, without graph."""

from __future__ import annotations

import pytest
import torch

from compt_megatron.align.alignment import Alignment
from compt_megatron.align.teacher import Teacher
from compt_megatron.checkpoint.contract import TensorInfo
from compt_megatron.checkpoint.formats import open_writer
from compt_megatron.errors import UserError
from compt_megatron.models.build import build_model
from compt_megatron.models.state import load_canonical
from compt_megatron.spec.families import spec_from_config
from compt_megatron.spec.random import initial

VISION = {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 16}
TEXT = {"context_length": 6, "vocab_size": 20, "width": 32, "heads": 2, "layers": 1}
CONFIGS = {
    "clip": {"embed_dim": 12, "vision_cfg": VISION, "text_cfg": TEXT},
    "vit": {"embed_dim": 5, "vision_cfg": VISION},
}


def write_checkpoint(path, spec):
    writer = open_writer(path, "megatron", spec)
    values = {f"weight/{name}": initial(param, seed=0) for name, param in spec.params.items()}
    writer.declare({name: TensorInfo(tuple(value.shape), value.dtype) for name, value in values.items()})
    for name, value in values.items():
        writer.write(name, (0,) * value.dim(), value)
    writer.commit({})
    return path


def inputs():
    torch.manual_seed(0)
    return torch.randn(3, 3, 16, 16), torch.randint(1, 20, (3, 2, 6))


@pytest.mark.parametrize("family", ["clip", "vit"])
def test_features_are_the_checkpoint_s(family, tmp_path):
    spec = spec_from_config(CONFIGS[family], f"tiny-{family}")
    teacher = Teacher.load(write_checkpoint(tmp_path / "teacher", spec))
    assert teacher.spec.digest == spec.digest
    assert not teacher.model.training
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    images, texts = inputs()
    got = teacher.features(images, texts)
    student = build_model(spec)
    load_canonical(student, spec, lambda name: initial(spec.params[name], seed=0))
    assert set(got) == ({"image", "text"} if family == "clip" else {"image"})
    assert torch.equal(got["image"], student.encode_image(images))
    assert not any(feature.requires_grad for feature in got.values())
    if family == "clip":
        assert torch.equal(got["text"], student.encode_text(texts.flatten(0, 1)))
    outputs = student(images, texts.flatten(0, 1) if family == "clip" else None)
    assert all(value < 1e-12 for value in Alignment().unweighted(outputs, got).values())
    Alignment()(outputs, got, 0, 1, global_rows=3).loss.backward()  # the features may enter a graph


def test_bf16(tmp_path):
    spec = spec_from_config(CONFIGS["clip"], "tiny")
    path = write_checkpoint(tmp_path / "teacher", spec)
    low = Teacher.load(path, torch.bfloat16).features(*inputs())
    full = Teacher.load(path).features(*inputs())
    for name, feature in low.items():
        assert feature.dtype == torch.bfloat16
        torch.testing.assert_close(feature.float(), full[name], rtol=0.05, atol=0.05 * float(full[name].abs().max()))


def test_a_missing_teacher_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        Teacher.load(tmp_path / "nowhere")
