"""The upstream gradient, applied to a gradient that the forward pass has computed."""

from __future__ import annotations

from collections.abc import Iterable

import torch

torch.library.define("compt_kernels::scale_rows", "(Tensor(a!) gradient, Tensor factor, Tensor? unit) -> ()")


@torch.library.register_fake("compt_kernels::scale_rows")
def _(gradient: torch.Tensor, factor: torch.Tensor, unit: torch.Tensor | None) -> None:
    return None


def scaled(gradient: torch.Tensor, upstream: torch.Tensor, unit: torch.Tensor | None = None) -> torch.Tensor:
    """`gradient` [rows, features] times `upstream` (one number, or [rows]) and `unit` (one number, or nothing).

    To be called in a backward pass with the gradient that the forward pass saved: it is scaled in place, by a kernel
    that reads the factors on the device and touches nothing where they are 1, unless the graph is retained for another
    backward pass or compiled; then the product is a new tensor.
    """
    upstream = upstream.float()
    if torch.compiler.is_compiling() or _graph_is_kept():
        factor = upstream if unit is None else upstream * unit
        return (gradient * factor.unsqueeze(-1)).to(gradient.dtype)
    torch.ops.compt_kernels.scale_rows(gradient, upstream.contiguous(), unit)
    return gradient


def wanted_only(
    gradients: Iterable[torch.Tensor], dtypes: Iterable[torch.dtype], wanted: Iterable[bool]
) -> list[torch.Tensor | None]:
    """What a backward pass returns: each gradient in its input's dtype, or None where nobody wants it."""
    return [g.to(dtype) if want else None for g, dtype, want in zip(gradients, dtypes, wanted)]


def refuse_second_derivative(op: str) -> None:
    """To be called first in a backward pass: its result would count as a constant under create_graph."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(f"{op}: the kernels' gradient cannot be differentiated (create_graph); use impl='eager'")


def _graph_is_kept() -> bool:
    """Whether the backward pass that runs now retains its graph (retain_graph)."""
    asked = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if asked is None else bool(asked())
