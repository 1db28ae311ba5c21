"""The frozen predecessor whose features a student is aligned to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from compt_megatron.checkpoint.formats import open_reader
from compt_megatron.errors import UserError
from compt_megatron.models.build import build_language_model, build_model
from compt_megatron.models.clip import ClipModel
from compt_megatron.models.groups import lone_groups
from compt_megatron.models.language import LanguageModel, layer_key
from compt_megatron.models.part import ModelPart
from compt_megatron.models.state import load_canonical
from compt_megatron.share import ranks
from compt_megatron.spec.huggingface_names import head_key
from compt_megatron.spec.megatron_names import OUTPUT_LAYER
from compt_megatron.spec.table import ModelSpec


class Teacher:
    """A frozen model in evaluation mode whose features carry no graph.

    The ranks of `group`, one copy of the student, load the same rows: each runs the teacher on its part of them, and
    all get all features. So no rank repeats another's work. Where one rank cannot hold the teacher, the ranks of
    `tensor_group`, neighbours inside `group`, split it and work on the same part.
    """

    def __init__(
        self,
        model: ClipModel | LanguageModel,
        spec: ModelSpec,
        group: dist.ProcessGroup | None = None,
        tensor_group: dist.ProcessGroup | None = None,
        head: torch.Tensor | None = None,
    ) -> None:
        """`group` None: this rank runs all of its rows. `head` [entries, width]: a language model's, of those
        vocabulary entries that the student's head has on this rank."""
        self.model = model.eval().requires_grad_(False)
        self.spec, self.head = spec, head
        self._group = group
        self._sharers = 1 if tensor_group is None else dist.get_world_size(tensor_group)

    @classmethod
    def load(
        cls,
        path: str | Path,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        *,
        spec: ModelSpec | None = None,
        trust_pickle: bool = False,
        group: dist.ProcessGroup | None = None,
        tensor_group: dist.ProcessGroup | None = None,
        entries: slice | None = None,
    ) -> Teacher:
        """Read a checkpoint of any format; `dtype` fp32 or bf16, `spec` only for files that do not record their model.
        `entries`: see `build`.

        Raises UserError where the checkpoint is unreadable or its model unknown.
        """
        reader = open_reader(path, spec=spec, trust_pickle=trust_pickle)
        try:
            known = reader.spec or spec
            if known is None:
                raise UserError(f"{path}: the checkpoint does not record its model; name the teacher's model config")
            return cls.build(
                known, lambda name: reader.read(f"weight/{name}"), group, tensor_group,
                dtype=dtype, device=device, entries=entries,
            )  # fmt: skip
        finally:
            reader.close()

    @classmethod
    def build(
        cls,
        spec: ModelSpec,
        get: Callable[[str], torch.Tensor],
        group: dist.ProcessGroup | None = None,
        tensor_group: dist.ProcessGroup | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        entries: slice | None = None,
    ) -> Teacher:
        """A teacher whose whole weights `get(canonical name)` gives, however the student is split. `entries`: the
        vocabulary entries of which this rank wants the head (None: it makes no logits)."""
        split = (1, 0) if tensor_group is None else (dist.get_world_size(tensor_group), dist.get_rank(tensor_group))
        part = ModelPart(spec, *split)
        build = build_language_model if spec.is_language_model else build_model
        model = build(spec, dtype=dtype, device=device, part=part, groups=lone_groups(tensor_group))
        load_canonical(model, spec, get, part)
        head = None
        if entries is not None:
            if tensor_group is None:
                head = model.get_parameter(OUTPUT_LAYER).detach()[entries]
            else:  # cut otherwise than the student's
                head = get(head_key(spec))[entries].to(device, dtype, copy=True)
        return cls(model, spec, group, tensor_group, head)

    @torch.no_grad()
    def features(
        self, images: torch.Tensor | None = None, texts: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Un-normalised features in the teacher's dtype: image [b, joint], text [b * captions, joint] sample-major.

        images [b, 3, H, W] float; texts [b, captions, ctx] or [n, ctx] int64. A tower without input is left out, and
        so is the text of a plain ViT. Collective over `group`.
        """
        model = self.model
        assert isinstance(model, ClipModel)
        where = next(model.parameters())
        features = {}
        if images is not None:
            features["image"] = self._shared(images, lambda rows: model.encode_image(rows.to(where)))
        if texts is not None and self.spec.family == "clip":
            tokens = texts.flatten(0, -2)
            features["text"] = self._shared(tokens, lambda rows: model.encode_text(rows.to(where.device)))
        return features

    @torch.no_grad()
    def hidden(self, tokens: torch.Tensor, layers: Sequence[int] = ()) -> dict[str, torch.Tensor]:
        """`hidden` [b, n, width], a language model's states behind its final norm, and `layer_<i>`, those behind each
        of `layers`; tokens [b, n] int64. Collective over `group`."""
        wanted = ["hidden", *map(layer_key, layers)]

        def encode(rows: torch.Tensor) -> torch.Tensor:
            outputs = self.model(rows, layers=layers)
            return torch.cat([outputs[key] for key in wanted], dim=-1) if len(wanted) > 1 else outputs["hidden"]

        found = self._shared(tokens, encode)
        return dict(zip(wanted, found.chunk(len(wanted), dim=-1), strict=True))

    def _shared(self, rows: torch.Tensor, encode: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """encode(rows), each rank of the group doing its part of the rows."""
        rank, world = (0, 1) if self._group is None else ranks(self._group)
        if world == self._sharers:
            return encode(rows)
        parts = world // self._sharers
        share = -(-len(rows) // parts)  # the last parts may be smaller, or empty: all have rows to do, some again
        first = min(rank // self._sharers * share, len(rows) - share)
        mine = encode(rows[first : first + share]).contiguous()
        found = [torch.empty_like(mine) for _ in range(world)]
        dist.all_gather(found, mine, group=self._group)
        whole = mine.new_empty((len(rows), *mine.shape[1:]))
        for other, values in enumerate(found):
            start = min(other // self._sharers * share, len(rows) - share)
            whole[start : start + share] = values
        return whole
