"""Counted MACs against PyTorch's own FLOP counter on open_clip's models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from compt_megatron.spec.cost import at_length, forward_macs, sample_macs
from compt_megatron.spec.families import load_spec, spec_from_config
from compt_megatron.torchvision_mend import ensure_torchvision
from tests.unit.lm_helpers import gpt2, hf_model, llama, make_spec

CONFIGS: dict[str, dict[str, Any]] = {
    "tok": {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "layers": 3, "head_width": 32},
        "text_cfg": {"context_length": 12, "vocab_size": 100, "width": 48, "heads": 3, "layers": 2},
    },
    "avg-wide-mlp": {
        "embed_dim": 32,
        "vision_cfg": {
            "image_size": 48, "patch_size": 16, "width": 96, "layers": 2, "head_width": 32, "mlp_ratio": 2.5,
            "pool_type": "avg", "no_ln_pre": True,
        },
        "text_cfg": {"context_length": 9, "vocab_size": 80, "width": 32, "heads": 2, "layers": 4, "mlp_ratio": 3.0},
    },
}  # fmt: skip


def counted_macs(model: torch.nn.Module, method: str, batch: torch.Tensor) -> float:
    """MACs of one sample by PyTorch's counter; attention as plain products, which it knows on every device."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        getattr(model, method)(batch)
    return counter.get_total_flops() / 2 / len(batch)


@pytest.mark.parametrize("name", CONFIGS)
def test_macs_are_those_that_pytorch_counts(name: str) -> None:
    ensure_torchvision()
    from open_clip.model import CLIP

    config = CONFIGS[name]
    spec = spec_from_config(config, name)
    model = CLIP(**{key: dict(value) if isinstance(value, dict) else value for key, value in config.items()})
    image = config["vision_cfg"]["image_size"]
    images = torch.randn(2, 3, image, image)
    texts = torch.randint(1, config["text_cfg"]["vocab_size"], (2, config["text_cfg"]["context_length"]))
    assert forward_macs(spec, "vision") == counted_macs(model, "encode_image", images)
    assert forward_macs(spec, "text") == counted_macs(model, "encode_text", texts)


def test_a_sample_is_its_image_and_every_caption() -> None:
    spec = load_spec("compt-ViT-T-16")
    image, text = forward_macs(spec, "vision"), forward_macs(spec, "text")
    assert sample_macs(spec, 7) == image + 7 * text
    vit = spec_from_config({key: value for key, value in spec.config.items() if key != "text_cfg"}, "vit")
    assert sample_macs(vit, 7) == image


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", [llama, gpt2])
def test_macs_of_a_language_model(family: Any, tied: bool) -> None:
    """The head counts, tied or not; a causal mask saves nothing."""
    config = family(tie_word_embeddings=tied)
    spec = make_spec(config)
    model, length = hf_model(config), spec.towers["text"].tokens
    assert forward_macs(spec, "text") == counted_macs(model, "forward", torch.randint(1, 60, (2, length)))
    assert sample_macs(spec) == forward_macs(spec, "text")
    short = at_length(spec, length // 2 - 1)
    assert sample_macs(short) == counted_macs(model, "forward", torch.randint(1, 60, (2, length // 2 - 1)))
    assert short.digest == spec.digest
