"""CLIP models and plain ViTs run by open_clip, built from a checkpoint's tensors."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from compt_megatron.checkpoint.contract import Reader
from compt_megatron.errors import UserError
from compt_megatron.spec.open_clip_names import open_clip_place, open_clip_shapes
from compt_megatron.spec.table import ModelSpec
from compt_megatron.torchvision_mend import ensure_torchvision

LIBRARY = "open_clip"
_ROWS = 16  # of the probe batch


class Probe(NamedTuple):
    """A batch: images [rows, 3, size, size], token ids [rows, context] or None for a model without a text tower."""

    images: torch.Tensor
    texts: torch.Tensor | None


def probe(reader_a: Reader, reader_b: Reader, seed: int) -> Probe:
    """A seeded batch that both models take. Raises UserError where they take different input."""
    image_size, context, vocab = _inputs(reader_a), *_text_inputs(reader_a)
    if (image_size, context) != (_inputs(reader_b), _text_inputs(reader_b)[0]):
        raise UserError(
            f"{reader_a.path} and {reader_b.path} hold models of different image size or context; no parity"
        )
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(_ROWS, 3, image_size, image_size, generator=generator)
    if not context:
        return Probe(images, None)
    vocab = min(vocab, _text_inputs(reader_b)[1])
    texts = torch.randint(1, vocab - 1, (_ROWS, context), generator=generator)
    ends = torch.randint(2, context, (_ROWS,), generator=generator) if context > 2 else torch.ones(_ROWS).long()
    for row, end in enumerate(ends.tolist()):
        texts[row, end] = _end_of_text(reader_a, vocab)
        texts[row, end + 1 :] = 0
    return Probe(images, texts)


def build(reader: Reader) -> torch.nn.Module:
    """open_clip's model of a checkpoint, fp32 on the CPU, strictly loaded: `CLIP` or `CustomTextCLIP`, or the vision
    tower alone for a plain ViT."""
    spec = _spec(reader)
    state = open_clip_state(reader)
    ensure_torchvision()
    from open_clip.model import CLIP, CustomTextCLIP, _build_vision_tower

    config = spec.config
    with torch.random.fork_rng(devices=[]):
        if spec.family == "clip":
            fields = ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "init_logit_scale", "init_logit_bias")
            kind = CustomTextCLIP if config.get("custom_text") else CLIP
            model: torch.nn.Module = kind(**{field: config[field] for field in fields if field in config})
        else:
            model = _build_vision_tower(config["embed_dim"], config["vision_cfg"], config.get("quick_gelu", False))
            state = {name.removeprefix("visual."): tensor for name, tensor in state.items()}
    model.load_state_dict(state, strict=True)
    return model.eval()


def run(model: Any, probe: Probe) -> dict[str, torch.Tensor]:
    """Un-normalised features "image" and "text" [rows, width], and "logits", the cosines between all of them."""
    images = probe.images.to(next(model.parameters()).dtype)
    if probe.texts is None:
        return {"image": model(images)}
    features = {"image": model.encode_image(images), "text": model.encode_text(probe.texts)}
    image, text = (torch.nn.functional.normalize(value, dim=-1) for value in features.values())
    return features | {"logits": image @ text.T}


def open_clip_state(reader: Reader) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint under open_clip's names, fp32."""
    spec = _spec(reader)
    state = {key: torch.empty(shape) for key, shape in open_clip_shapes(spec).items()}
    for name in spec.params:
        place, tensor = open_clip_place(spec, name), reader.read(f"weight/{name}").float()
        if place.rows is None:
            state[place.key].copy_(tensor)
        else:
            state[place.key][place.start : place.start + place.rows] = tensor
    return state


def _spec(reader: Reader) -> ModelSpec:
    assert reader.spec is not None, "the caller has asked for it"
    return reader.spec


def _inputs(reader: Reader) -> int:
    size = _spec(reader).config["vision_cfg"].get("image_size", 224)
    return int(size[0] if isinstance(size, (list, tuple)) else size)


def _text_inputs(reader: Reader) -> tuple[int, int]:
    """(context length, vocabulary), (0, 0) for a plain ViT."""
    text_cfg = _spec(reader).config.get("text_cfg")
    if text_cfg is None:
        return 0, 0
    return int(text_cfg.get("context_length", 77)), int(text_cfg.get("vocab_size", 49408))


def _end_of_text(reader: Reader, vocab: int) -> int:
    text_cfg = _spec(reader).config["text_cfg"]
    return int(text_cfg.get("eos_id", 2)) if text_cfg.get("pool_type") == "eos" else vocab - 1
