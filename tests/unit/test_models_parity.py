"""Our models compute what open_clip's do: features, gradients, every pooling, norm and activation of the spec."""

from typing import Any

import pytest
import torch

from benchmarks.open_clip_parity import canonical_from_open_clip, open_clip_model, probe, relative_error
from compt_megatron.models.build import build_model
from compt_megatron.models.clip import ClipModel
from compt_megatron.models.state import load_canonical, split_fused
from compt_megatron.spec.families import spec_from_config
from compt_megatron.spec.table import ModelSpec

VISION: dict[str, Any] = {"image_size": 24, "patch_size": 8, "width": 48, "layers": 3, "head_width": 16}
TEXT: dict[str, Any] = {"context_length": 12, "vocab_size": 60, "width": 40, "heads": 5, "layers": 2}


def make_config(vision: dict[str, Any], text: dict[str, Any], **model: Any) -> dict[str, Any]:
    return {"embed_dim": 32, "vision_cfg": {**VISION, **vision}, "text_cfg": {**TEXT, **text}, **model}


def pair(config: dict[str, Any], dtype: torch.dtype = torch.float32, **build: Any) -> tuple[Any, ClipModel, ModelSpec]:
    """open_clip's model and ours with the same weights."""
    spec = spec_from_config(config, "test")
    reference = open_clip_model(config, noise=0.1).to(dtype)
    model = build_model(spec, dtype=dtype, **build)
    load_canonical(model, spec, canonical_from_open_clip(spec, reference.state_dict()))
    return reference, model, spec


def assert_same_features(config: dict[str, Any]) -> None:
    reference, model, spec = pair(config)
    images, texts = probe(spec, batch=4)
    with torch.no_grad():
        outputs = model(images, texts)
        assert relative_error(outputs["image"], reference.encode_image(images)) < 1e-5
        assert relative_error(outputs["text"], reference.encode_text(texts)) < 1e-5
    assert float(outputs["logit_scale"]) == pytest.approx(float(reference.logit_scale.exp()), rel=1e-6)


@pytest.mark.parametrize("quick_gelu", [False, True])
@pytest.mark.parametrize("no_ln_pre", [False, True])
@pytest.mark.parametrize(
    "pool",
    [{}, {"pool_type": "avg"}, {"pool_type": "avg", "final_ln_after_pool": True}, {"final_ln_after_pool": True}],
    ids=["tok", "avg", "avg_norm_after", "tok_norm_after"],
)
def test_vision_variants(pool: dict[str, Any], no_ln_pre: bool, quick_gelu: bool) -> None:
    assert_same_features(make_config({**pool, "no_ln_pre": no_ln_pre}, {}, quick_gelu=quick_gelu))


@pytest.mark.parametrize(
    "text",
    [
        {"pool_type": "argmax"},
        {"pool_type": "first"},
        {"pool_type": "last"},
        {"pool_type": "eos", "eos_id": TEXT["vocab_size"] - 1},
        {"no_causal_mask": True},
        {"norm_kwargs": {"eps": 1e-2}, "mlp_ratio": 3.0},
    ],
    ids=lambda text: "-".join(map(str, text.values())),
)
def test_text_variants(text: dict[str, Any]) -> None:
    assert_same_features(make_config({"norm_kwargs": {"eps": 1e-3}, "mlp_ratio": 2.0}, text))


@pytest.mark.parametrize("custom", [False, True])
def test_layer_scale_and_custom_text(custom: bool) -> None:
    assert_same_features(make_config({"ls_init_value": 0.5}, {"ls_init_value": 0.1}, custom_text=custom))


def test_texts_cut_behind_their_last_end_have_the_same_features() -> None:
    """A causal tower never looks behind the token that it pools, so padding may be cut off."""
    _, model, spec = pair(make_config({}, {}))
    texts = probe(spec, batch=3)[1]
    texts[:, 6], texts[:, 7:] = TEXT["vocab_size"] - 1, 0
    with torch.no_grad():
        assert relative_error(model.encode_text(texts[:, :7]), model.encode_text(texts)) < 1e-6


def loss_of(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """A contrastive scalar that depends on every parameter."""
    logits = scale * torch.nn.functional.normalize(image) @ torch.nn.functional.normalize(text).T
    logits = logits if bias is None else logits + bias
    return torch.nn.functional.cross_entropy(logits, torch.arange(len(logits))) + logits.sin().mean() + image.sum()


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("bias", [None, -3.0])
@pytest.mark.parametrize("scale", [{}, {"ls_init_value": 0.5}], ids=["plain", "layer_scale"])
def test_gradients(bias: float | None, scale: dict[str, Any], recompute: str) -> None:
    """In fp64 every gradient is open_clip's to 1e-9, under its canonical name: names, fusing and maths are right."""
    config = make_config({"pool_type": "avg", **scale}, scale, quick_gelu=True, init_logit_bias=bias)
    reference, model, spec = pair(config, torch.float64, recompute=recompute)
    images, texts = probe(spec, batch=4)
    images = images.double()
    loss_of(
        reference.encode_image(images), reference.encode_text(texts), reference.logit_scale.exp(), reference.logit_bias
    ).backward()
    outputs = model.train()(images, texts)
    loss_of(outputs["image"], outputs["text"], outputs["logit_scale"], outputs.get("logit_bias")).backward()
    expected = canonical_from_open_clip(spec, {name: p.grad for name, p in reference.named_parameters()})
    largest = max(float(p.grad.norm()) for p in reference.parameters())
    seen = set()
    for module_name, parameter in model.named_parameters():
        for name, gradient in split_fused(spec, module_name, parameter.grad).items():
            seen.add(name)
            error = float((gradient - expected(name)).norm())
            # the gradient of a key bias is zero but for rounding, so errors are also taken relative to the largest
            assert error < 1e-9 * float(expected(name).norm()) + 1e-12 * largest, (name, error)
    assert seen == set(spec.params)


def test_recompute_saves_activations_and_changes_no_gradient() -> None:
    config = make_config({"layers": 6}, {})
    images, texts = probe(spec_from_config(config, "test"), batch=2)
    gradients, kept = [], []
    for recompute in ("none", "full"):
        _, model, _ = pair(config, recompute=recompute)
        sizes: list[int] = []

        def pack(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            outputs = model.train()(images, texts)
            kept.append(sum(sizes))
        (outputs["image"].sin().sum() + outputs["text"].sin().sum()).backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert kept[1] < kept[0] / 4
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_plain_vit() -> None:
    config = {"embed_dim": 10, "vision_cfg": VISION}
    reference, model, spec = pair(config)
    images = probe(spec, batch=3)[0]
    with torch.no_grad():
        outputs = model(images)
        assert list(outputs) == ["image"]
        assert relative_error(outputs["image"], reference.visual(images)) < 1e-5


def test_bf16_is_as_close_as_open_clip_in_bf16() -> None:
    config = make_config({"layers": 6}, {"layers": 4})
    reference, model, spec = pair(config, torch.bfloat16)
    exact = pair(config)[0]
    exact.load_state_dict({name: tensor.float() for name, tensor in reference.state_dict().items()})
    images, texts = probe(spec, batch=16)
    with torch.no_grad():
        outputs = model(images, texts)
        truth = {"image": exact.encode_image(images), "text": exact.encode_text(texts)}
        theirs = {"image": reference.encode_image(images.bfloat16()), "text": reference.encode_text(texts)}
    for kind in truth:
        assert outputs[kind].dtype == torch.bfloat16
        assert relative_error(outputs[kind], truth[kind]) < 1.2 * relative_error(theirs[kind], truth[kind]) < 0.05
    assert outputs["logit_scale"].dtype == torch.float32


def test_logit_scale_is_clamped_like_open_clip() -> None:
    _, model, _ = pair(make_config({}, {}))
    for value, scale in ((9.0, 100.0), (-1.0, 1.0), (3.0, 20.085537)):
        model.logit_scale.data.fill_(value)
        model.clamp_logit_scale()
        assert float(model()["logit_scale"]) == pytest.approx(scale, rel=1e-6)
