"""Matrices of the chunked losses: what lies between their rows reaches no product."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from compt_kernels.products import aligned, product_


@contextmanager
def nan_in_fresh_memory() -> Iterator[None]:
    """Tensors made without values hold NaN."""
    filled = torch.utils.deterministic.fill_uninitialized_memory
    strict, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = filled
        torch.use_deterministic_algorithms(strict, warn_only=warn)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [33, 40, 515])
def test_what_lies_between_rows_is_no_number(columns: int, dtype: torch.dtype) -> None:
    """oneDNN's bf16 product on CPUs with AMX multiplies it by 0."""
    torch.manual_seed(0)
    with nan_in_fresh_memory():
        a = aligned(128, columns, torch.empty(0), dtype)
        assert a.isnan().all(), "its own values are nobody's"
        assert a.stride() == (-(-columns // 8) * 8, 1)
        a.copy_(torch.randn(128, columns))
        b = torch.randn(columns, 16).to(dtype)
        found = product_(torch.empty(128, 16, dtype=dtype), a, b)
    torch.testing.assert_close(found, a.contiguous() @ b)
    whole = a.as_strided((128, a.stride(0)), a.stride())
    assert not whole[:, columns:].any()
