"""Which pairs of a batch share their caption: two images named alike are no negatives of each other."""

from __future__ import annotations

from typing import Literal, get_args

import torch

from compt_megatron.errors import UserError
from compt_megatron.objectives.base import LabelledBatch

SameCaption = Literal["separate", "shared"]


def check_same_caption(objective: str, value: str) -> None:
    """Raise UserError unless `value` is a way to treat equal captions."""
    if value not in get_args(SameCaption):
        raise UserError(f"objective.same_caption of '{objective}' is '{value}'; use 'separate' or 'shared'")


def caption_labels(
    batch: LabelledBatch | None, rows: int, captions: int, same_caption: SameCaption, device: torch.device
) -> list[torch.Tensor | None]:
    """For each caption slot a label of this rank's rows, [rows] int64, equal where the caption's tokens are (64-bit
    hashes of them, alike on all ranks); None for `separate`, where a row's only positive is its own column."""
    if same_caption == "separate":
        return [None] * captions
    texts = None if batch is None else batch.texts
    assert texts is not None, "same_caption: shared compares the tokens of the batch"
    assert texts.shape[:2] == (rows, captions), f"texts {tuple(texts.shape)} for {rows} x {captions} pairs"
    return [*hash_tokens(texts.to(device)).T.contiguous()]


def hash_tokens(tokens: torch.Tensor) -> torch.Tensor:
    """A 64-bit hash of each row of tokens: [..., ctx] int64 -> [...] int64, the same on every device and rank.

    The sum over positions of splitmix64 (Steele et al., OOPSLA 2014) of token and position. Two different captions
    collide with probability near 2^-64.
    """
    position = torch.arange(1, tokens.shape[-1] + 1, device=tokens.device) * _signed(0x9E3779B97F4A7C15)
    x = tokens.long() * _signed(0xD1B54A32D192ED03) + position
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return (x ^ _shift(x, 31)).sum(-1)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


def _shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift; torch's own keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
