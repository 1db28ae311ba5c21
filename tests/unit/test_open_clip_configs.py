"""Every model config that open_clip ships is accepted, or refused in one line that names the field which is why."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from compt_megatron.errors import UserError
from compt_megatron.spec.families import spec_from_config
from tests.unit.checkpoint_samples import refused
from tests.unit.growth_helpers import clip_config


def shipped() -> dict[str, dict[str, Any]]:
    found = importlib.util.find_spec("open_clip")
    assert found is not None
    assert found.submodule_search_locations
    folder = Path(next(iter(found.submodule_search_locations))) / "model_configs"
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def reason(config: dict[str, Any]) -> str | None:
    """The field that makes a shipped config another model than open_clip's own ViT with its own text tower."""
    vision, text = config["vision_cfg"], config["text_cfg"]
    if "multimodal_cfg" in config:
        return "multimodal_cfg: CoCa models"
    if "timm_model_name" in vision:
        return f"vision_cfg.timm_model_name={vision['timm_model_name']!r}: timm towers"
    if isinstance(vision["layers"], list):
        return f"vision_cfg.layers={vision['layers']!r}: ResNet towers"
    if "hf_model_name" in text:
        return f"text_cfg.hf_model_name={text['hf_model_name']!r}: Hugging Face text towers"
    return None


def test_every_shipped_config() -> None:
    accepted = []
    for name, config in shipped().items():
        if (field := reason(config)) is None:
            spec = spec_from_config(config, name)
            assert spec.joint == config["embed_dim"], name
            accepted.append(name)
        else:
            with pytest.raises(UserError) as caught:
                spec_from_config(config, name)
            message = str(caught.value)
            assert message.startswith(f"{name}: {field}"), message
            assert "are not supported, only open_clip's own" in message
            assert "\n" not in message
    assert {"ViT-B-32", "ViT-M-16-alt", "ViT-L-14-CLIPA", "ViT-bigG-14", "ViT-H-14-378-quickgelu"} <= {*accepted}
    assert len(accepted) >= 45


@pytest.mark.parametrize("kind", [True, "parallel", "cascade"])
def test_attentional_pooling_is_refused_with_its_reason(kind: Any) -> None:
    config = clip_config(attentional_pool=kind, attn_pooler_queries=4, attn_pooler_heads=2)
    refused(
        lambda: spec_from_config(config, "m"), f"m: vision_cfg.attentional_pool={kind!r}", "attention over embed_dim"
    )
