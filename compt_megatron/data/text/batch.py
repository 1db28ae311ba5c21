"""What the trainer of a language model gets for one step: this rank's rows of the global batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class TokenBatch:
    """Rows of global step `step`. Position p of a row predicts `targets[p]` from `tokens[: p + 1]`; the loss counts it
    where `mask[p]`."""

    tokens: torch.Tensor  # [b, n] int64
    targets: torch.Tensor  # [b, n] int64: the tokens one place on
    mask: torch.Tensor  # [b, n] bool
    sample_ids: list[str]
    step: int

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def length(self) -> int:
        """Tokens a row, n."""
        return self.tokens.shape[1]

    def to(self, device: torch.device | str) -> TokenBatch:
        """The batch on `device`; from pinned memory the copy does not block."""
        tokens, targets, mask = (part.to(device, non_blocking=True) for part in (self.tokens, self.targets, self.mask))
        return TokenBatch(tokens, targets, mask, self.sample_ids, self.step)

    def pin(self) -> TokenBatch:
        """The batch in page-locked memory (needs an accelerator)."""
        tokens, targets, mask = (part.pin_memory() for part in (self.tokens, self.targets, self.mask))
        return TokenBatch(tokens, targets, mask, self.sample_ids, self.step)

    def split(self, parts: int) -> list[TokenBatch]:
        """`parts` micro-batches of equal size, in row order (views, no copies)."""
        rows, rest = divmod(len(self), parts)
        assert rest == 0 < rows, f"{len(self)} rows do not split into {parts} equal parts"
        pieces = []
        for part in range(parts):
            take = slice(part * rows, (part + 1) * rows)
            tensors = (self.tokens[take], self.targets[take], self.mask[take])
            pieces.append(TokenBatch(*tensors, self.sample_ids[take], self.step))
        return pieces

    @staticmethod
    def join(pieces: list[TokenBatch]) -> TokenBatch:
        """One batch of the pieces' rows, in order. All pieces belong to one step."""
        if len(pieces) == 1:
            return pieces[0]
        return TokenBatch(
            torch.cat([piece.tokens for piece in pieces]),
            torch.cat([piece.targets for piece in pieces]),
            torch.cat([piece.mask for piece in pieces]),
            [name for piece in pieces for name in piece.sample_ids],
            pieces[0].step,
        )
