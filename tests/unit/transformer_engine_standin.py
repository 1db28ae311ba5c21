"""The source of a package `transformer_engine` on the CPU: the interface that megatron-core's wrappers use, with
the arithmetic of one rank. `write` puts it into a folder. `ERROR` is a knob, by which its products are too large."""

from __future__ import annotations

from pathlib import Path

SOURCE = '''
"""Stands in for NVIDIA's Transformer Engine in tests."""
import contextlib, sys, types
import torch
from torch import nn
from torch.nn import functional as F

__version__ = "1.12.0"
ERROR = 0.0


class _Base(nn.Module):
    def get_extra_state(self):
        return torch.zeros(3, dtype=torch.uint8)

    def set_extra_state(self, state):
        pass


class Linear(_Base):
    def __init__(self, in_features, out_features, sequence_parallel, fuse_wgrad_accumulation, tp_group, tp_size,
                 get_rng_state_tracker, init_method, bias, return_bias, parallel_mode, params_dtype, device,
                 rng_tracker_name=None):
        super().__init__()
        assert not fuse_wgrad_accumulation and parallel_mode in ("column", "row")
        self.return_bias, self.use_bias = return_bias, bias
        if parallel_mode == "column":
            out_features //= tp_size
        else:
            in_features //= tp_size
        self.in_features, self.out_features, self.tp_size = in_features, out_features, tp_size
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=params_dtype, device=device))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, dtype=params_dtype, device=device))
        else:
            self.bias = torch.empty(0)

    def forward(self, x, is_first_microbatch=None):
        assert not self.return_bias and self.tp_size == 1
        return F.linear(x, self.weight * (1 + ERROR), self.bias if self.use_bias else None)


class LayerNorm(_Base):
    def __init__(self, eps, sequence_parallel, zero_centered_gamma, params_dtype, device, hidden_size=None,
                 normalized_shape=None):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(normalized_shape or hidden_size, dtype=params_dtype, device=device))
        self.bias = nn.Parameter(torch.zeros(normalized_shape or hidden_size, dtype=params_dtype, device=device))

    def forward(self, x):
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)


class RMSNorm(_Base):
    def __init__(self, eps, sequence_parallel, zero_centered_gamma, params_dtype, device, hidden_size=None,
                 normalized_shape=None):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(normalized_shape or hidden_size, dtype=params_dtype, device=device))

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class DotProductAttention(_Base):
    def __init__(self, num_attention_heads, kv_channels, attention_dropout, attn_mask_type, sequence_parallel, tp_size,
                 get_rng_state_tracker, tp_group, layer_number, num_gqa_groups, attention_type, softmax_scale):
        super().__init__()
        self.scale = softmax_scale

    def forward(self, query, key, value, attention_mask, attn_mask_type):
        assert attention_mask is None and attn_mask_type in ("causal", "no_mask")
        s, b, heads, size = query.shape
        output = F.scaled_dot_product_attention(
            *(each.permute(1, 2, 0, 3) for each in (query, key, value)), is_causal=attn_mask_type == "causal",
            scale=self.scale, enable_gqa=key.shape[2] != heads)
        return output.permute(2, 0, 1, 3).reshape(s, b, heads * size)


class FP8GlobalStateManager:
    @staticmethod
    def is_fp8_enabled():
        return False


def _module(name, **contents):
    module = types.ModuleType(f"{__name__}.{name}")
    vars(module).update(contents)
    sys.modules[module.__name__] = module
    return module


common = _module("common")
common.recipe = _module("common.recipe", DelayedScaling=object)
pytorch = _module("pytorch", Linear=Linear, LayerNorm=LayerNorm, RMSNorm=RMSNorm, LayerNormLinear=_Base,
                  GroupedLinear=_Base, DotProductAttention=DotProductAttention)
pytorch.distributed = _module("pytorch.distributed", CudaRNGStatesTracker=object, activation_recompute_forward=None)
_module("pytorch.float8_tensor", Float8Tensor=type("Float8Tensor", (), {}))
_module("pytorch.cpp_extensions", cast_to_fp8=None)
_module("pytorch.fp8", FP8GlobalStateManager=FP8GlobalStateManager, fp8_autocast=contextlib.nullcontext,
        fp8_model_init=contextlib.nullcontext)
'''


def write(folder: Path, source: str = SOURCE) -> Path:
    """Make the package under `folder`, and return `folder`, which is to stand on PYTHONPATH."""
    package = folder / "transformer_engine"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(source)
    return folder
