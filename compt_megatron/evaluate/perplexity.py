"""How well a language model predicts text it has not seen: perplexity and bits per byte."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch

from compt_megatron.data.text.batch import TokenBatch
from compt_megatron.models.language import LanguageModel
from compt_megatron.objectives.causal_lm import chunked_cross_entropy

# A rank's rows of a batch -> (nats, tokens) that it adds to the sums over all ranks
Losses = Callable[[TokenBatch], tuple[float, float]]


def perplexity(
    losses: Losses,
    batches: Iterable[TokenBatch],
    reduce: Callable[[torch.Tensor], torch.Tensor],
    bytes: int | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, float | int]:
    """`loss` (nats a token), `perplexity` (its exponential), `tokens`; where the text's size is known `bits_per_byte`
    and `bytes`. Collective over those whose sums `reduce` adds up.

    `bytes`: of the whole text in UTF-8, as its data set records it. Bits per byte are the bits of all predicted tokens
    over those bytes: the tokens that end documents are predicted too and have no bytes, and the first token of the text
    is not predicted. So tokenizers compare, whatever they cut text into. `device`: where `reduce` wants its sums.
    """
    nats, tokens = 0.0, 0.0
    for batch in batches:
        own, counted = losses(batch)
        nats, tokens = nats + own, tokens + counted
    nats, tokens = reduce(torch.tensor([nats, tokens], dtype=torch.float64, device=device)).tolist()
    mean = nats / max(tokens, 1.0)
    found: dict[str, float | int] = {
        "perplexity": math.exp(min(mean, 700.0)),
        "loss": mean,
        "tokens": int(tokens),
    }
    if bytes:
        found |= {"bits_per_byte": nats / math.log(2) / bytes, "bytes": bytes}
    return found


def losses_of(model: LanguageModel, chunk: int = 1024) -> Losses:
    """Of a whole model that is on this rank: each rank has rows of its own. `chunk`: tokens whose logits exist at
    once."""
    device = next(model.parameters()).device

    def losses(batch: TokenBatch) -> tuple[float, float]:
        batch = batch.to(device)
        with torch.no_grad():
            outputs = model(batch.tokens)
            found = model.output_layer(
                lambda head: chunked_cross_entropy(
                    outputs["hidden"].flatten(0, -2), head, batch.targets.flatten(), batch.mask.flatten(), chunk=chunk
                )
            )
        return float(found.entropy), float(batch.mask.sum())

    return losses
