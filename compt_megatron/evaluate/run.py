"""Everything a checkpoint is measured by, on a list of evaluation sets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from compt_megatron.data.evaluation import EvalSet
from compt_megatron.evaluate.features import Encode, Reduce, Tokenize, alone, image_features, text_features
from compt_megatron.evaluate.retrieval import caption_pairs, retrieval
from compt_megatron.evaluate.zero_shot import class_embeddings, score


def evaluate(
    encode_image: Encode,
    encode_text: Encode | None,
    eval_sets: Sequence[EvalSet],
    tokenizer: Tokenize | None,
    *,
    templates: Sequence[str] = ("{}",),
    batch: int = 256,
    captions: int = 5,
    rank: int = 0,
    world: int = 1,
    reduce: Reduce = alone,
) -> dict[str, dict[str, Any]]:
    """{set name: results}: zero-shot accuracies where the set has classes, retrieval recalls where it has captions.

    `encode_image` and `encode_text` give un-normalised features [b, joint] of what they get on the CPU; without
    `encode_text` the image features are class logits of a plain ViT and the set's labels are scored against them.
    Retrieval uses each image's first `captions` captions (0 leaves it out). `reduce` sums a tensor over the `world`
    data-parallel ranks; all of them must call this together, and all get the whole result.
    """
    results: dict[str, dict[str, Any]] = {}
    for eval_set in eval_sets:
        if encode_text is None or tokenizer is None:
            results[eval_set.name] = classification(encode_image, eval_set, batch, reduce)
            continue
        found: dict[str, Any] = {}
        features = list(image_features(encode_image, eval_set, batch))
        if eval_set.class_names is not None and bool((eval_set.labels >= 0).any()):
            classes = class_embeddings(encode_text, eval_set, tokenizer, templates, batch, rank, world, reduce)
            found |= score(features, classes, eval_set.labels, reduce)
        if captions and any(eval_set.captions):
            images, present = _gathered(features, eval_set.rows, reduce)
            texts, pairs = caption_pairs([eval_set.captions[row] for row in present], captions)
            text_rows = text_features(encode_text, tokenizer, texts, batch, rank, world, reduce)
            found |= retrieval(images, text_rows, pairs, rank=rank, world=world, reduce=reduce)
        results[eval_set.name] = found
    return results


def classification(encode_image: Encode, eval_set: EvalSet, batch: int, reduce: Reduce = alone) -> dict[str, Any]:
    """Top-1 and top-5 of a plain ViT, whose features are class logits."""
    parts = list(_logits(encode_image, eval_set, batch))
    # Scoring logits is scoring features against the unit vectors of the classes.
    classes = torch.eye(parts[0][1].shape[1], device=parts[0][1].device)
    return score(parts, classes, eval_set.labels, reduce)


def _logits(encode_image: Encode, eval_set: EvalSet, batch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    with torch.no_grad():
        for part in eval_set.batches(batch):
            logits = encode_image(part.images).float()
            good = part.rows >= 0
            yield part.rows[good], logits[good.to(logits.device)]


def _gathered(
    features: Sequence[tuple[torch.Tensor, torch.Tensor]], rows: int, reduce: Reduce
) -> tuple[torch.Tensor, list[int]]:
    """(features [n, joint] of all ranks' good images, their n row numbers)."""
    like = features[0][1]
    whole = like.new_zeros(rows, like.shape[1] + 1)
    for own, images in features:
        whole[own.to(whole.device), :-1] = images
        whole[own.to(whole.device), -1] = 1
    whole = reduce(whole)
    present = whole[:, -1] > 0
    return whole[present, :-1], present.nonzero()[:, 0].tolist()
