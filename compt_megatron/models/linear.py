"""The linear layers of a block, on torch's products, and what kinds of module a block is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn


@dataclass(frozen=True)
class BlockLayers:
    """The modules that a block is made of: linears split by their outputs (`column`) or inputs (`row`), both also
    without a bias (`plain`), and the latter with a layer scale behind it (`scaled`); norms; core attention."""

    column: type[nn.Module]
    plain_column: type[nn.Module]
    row: type[nn.Module]
    plain_row: type[nn.Module]
    scaled_row: type[nn.Module]
    layer_norm: type
    rms_norm: type
    attention: type[nn.Module]


class ColumnLinear(ColumnParallelLinear):
    """ColumnParallelLinear that adds its bias inside the product when the weight is not split.

    megatron-core returns the bias to be added later (to fuse it with an activation on GPUs): unfused, that is one more
    pass over the widest activation.
    """

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        if self.output_size_per_partition == self.output_size:
            return F.linear(input_, self.weight, self.bias), None
        return super().forward(input_, *args, **kwargs)


class RowLinear(RowParallelLinear):
    """RowParallelLinear that adds its bias inside the product when the weight is not split."""

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        if self.input_size_per_partition == self.input_size:
            return F.linear(input_, self.weight, self.bias), None
        return super().forward(input_, *args, **kwargs)


class ScaledRowLinear(RowLinear):
    """RowLinear behind which a layer scale stands: gamma (W x + b), entry by entry (LayerScale, arXiv 2103.17239).

    As a part of the linear it needs no module of its own between megatron-core's layers, and ZeRO-3 has gathered it
    when it is used. It is whole on every tensor-parallel rank.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gamma = nn.Parameter(torch.empty(self.output_size, dtype=self.config.params_dtype))
        self.gamma.sequence_parallel = self.config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        output, bias = super().forward(input_, *args, **kwargs)
        return output * self.gamma, None if bias is None else bias * self.gamma


class PlainColumnLinear(ColumnLinear):
    """ColumnLinear without a bias, whatever megatron-core's one setting for all linears says."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "bias": False})


class PlainRowLinear(RowLinear):
    """RowLinear without a bias."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "bias": False})
