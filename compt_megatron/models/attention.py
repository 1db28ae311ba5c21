"""Core attention by torch's scaled_dot_product_attention, in the place of megatron-core's own."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class SdpaAttention(MegatronModule):
    """softmax(q kᵀ · scale) v with a causal mask, one that also ends behind a window, or none. Has no parameters.

    megatron-core's DotProductAttention materialises the [s, s] scores; torch chooses a fused kernel where it has one.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        **_: Any,  # context-parallel and group settings, which differ between megatron-core versions
    ) -> None:
        super().__init__(config=config)
        assert attention_type == "self", "only self-attention"
        assert attn_mask_type in (AttnMaskType.causal, AttnMaskType.no_mask), attn_mask_type
        assert config.attention_dropout == 0.0, "attention dropout is not supported"
        assert config.context_parallel_size == 1, "context parallelism is not supported"
        self.causal = attn_mask_type == AttnMaskType.causal
        self.scale = softmax_scale
        self.tokens: int | None = None  # those behind them are padding, which no token sees
        self.window: int | None = None  # with a causal mask: a token sees so many, itself included (None: all)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> Tensor:
        """query [s, b, heads, head_dim], key and value [s, b, groups, head_dim] -> [s, b, heads * head_dim]."""
        assert attention_mask is None, "masks other than the causal one are not supported"
        s, b, heads, head_dim = query.shape
        if not self.causal:
            key, value = key[: self.tokens], value[: self.tokens]
        mask = self._window_mask(s, query.device)
        output = F.scaled_dot_product_attention(
            query.permute(1, 2, 0, 3),
            key.permute(1, 2, 0, 3),
            value.permute(1, 2, 0, 3),
            attn_mask=mask,
            is_causal=self.causal and mask is None,
            scale=self.scale,
            enable_gqa=key.shape[2] != heads,
        )
        return output.permute(2, 0, 1, 3).reshape(s, b, heads * head_dim)

    def _window_mask(self, tokens: int, device: torch.device) -> Tensor | None:
        """[tokens, tokens], true where a token sees another; None where no window is shorter than the sequence."""
        if self.window is None or self.window >= tokens:
            return None
        place = torch.arange(tokens, device=device)
        back = place[:, None] - place
        return (back >= 0) & (back < self.window)
