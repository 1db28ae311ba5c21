"""Parameter tables of open_clip's own transformer models: two-tower CLIP, and its vision tower alone as a plain ViT."""

from __future__ import annotations

from dataclasses import replace
from math import log, sqrt
from typing import Any

from compt_megatron.errors import UserError
from compt_megatron.spec import clip_fields
from compt_megatron.spec.config_values import MOST, finite_number, positive_integer
from compt_megatron.spec.table import TOKENIZER_FIELDS, Dim, Init, ModelSpec, Param, Tower, block_table

_Row = tuple[str, tuple[Dim, ...], Init, int | None]  # see block_table
# what writes the residual stream in a block with layer scale -> its multiplier
_SCALED = {"attn.out_proj": "ls_1.gamma", "mlp.c_proj": "ls_2.gamma"}


def clip_spec(config: dict[str, Any], name: str) -> ModelSpec:
    """Make the parameter table of an open_clip model config.

    `config` is open_clip's JSON: `embed_dim`, `vision_cfg` and, for a two-tower model, `text_cfg`; `name` is used in
    messages. Without `text_cfg` the model is a plain ViT whose `embed_dim` is its number of classes. `custom_text` says
    how files call the text tower's tensors (open_clip_names.py); here it has the same names either way.

    Raises UserError for other towers than open_clip's own, a missing or unsupported field, an image that the patch does
    not divide, or a width that the heads do not divide.
    """
    for field in ("embed_dim", "vision_cfg"):
        if field not in config:
            raise UserError(f"{name}: the model config has no '{field}'; it must be an open_clip model config")
    for field in ("vision_cfg", "text_cfg"):
        if not isinstance(config.get(field, {}), dict) and (field, config[field]) != ("text_cfg", None):
            raise UserError(f"{name}: '{field}' must be a JSON object, not {config[field]!r}")
    clip_fields.check_kind(config, name)
    clip_fields.check_fields(config, clip_fields.MODEL, name)
    if not isinstance(config.get("custom_text", False), bool):
        raise UserError(f"{name}: 'custom_text' must be true or false, not {config['custom_text']!r}")
    joint = _integer(config, "embed_dim", name)
    activation = "quick_gelu" if config.get("quick_gelu", False) else "gelu"
    towers, params = {}, {}
    towers["vision"] = vision = _vision_tower(config["vision_cfg"], activation, f"{name}: vision_cfg")
    patch = _square(config["vision_cfg"].get("patch_size", 16), f"{name}: vision_cfg.patch_size")
    for param in _vision_params(vision, joint, patch, _scale_init(config["vision_cfg"], f"{name}: vision_cfg")):
        params[param.name] = param
    if config.get("text_cfg") is None:
        return ModelSpec("vit", name, config, towers, params, joint, _identity(config))
    text_cfg = config["text_cfg"]
    towers["text"] = text = _text_tower(text_cfg, activation, f"{name}: text_cfg")
    vocab = _integer(text_cfg, "vocab_size", f"{name}: text_cfg", 49408)
    for param in _text_params(text, joint, vocab, _scale_init(text_cfg, f"{name}: text_cfg")):
        params[param.name] = param
    scale = finite_number(config.get("init_logit_scale") or log(1 / 0.07), f"{name}: 'init_logit_scale'")
    params["logit_scale"] = Param("logit_scale", (), "", "post", None, Init("constant", scale))
    if config.get("init_logit_bias") is not None:
        bias = Init("constant", finite_number(config["init_logit_bias"], f"{name}: 'init_logit_bias'"))
        params["logit_bias"] = Param("logit_bias", (), "", "post", None, bias)
    return ModelSpec("clip", name, config, towers, params, joint, _identity(config))


def _identity(config: dict[str, Any]) -> dict[str, Any]:
    """The config without what only says how text becomes tokens, or how files call the text tower's tensors."""
    config = {key: value for key, value in config.items() if key != "custom_text"}
    if not isinstance(config.get("text_cfg"), dict):
        return config
    text_cfg = {key: value for key, value in config["text_cfg"].items() if key not in TOKENIZER_FIELDS}
    return {**config, "text_cfg": text_cfg}


def _integer(config: dict[str, Any], field: str, where: str, default: int | None = None) -> int:
    return positive_integer(config.get(field, default), field, where, layers=field == "layers")


def _mlp(cfg: dict[str, Any], width: int, where: str) -> int:
    return int(width * finite_number(cfg.get("mlp_ratio", 4.0), f"{where}: 'mlp_ratio'", above=0)) or 1


def _square(value: Any, where: str) -> int:
    if isinstance(value, (list, tuple)) and len(value) == 2 and value[0] == value[1]:
        value = value[0]
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST:
        raise UserError(f"{where} must be one positive integer (square), not {value!r}")
    return value


def _norm_eps(config: dict[str, Any], where: str) -> float:
    kwargs = config.get("norm_kwargs") or {}
    if not isinstance(kwargs, dict):
        raise UserError(f"{where}: 'norm_kwargs' must be a JSON object, not {kwargs!r}")
    kwargs = dict(kwargs)
    eps = finite_number(kwargs.pop("eps", 1e-5), f"{where}: norm_kwargs.eps", above=0)
    if kwargs:
        raise UserError(f"{where}: norm_kwargs may hold only 'eps', not {sorted(kwargs)}")
    return eps


def _scale_init(cfg: dict[str, Any], where: str) -> Init | None:
    """What the multipliers of a layer scale begin with; None without one."""
    value = cfg.get("ls_init_value")
    return None if value is None else Init("constant", finite_number(value, f"{where}: 'ls_init_value'"))


def _vision_tower(cfg: dict[str, Any], activation: Any, where: str) -> Tower:
    clip_fields.check_fields(cfg, clip_fields.VISION, where)
    width = _integer(cfg, "width", where, 768)
    head_dim = _integer(cfg, "head_width", where, 64)
    if width % head_dim:
        raise UserError(f"{where}: width {width} is not divisible by head_width {head_dim}; change one of them")
    image = _square(cfg.get("image_size", 224), f"{where}.image_size")
    patch = _square(cfg.get("patch_size", 16), f"{where}.patch_size")
    if image % patch:
        raise UserError(f"{where}: image_size {image} is not divisible by patch_size {patch}; change one of them")
    pool = cfg.get("pool_type", "tok")
    if pool not in ("tok", "avg"):
        raise UserError(f"{where}: pool_type {pool!r} is not supported; use 'tok' or 'avg'")
    return Tower(
        name="vision",
        width=width,
        layers=_integer(cfg, "layers", where, 12),
        heads=width // head_dim,
        head_dim=head_dim,
        mlp=_mlp(cfg, width, where),
        tokens=(image // patch) ** 2 + 1,
        activation=activation,
        norm_eps=_norm_eps(cfg, where),
        causal=False,
        pool=pool,
        ln_pre=not cfg.get("no_ln_pre", False),
        norm_after_pool=bool(cfg.get("final_ln_after_pool", False)),
        block_prefix="visual.transformer.resblocks",
        layer_scale=cfg.get("ls_init_value") is not None,
    )


def _text_tower(cfg: dict[str, Any], activation: Any, where: str) -> Tower:
    clip_fields.check_fields(cfg, clip_fields.TEXT, where)
    width = _integer(cfg, "width", where, 512)
    heads = _integer(cfg, "heads", where, 8)
    if width % heads:
        raise UserError(f"{where}: width {width} is not divisible by heads {heads}; change one of them")
    pool = cfg.get("pool_type", "argmax")
    if pool not in ("argmax", "eos", "first", "last"):
        raise UserError(f"{where}: pool_type {pool!r} is not supported; use 'argmax', 'eos', 'first' or 'last'")
    return Tower(
        name="text",
        width=width,
        layers=_integer(cfg, "layers", where, 12),
        heads=heads,
        head_dim=width // heads,
        mlp=_mlp(cfg, width, where),
        tokens=_integer(cfg, "context_length", where, 77),
        activation=activation,
        norm_eps=_norm_eps(cfg, where),
        causal=not cfg.get("no_causal_mask", False),
        pool=pool,
        ln_pre=False,
        norm_after_pool=False,  # open_clip's CLIP always normalises the text tower's tokens before pooling
        block_prefix="transformer.resblocks",
        layer_scale=cfg.get("ls_init_value") is not None,
    )


def _block_params(tower: Tower, scale_init: Init | None) -> list[Param]:
    """The transformer blocks. Distributions are open_clip's: torch's defaults in the vision tower (it defines no
    own), width-scaled normals in the text tower. With a layer scale, what a block adds to the residual stream is
    gamma (W h + b), entry by entry."""
    width, mlp, heads = tower.width, tower.mlp, tower.heads * tower.head_dim
    normal = tower.name == "text"
    zero, one = Init("constant", 0.0), Init("constant", 1.0)

    def matrix(std: float, bound: float) -> Init:
        return Init("normal", std) if normal else Init("uniform", bound)

    # The fused [3d, d] in-projection is xavier-uniform as one matrix: bound = sqrt(6 / (d + 3 d)).
    qkv = matrix(width**-0.5, sqrt(6 / (width + 3 * heads)))
    out = matrix((width * 2 * tower.layers) ** -0.5, heads**-0.5)
    fc, proj = matrix((2 * width) ** -0.5, width**-0.5), matrix((width * 2 * tower.layers) ** -0.5, mlp**-0.5)
    read, write = Dim("embed", "read", width), Dim("embed", "write", width)
    heads_in, heads_out = Dim("heads", "write", heads), Dim("heads", "read", heads)
    mlp_in, mlp_out = Dim("mlp", "write", mlp), Dim("mlp", "read", mlp)
    scale, shift = Dim("embed", "norm_scale", width), Dim("embed", "norm_bias", width)

    def scaled(name: str) -> list[_Row]:
        return [] if scale_init is None else [(name, (Dim("embed", "write_scale", width),), scale_init, None)]

    rows: list[_Row] = [
        ("ln_1.weight", (scale,), one, None),
        ("ln_1.bias", (shift,), zero, None),
        ("attn.q_proj.weight", (heads_in, read), qkv, 0),
        ("attn.k_proj.weight", (heads_in, read), qkv, 0),
        ("attn.v_proj.weight", (heads_in, read), qkv, 0),
        ("attn.q_proj.bias", (heads_in,), zero, 0),
        ("attn.k_proj.bias", (heads_in,), zero, 0),
        ("attn.v_proj.bias", (heads_in,), zero, 0),
        ("attn.out_proj.weight", (write, heads_out), out, 1),
        ("attn.out_proj.bias", (write,), zero, None),
        *scaled("ls_1.gamma"),
        ("ln_2.weight", (scale,), one, None),
        ("ln_2.bias", (shift,), zero, None),
        ("mlp.c_fc.weight", (mlp_in, read), fc, 0),
        ("mlp.c_fc.bias", (mlp_in,), Init("uniform", width**-0.5), 0),
        ("mlp.c_proj.weight", (write, mlp_out), proj, 1),
        ("mlp.c_proj.bias", (write,), Init("uniform", mlp**-0.5), None),
        *scaled("ls_2.gamma"),
    ]
    table = block_table(tower, rows)
    return table if scale_init is None else [_with_scale(param) for param in table]


def _with_scale(param: Param) -> Param:
    """The parameter, and what multiplies its output before it is added to the residual stream."""
    for name, gamma in _SCALED.items():
        for leaf in ("weight", "bias"):
            if param.name.endswith(f".{name}.{leaf}"):
                return replace(param, scaled_by=param.name.replace(f"{name}.{leaf}", gamma))
    return param


def _norm(name: str, tower: Tower, stage: Any) -> list[Param]:
    return [
        Param(
            f"{name}.weight", (Dim("embed", "norm_scale", tower.width),), tower.name, stage, None, Init("constant", 1.0)
        ),
        Param(
            f"{name}.bias", (Dim("embed", "norm_bias", tower.width),), tower.name, stage, None, Init("constant", 0.0)
        ),
    ]


def _vision_params(tower: Tower, joint: int, patch: int, scale_init: Init | None) -> list[Param]:
    write = Dim("embed", "write", tower.width)
    scale = Init("normal", tower.width**-0.5)
    conv_dims = (write, Dim("channels", "free", 3), Dim("patch", "free", patch), Dim("patch", "free", patch))
    conv = Init("uniform", (3 * patch * patch) ** -0.5)
    params = [
        Param("visual.class_embedding", (write,), "vision", "pre", None, scale),
        Param(
            "visual.positional_embedding", (Dim("tokens", "free", tower.tokens), write), "vision", "pre", None, scale
        ),
        Param("visual.conv1.weight", conv_dims, "vision", "pre", None, conv),
        *(_norm("visual.ln_pre", tower, "pre") if tower.ln_pre else []),
        *_block_params(tower, scale_init),
        *_norm("visual.ln_post", tower, "post"),
    ]
    dims = (Dim("embed", "read", tower.width), Dim("joint", "write", joint))
    return [*params, Param("visual.proj", dims, "vision", "post", None, scale)]


def _text_params(tower: Tower, joint: int, vocab: int, scale_init: Init | None) -> list[Param]:
    write = Dim("embed", "write", tower.width)
    tokens, words = Dim("tokens", "free", tower.tokens), Dim("vocab", "free", vocab)
    dims = (Dim("embed", "read", tower.width), Dim("joint", "write", joint))
    return [
        Param("positional_embedding", (tokens, write), "text", "pre", None, Init("normal", 0.01)),
        Param("token_embedding.weight", (words, write), "text", "pre", None, Init("normal", 0.02), 0),
        *_block_params(tower, scale_init),
        *_norm("ln_final", tower, "post"),
        Param("text_projection", dims, "text", "post", None, Init("normal", tower.width**-0.5)),
    ]
