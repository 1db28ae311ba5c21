"""What the trainer gets for one step: this rank's rows of the global batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class Batch:
    """Rows of global step `step`. Rows are stream-major, so that rank r's rows come before rank r + 1's."""

    images: torch.Tensor  # [b, 3, H, W] float32
    texts: torch.Tensor | None  # [b, captions, context] int64
    labels: torch.Tensor | None  # [b] int64
    sample_ids: list[str]
    step: int

    def __len__(self) -> int:
        return len(self.images)

    @property
    def captions(self) -> int:
        """Captions a sample, 0 without texts."""
        return 0 if self.texts is None else self.texts.shape[1]

    def to(self, device: torch.device | str) -> Batch:
        """The batch on `device`; from pinned memory the copy does not block."""
        texts = None if self.texts is None else self.texts.to(device, non_blocking=True)
        labels = None if self.labels is None else self.labels.to(device, non_blocking=True)
        return Batch(self.images.to(device, non_blocking=True), texts, labels, self.sample_ids, self.step)

    def pin(self) -> Batch:
        """The batch in page-locked memory (needs an accelerator)."""
        texts = None if self.texts is None else self.texts.pin_memory()
        labels = None if self.labels is None else self.labels.pin_memory()
        return Batch(self.images.pin_memory(), texts, labels, self.sample_ids, self.step)

    def split(self, parts: int) -> list[Batch]:
        """`parts` micro-batches of equal size, in row order (views, no copies)."""
        rows, rest = divmod(len(self), parts)
        assert rest == 0 < rows, f"{len(self)} rows do not split into {parts} equal parts"
        pieces = []
        for part in range(parts):
            take = slice(part * rows, (part + 1) * rows)
            texts = None if self.texts is None else self.texts[take]
            labels = None if self.labels is None else self.labels[take]
            pieces.append(Batch(self.images[take], texts, labels, self.sample_ids[take], self.step))
        return pieces

    @staticmethod
    def join(pieces: list[Batch]) -> Batch:
        """One batch of the pieces' rows, in order. All pieces belong to one step."""
        if len(pieces) == 1:
            return pieces[0]
        texts = [piece.texts for piece in pieces if piece.texts is not None]
        labels = [piece.labels for piece in pieces if piece.labels is not None]
        return Batch(
            torch.cat([piece.images for piece in pieces]),
            torch.cat(texts) if texts else None,
            torch.cat(labels) if labels else None,
            [name for piece in pieces for name in piece.sample_ids],
            pieces[0].step,
        )
