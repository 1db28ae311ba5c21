"""Which fields of an open_clip model config are supported, and what is said of the others."""

from __future__ import annotations

from typing import Any

from compt_megatron.errors import UserError
from compt_megatron.spec.table import TOKENIZER_FIELDS

MODEL = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "init_logit_scale", "init_logit_bias", "custom_text"}
VISION = {"layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "ls_init_value"} | {
    "no_ln_pre",
    "pool_type",
    "final_ln_after_pool",
    "norm_kwargs",
}
TEXT = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "ls_init_value", "pool_type"} | {
    "eos_id",
    "final_ln_after_pool",
    "no_causal_mask",
    "norm_kwargs",
    "pad_id",
    *TOKENIZER_FIELDS,
}
# fields that must have a value which changes nothing about the function that we build
_ONLY_DEFAULT: dict[str, tuple[Any, ...]] = {
    "patch_dropout": (0, 0.0),
    "attentional_pool": (False,),
    "pos_embed_type": ("learnable",),
    "output_tokens": (False,),
    "act_kwargs": (None,),
    "block_type": (None, "default"),
    "timm_model_name": (None,),
    "hf_model_name": (None,),
    "embed_cls": (False,),
    "proj_bias": (False,),
    "proj_type": ("linear",),
    "qk_norm": (False,),
    "scaled_cosine_attn": (False,),
    "scale_heads": (False,),
    "scale_attn_inner": (False,),
    "scale_attn": (False,),
    "scale_fc": (False,),
    "nonscalar_logit_scale": (False,),
}


def check_kind(config: dict[str, Any], name: str) -> None:
    """Raise UserError, naming the field that says so, if the towers are not open_clip's own transformers."""
    vision, text = config["vision_cfg"], config.get("text_cfg") or {}
    layers, pool = vision.get("layers"), vision.get("attentional_pool")
    kinds = (
        ("multimodal_cfg", config.get("multimodal_cfg"), "CoCa models, which write captions,"),
        ("vision_cfg.timm_model_name", vision.get("timm_model_name"), "timm towers"),
        ("vision_cfg.layers", layers if isinstance(layers, list | tuple) else None, "ResNet towers"),
        ("vision_cfg.attentional_pool", pool, "towers with an attention over embed_dim behind the last block"),
        ("text_cfg.hf_model_name", text.get("hf_model_name"), "Hugging Face text towers"),
    )
    for field, value, what in kinds:
        if value:
            shown = "" if isinstance(value, dict) else f"={value!r}"
            raise UserError(
                f"{name}: {field}{shown}: {what} are not supported, only open_clip's own ViT and text transformer; "
                "see docs/models.md"
            )


def check_fields(config: dict[str, Any], read: set[str], where: str) -> None:
    """Raise UserError for a field that is neither in `read` nor at a value that changes nothing."""
    for field, value in config.items():
        if field in read or (field in _ONLY_DEFAULT and value in _ONLY_DEFAULT[field]):
            continue
        if field in _ONLY_DEFAULT:
            raise UserError(
                f"{where}: {field}={value!r} is not supported; remove it or use {_ONLY_DEFAULT[field][0]!r}"
            )
        if str(field).startswith(("timm_", "hf_", "attn_pooler_")):
            continue  # settings of a feature that the model name fields above switch off
        raise UserError(f"{where}: unknown or unsupported field '{field}'; see docs/models.md for those supported")
