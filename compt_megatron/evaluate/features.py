"""Features of images and texts for the evaluations, and how ranks share that work.

A `reduce` sums a tensor over the ranks that share out the rows and returns the sum (the identity for one rank). Every
rank calls every `encode` function equally often, padded where needed, so that collective forward passes work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from compt_megatron.data.evaluation import EvalSet

Encode = Callable[[torch.Tensor], torch.Tensor]  # CPU images [b, 3, H, W] or tokens [b, context] -> [b, joint]
Tokenize = Callable[[Sequence[str]], torch.Tensor]
Reduce = Callable[[torch.Tensor], torch.Tensor]


def alone(tensor: torch.Tensor) -> torch.Tensor:
    """The `reduce` of one rank."""
    return tensor


def normalised(features: torch.Tensor) -> torch.Tensor:
    """Rows scaled to unit length, fp32."""
    return torch.nn.functional.normalize(features.float(), dim=-1)


def image_features(encode_image: Encode, eval_set: EvalSet, batch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(global rows [n], normalised features [n, joint] fp32) of this rank's images; broken images are left out."""
    with torch.no_grad():
        for part in eval_set.batches(batch):
            features = normalised(encode_image(part.images))
            good = part.rows >= 0
            yield part.rows[good], features[good.to(features.device)]


def text_features(
    encode_text: Encode,
    tokenizer: Tokenize,
    texts: Sequence[str],
    batch: int,
    rank: int = 0,
    world: int = 1,
    reduce: Reduce = alone,
) -> torch.Tensor:
    """Normalised features [len(texts), joint] fp32 of all texts, encoded in shares by the ranks."""
    share = -(-len(texts) // world)
    rows = [min(row, len(texts) - 1) for row in range(rank * share, (rank + 1) * share)]
    parts = []
    with torch.no_grad():
        for start in range(0, share, batch):
            chunk = rows[start : start + batch]
            parts.append(normalised(encode_text(tokenizer([texts[row] for row in chunk]))))
    own = torch.cat(parts)
    if world == 1:
        return own
    whole = own.new_zeros(share * world, own.shape[1])
    whole[rank * share : (rank + 1) * share] = own
    return reduce(whole)[: len(texts)]
