"""Matrix products of the chunked losses: 16-bit factors are summed in fp32, and give fp32 where `out` is fp32."""

from __future__ import annotations

import torch


def product_(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """out [m, n] = a [m, k] @ b [k, n]; out has the factors' dtype, or fp32 for 16-bit factors."""
    if out.dtype == a.dtype:
        return torch.mm(a, b, out=out)
    if out.device.type == "cuda":
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    return torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def add_product_(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """out [m, n] += a [m, k] @ b [k, n]; dtypes as in `product_`."""
    if out.dtype == a.dtype:
        return torch.addmm(out, a, b, out=out)
    if out.device.type == "cuda":
        return torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    return torch.addmm(out, a.to(out.dtype), b.to(out.dtype), out=out)


def common_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """The dtype that products of `tensors` are computed in: the widest of theirs (bf16 with fp16: fp32)."""
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits and of sums over them: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def aligned(rows: int, columns: int, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised matrix on the device of `like`, whose rows start at multiples of eight elements.

    What lies between the rows is 0: oneDNN's bf16 product for CPUs with AMX multiplies it by 0, and a NaN there would
    make every row NaN.
    """
    buffer = like.new_empty((rows, -(-columns // 8) * 8), dtype=dtype)
    buffer[:, columns:] = 0
    return buffer[:, :columns]
