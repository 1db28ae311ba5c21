"""The frozen predecessor whose features a student is aligned to."""

from __future__ import annotations

from pathlib import Path

import torch

from compt_megatron.checkpoint.formats import open_reader
from compt_megatron.errors import UserError
from compt_megatron.models.build import build_model
from compt_megatron.models.clip import ClipModel
from compt_megatron.models.state import load_canonical
from compt_megatron.spec.table import ModelSpec


class Teacher:
    """A frozen model in evaluation mode whose features carry no graph.

    Each data-parallel rank holds a copy and runs it on its own rows, so no rank repeats another's work.
    """

    def __init__(self, model: ClipModel, spec: ModelSpec) -> None:
        self.model = model.eval().requires_grad_(False)
        self.spec = spec

    @classmethod
    def load(
        cls,
        path: str | Path,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        *,
        spec: ModelSpec | None = None,
        trust_pickle: bool = False,
    ) -> Teacher:
        """Read a checkpoint of any format; `dtype` fp32 or bf16, `spec` only for files that do not record their model.

        Raises UserError where the checkpoint is unreadable or its model unknown.
        """
        reader = open_reader(path, spec=spec, trust_pickle=trust_pickle)
        try:
            known = reader.spec or spec
            if known is None:
                raise UserError(f"{path}: the checkpoint does not record its model; name the teacher's model config")
            model = build_model(known, dtype=dtype, device=device)
            load_canonical(model, known, lambda name: reader.read(f"weight/{name}"))
        finally:
            reader.close()
        return cls(model, known)

    @torch.no_grad()
    def features(
        self, images: torch.Tensor | None = None, texts: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Un-normalised features in the teacher's dtype: image [b, joint], text [b * captions, joint] sample-major.

        images [b, 3, H, W] float; texts [b, captions, ctx] or [n, ctx] int64. A tower without input is left out, and
        so is the text of a plain ViT.
        """
        where = next(self.model.parameters())
        features = {}
        if images is not None:
            features["image"] = self.model.encode_image(images.to(where.device, where.dtype))
        if texts is not None and self.spec.family == "clip":
            features["text"] = self.model.encode_text(texts.to(where.device).flatten(0, -2))
        return features
