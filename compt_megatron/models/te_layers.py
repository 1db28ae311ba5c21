"""A block's layers by NVIDIA's Transformer Engine, through megatron-core's wrappers. Import it only where
`transformer_engine.absence()` is None.

The unfused ones, so that parameters have the names and shapes they have elsewhere. What Transformer Engine keeps beside
them (`_extra_state`) belongs to its 8-bit formats, which are not used, and is no parameter. Weights come on the CPU,
whatever the ambient device: move the module.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.extensions.transformer_engine import (
    TEColumnParallelLinear,
    TEDotProductAttention,
    TENorm,
    TERowParallelLinear,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from compt_megatron.models.linear import BlockLayers


class Column(TEColumnParallelLinear):
    """Adds its bias inside the product."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "skip_bias_add": False})


class Row(TERowParallelLinear):
    """Adds its bias itself, behind the sum over ranks."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "skip_bias_add": False})


class ScaledRow(Row):
    """With a layer scale behind it, see `linear.ScaledRowLinear`."""

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.gamma = nn.Parameter(torch.empty(output_size, dtype=config.params_dtype))
        self.gamma.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return super().forward(x)[0] * self.gamma, None


class PlainColumn(Column):
    """Without a bias."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "bias": False})


class PlainRow(Row):
    """Without a bias."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "bias": False})


class Norm:
    """Makes the LayerNorm or RMSNorm that `config` names; its parameters are marked like `block.LayerNorm`'s."""

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> Any:
        norm: Any = TENorm(config=config, hidden_size=hidden_size, eps=eps)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm


TE_LAYERS = BlockLayers(
    column=Column,
    plain_column=PlainColumn,
    row=Row,
    plain_row=PlainRow,
    scaled_row=ScaledRow,
    layer_norm=Norm,
    rms_norm=Norm,
    attention=TEDotProductAttention,
)
