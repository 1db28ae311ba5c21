"""Image-to-text and text-to-image retrieval on a set of images with one or more captions each."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from compt_megatron.evaluate.features import Reduce, alone

TOP = (1, 5, 10)


def caption_pairs(captions: Sequence[Sequence[str]], limit: int | None = None) -> tuple[list[str], torch.Tensor]:
    """(different texts, pairs [p, 2] int64 of image row and text row) of each image's first `limit` captions.

    A caption that several images have is one text with several right images.
    """
    texts: dict[str, int] = {}
    pairs: dict[tuple[int, int], None] = {}
    for row, own in enumerate(captions):
        for caption in own[:limit]:
            pairs[row, texts.setdefault(caption, len(texts))] = None
    return list(texts), torch.tensor(list(pairs), dtype=torch.long).reshape(-1, 2)


def retrieval(
    image_features: torch.Tensor,
    text_features: torch.Tensor,
    pairs: torch.Tensor,
    *,
    rank: int = 0,
    world: int = 1,
    reduce: Reduce = alone,
) -> dict[str, float]:
    """Recall at 1, 5, 10 as fractions: {"i2t_r1", ..., "t2i_r10", "images", "texts"}.

    `image_features` [n, d] and `text_features` [t, d] are normalised; `pairs` [p, 2] says which text rows are right for
    which image rows. A query counts at k if one of its right answers is among the first k; wrong answers that score the
    same as the best right one (and NaN) are taken to come first. Queries without an answer are left out. Ranks share
    out the queries.
    """
    result: dict[str, float] = {}
    for name, queries, answers, right in (
        ("i2t", image_features, text_features, pairs),
        ("t2i", text_features, image_features, pairs.flip(1)),
    ):
        counts = reduce(_hits(queries, answers, right, rank, world))
        for at, k in enumerate(TOP):
            result[f"{name}_r{k}"] = float(counts[1 + at]) / max(float(counts[0]), 1.0)
    return {**result, "images": len(pairs[:, 0].unique()), "texts": len(pairs[:, 1].unique())}


def _hits(queries: torch.Tensor, answers: torch.Tensor, right: torch.Tensor, rank: int, world: int) -> torch.Tensor:
    """[queries of this rank, those with an answer in the first TOP[0], TOP[1], ...] float64."""
    asked = right[:, 0].unique()[rank::world]
    counts = torch.zeros(1 + len(TOP), dtype=torch.float64, device=queries.device)
    counts[0] = len(asked)
    place_of = torch.full((len(queries),), -1)
    place_of[asked] = torch.arange(len(asked))
    right = right[place_of[right[:, 0]] >= 0]
    owner = place_of[right[:, 0]]
    chunk = max(1, (1 << 24) // max(1, len(answers)))
    for start in range(0, len(asked), chunk):
        scores = queries[asked[start : start + chunk].to(queries.device)] @ answers.T
        inside = (owner >= start) & (owner < start + chunk)
        correct = torch.zeros(scores.shape, dtype=torch.bool)
        correct[owner[inside] - start, right[inside, 1]] = True
        correct = correct.to(scores.device)
        best = scores.masked_fill(~correct | scores.isnan(), -torch.inf).amax(1, keepdim=True)
        ahead = (~correct & ~(scores < best)).sum(1)
        ahead[best[:, 0].isinf()] = max(TOP)  # every right answer scores NaN
        counts[1:] += torch.stack([(ahead < k).sum() for k in TOP])
    return counts
