"""Zero-shot classification: an image's class is the one whose name, put into templates, has the nearest text feature
(Radford et al. 2021, arXiv 2103.00020, section 3.1)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from compt_megatron.data.evaluation import EvalSet
from compt_megatron.errors import UserError
from compt_megatron.evaluate.features import Encode, Reduce, Tokenize, alone, image_features, normalised, text_features

TOP = (1, 5)


def zero_shot(
    encode_image: Encode,
    encode_text: Encode,
    eval_set: EvalSet,
    tokenizer: Tokenize,
    templates: Sequence[str] = ("{}",),
    *,
    batch: int = 256,
    rank: int = 0,
    world: int = 1,
    reduce: Reduce = alone,
) -> dict[str, float]:
    """Accuracies of an evaluation set as fractions: {"top1", "top5", "classes", "images"}.

    Features are un-normalised on input. A class embedding is the normalised mean of the normalised features of its
    name in each template. Raises UserError if the set names no classes or a template has no `{}`.
    """
    classes = class_embeddings(encode_text, eval_set, tokenizer, templates, batch, rank, world, reduce)
    return score(image_features(encode_image, eval_set, batch), classes, eval_set.labels, reduce)


def class_embeddings(
    encode_text: Encode,
    eval_set: EvalSet,
    tokenizer: Tokenize,
    templates: Sequence[str] = ("{}",),
    batch: int = 256,
    rank: int = 0,
    world: int = 1,
    reduce: Reduce = alone,
) -> torch.Tensor:
    """[classes, joint] fp32, unit rows."""
    names = eval_set.class_names
    if names is None:
        raise UserError(
            f"data {eval_set.name!r}: no class names for zero-shot; give json 'name' fields or a classes file"
        )
    for template in templates:
        if template.count("{}") != 1:
            raise UserError(f"zero-shot template {template!r}: must hold one {{}} where the class name goes")
    texts = [template.replace("{}", name) for name in names for template in templates]
    features = text_features(encode_text, tokenizer, texts, batch, rank, world, reduce)
    return normalised(features.unflatten(0, (len(names), len(templates))).mean(1))


def score(
    features: Iterable[tuple[torch.Tensor, torch.Tensor]],
    classes: torch.Tensor,
    labels: torch.Tensor,
    reduce: Reduce = alone,
) -> dict[str, float]:
    """Top-k accuracies of (rows, normalised image features) against class embeddings; rows with label -1 are left out.

    A class that scores the same as the right one counts as ahead of it, and so does a NaN: constant features are not
    rewarded.
    """
    counts = torch.zeros(1 + len(TOP), dtype=torch.float64, device=classes.device)
    for rows, images in features:
        wanted = labels[rows].to(classes.device)
        images = images.to(classes.device)[wanted >= 0]
        wanted = wanted[wanted >= 0]
        scores = images @ classes.T
        behind = (scores < scores.gather(1, wanted[:, None])).sum(1)
        place = len(classes) - 1 - behind
        counts += torch.stack([torch.tensor(len(wanted), device=place.device), *((place < k).sum() for k in TOP)])
    counts = reduce(counts)
    images_seen = float(counts[0])
    result = {f"top{k}": float(counts[1 + at]) / max(images_seen, 1.0) for at, k in enumerate(TOP)}
    return {**result, "classes": len(classes), "images": int(images_seen)}
