"""The vision and the text tower: embeddings, a megatron-core TransformerBlock, pooling, final norm, projection.

Inputs are [batch, ...]; inside, activations are [tokens, batch, width] as megatron-core wants them. A module may be a
stage of a pipeline, without embeddings or without the head; dropout is 0 throughout.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    VocabParallelEmbedding,
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from compt_megatron.models.block import TORCH_LAYERS, LayerNorm, layer_spec
from compt_megatron.models.linear import BlockLayers
from compt_megatron.spec.table import Tower


class PatchEmbedding(nn.Module):
    """The patch convolution (stride = patch, no bias) as one product that yields [patches, batch, width] directly."""

    def __init__(self, width: int, patch: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, 3, patch, patch, dtype=dtype))

    def forward(self, images: Tensor) -> Tensor:
        """images [b, 3, H, W] -> [H/patch * W/patch, b, width]."""
        b, channels, height, width = images.shape
        patch = self.weight.shape[-1]
        rows, columns = height // patch, width // patch
        grid = images.view(b, channels, rows, patch, columns, patch).permute(2, 4, 0, 1, 3, 5)
        return F.linear(grid.reshape(rows * columns, b, -1), self.weight.flatten(1))


class TowerPlace(NamedTuple):
    """Where a module stands in its tower: whether it has the embeddings, whether the head; its number among the chunks
    of a virtual pipeline (None: there are none); the process groups that the tower is split over; what its blocks are
    made of."""

    pre_process: bool
    post_process: bool
    vp_stage: int | None
    groups: ProcessGroupCollection
    layers: BlockLayers = TORCH_LAYERS


class TowerBase(MegatronModule):
    """What all towers share: the block and what megatron's pipeline schedules ask of a model.

    `biased`: see `layer_spec`.
    """

    def __init__(
        self, tower: Tower, config: TransformerConfig, place: TowerPlace, biased: Collection[str] | None = None
    ) -> None:
        super().__init__(config=config)
        self.tower, self.vp_stage, self.tensor_group = tower, place.vp_stage, place.groups.tp
        self.pre_process, self.post_process = place.pre_process, place.post_process
        self.model_type = ModelType.encoder_or_decoder
        self.share_embeddings_and_output_weights = False
        self.decoder = TransformerBlock(
            config,
            layer_spec(tower, biased, place.layers),
            post_layer_norm=False,  # the final norm is applied to the pooled token only
            pre_process=place.pre_process,
            post_process=place.post_process,
            pg_collection=place.groups,
            vp_stage=place.vp_stage,
        )
        for layer in self.decoder.layers:
            layer.self_attention.core_attention.tokens = tower.tokens  # what is more is padding

    @property
    def sequence_length(self) -> int:
        """Tokens inside the tower: under sequence parallelism padded to a multiple of the tensor-parallel ranks."""
        return self.padded(self.tower.tokens)

    def padded(self, tokens: int) -> int:
        """Tokens inside the tower where `tokens` go in."""
        parts = self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1
        return -(-tokens // parts) * parts

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Take the activations [tokens, b, width] of the stage before instead of embedding anything."""
        self.decoder.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)

    def _spread(self, hidden: Tensor) -> Tensor:
        """This rank's tokens of [tokens, b, width] under sequence parallelism."""
        if not self.config.sequence_parallel:
            return hidden
        hidden = F.pad(hidden, (0, 0, 0, 0, 0, self._inside(hidden.shape[0]) - hidden.shape[0]))
        return scatter_to_sequence_parallel_region(hidden, group=self.tensor_group)

    def _inside(self, tokens: int) -> int:
        return self.sequence_length

    def _collect(self, hidden: Tensor) -> Tensor:
        """All tokens, the padding too. What follows is the same on all ranks, and so is its gradient."""
        if not self.config.sequence_parallel:
            return hidden
        return gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False, group=self.tensor_group)

    def _parameter(self, *shape: int) -> nn.Parameter:
        return nn.Parameter(torch.empty(*shape, dtype=self.config.params_dtype))

    def _norm(self) -> LayerNorm:
        """A norm outside the block: it sees all tokens on every rank."""
        norm = LayerNorm(self.config, self.tower.width, eps=self.tower.norm_eps)
        for parameter in norm.parameters():
            parameter.sequence_parallel = False  # type: ignore[attr-defined]
        return norm


class VisionTower(TowerBase):
    """images [b, 3, H, W] -> features [b, joint], not normalised; `joint` is the joint width or the classes."""

    def __init__(
        self,
        tower: Tower,
        config: TransformerConfig,
        place: TowerPlace,
        *,
        patch: int,
        joint: int,
    ) -> None:
        super().__init__(tower, config, place)
        if place.pre_process:
            self.class_embedding = self._parameter(tower.width)
            self.position_embedding = self._parameter(tower.tokens, tower.width)
            self.conv1 = PatchEmbedding(tower.width, patch, config.params_dtype)
            self.ln_pre = self._norm() if tower.ln_pre else None
        if place.post_process:
            self.ln_post = self._norm()
            self.projection = self._parameter(tower.width, joint)

    def forward(self, images: Tensor | None) -> Tensor:
        """Features of images, or this stage's activations [tokens, b, width] if it is not the last."""
        hidden = self._spread(self._embed(images)) if self.pre_process and images is not None else None
        hidden = self.decoder(hidden, None)
        return self._head(self._collect(hidden)) if self.post_process else hidden

    def _embed(self, images: Tensor) -> Tensor:
        patches = self.conv1(images.to(self.conv1.weight.dtype))
        first = self.class_embedding.expand(1, patches.shape[1], -1)
        hidden = torch.cat([first, patches]) + self.position_embedding.unsqueeze(1)
        return hidden if self.ln_pre is None else self.ln_pre(hidden)

    def _head(self, hidden: Tensor) -> Tensor:
        if self.tower.pool == "tok":  # the norm works token by token: normalise only the token that is used
            pooled = self.ln_post(hidden[0])
        elif self.tower.norm_after_pool:
            pooled = self.ln_post(hidden[1 : self.tower.tokens].mean(dim=0))
        else:
            pooled = self.ln_post(hidden[1 : self.tower.tokens]).mean(dim=0)
        return pooled @ self.projection


class TextTower(TowerBase):
    """token ids [b, n] (n up to the context length) -> features [b, joint], not normalised."""

    def __init__(
        self,
        tower: Tower,
        config: TransformerConfig,
        place: TowerPlace,
        *,
        vocab: int,
        eos: int,
        joint: int,
    ) -> None:
        super().__init__(tower, config, place)
        self.eos = eos
        if place.pre_process:
            self.token_embedding = VocabParallelEmbedding(
                vocab, tower.width, init_method=config.init_method, config=config, tp_group=place.groups.tp
            )
            self.position_embedding = self._parameter(tower.tokens, tower.width)
        if place.post_process:
            self.ln_final = self._norm()
            self.projection = self._parameter(tower.width, joint)

    def forward(self, tokens: Tensor) -> Tensor:
        """Features of texts, or this stage's activations if it is not the last. The last stage reads tokens to pool."""
        hidden = self._spread(self._embed(tokens)) if self.pre_process else None
        hidden = self.decoder(hidden, None)
        return self._head(self._collect(hidden), tokens) if self.post_process else hidden

    def _embed(self, tokens: Tensor) -> Tensor:
        return self.token_embedding(tokens.t()) + self.position_embedding[: tokens.shape[1]].unsqueeze(1)

    def _head(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        pool = self.tower.pool
        if pool in ("first", "last"):
            pooled = hidden[0 if pool == "first" else tokens.shape[1] - 1]
        else:
            # argmax: the end-of-text token has the highest id; eos: its id is given, the first one counts
            position = tokens.argmax(dim=1) if pool == "argmax" else (tokens == self.eos).int().argmax(dim=1)
            pooled = hidden[position, torch.arange(tokens.shape[0], device=tokens.device)]
        return self.ln_final(pooled) @ self.projection
