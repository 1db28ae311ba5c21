"""Learned linear maps from the student's feature width to the teacher's, where the two differ."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from math import sqrt

import torch
from torch import nn

from compt_megatron.numerics import full_precision
from compt_megatron.spec.random import uniform
from compt_megatron.spec.table import ModelSpec


class Projections(nn.Module):
    """One linear layer for each tower in `widths` (tower -> (student width, teacher width)) whose widths differ.

    The weights are a function of (seed, name) alone, hence identical on all ranks; the distribution is torch's own
    for linear layers, as in the published code. With `leading` they are [I 0] and 0 instead: the student's first
    features, which are the teacher's where the joint width was grown exactly. The parameters belong to the optimizer,
    and to the checkpoint under the names align/<tower>.weight [teacher, student] and align/<tower>.bias [teacher].
    """

    def __init__(self, widths: dict[str, tuple[int, int]], seed: int = 0, leading: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleDict()
        for tower, (student, teacher) in widths.items():
            if student == teacher:
                continue
            layer = nn.Linear(student, teacher)
            self.layers[tower] = layer
            if leading:
                nn.init.eye_(layer.weight)
                nn.init.zeros_(layer.bias)
                continue
            bound = 1.0 / sqrt(student)
            with torch.no_grad():
                for part, parameter in layer.named_parameters():
                    shape = tuple(parameter.shape)
                    parameter.copy_(uniform(seed, f"align/{tower}.{part}", shape, low=-bound, high=bound))

    @classmethod
    def between(
        cls,
        student: ModelSpec,
        teacher: ModelSpec,
        seed: int = 0,
        leading: bool = False,
        states: Sequence[str] = ("hidden",),
    ) -> Projections:
        """The projections that aligning `student` to `teacher` needs; none (no parameters) if their features are as
        wide: the joint width, or a language model's own. `states`: what of a language model is aligned."""
        if student.is_language_model:
            widths = (student.towers["text"].width, teacher.towers["text"].width)
            return cls(dict.fromkeys(states, widths), seed, leading)
        towers = ("image", "text") if student.family == "clip" else ("image",)
        return cls(dict.fromkeys(towers, (student.joint, teacher.joint)), seed, leading)

    def only(self, towers: Collection[str]) -> Projections | None:
        """Those of `towers`, the same modules; None where there are none. What a pipeline stage has of them."""
        own = Projections({})
        own.layers.update({tower: layer for tower, layer in self.layers.items() if tower in towers})
        return own if own.layers else None

    def forward(self, outputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """`outputs` plus align/<tower> [..., teacher width] for each projected tower present; in the weights' dtype."""
        projected = dict(outputs)
        for tower, layer in self.layers.items():
            if tower in outputs:
                with full_precision(outputs[tower].device):
                    projected[f"align/{tower}"] = layer(outputs[tower].to(next(layer.parameters()).dtype))
        return projected

    def canonical(self) -> dict[str, nn.Parameter]:
        """Checkpoint name -> parameter."""
        return {f"align/{name.removeprefix('layers.')}": parameter for name, parameter in self.named_parameters()}

    @torch.no_grad()
    def load_canonical(self, get: Callable[[str], torch.Tensor]) -> None:
        """Fill every parameter with get(its checkpoint name)."""
        for name, parameter in self.canonical().items():
            parameter.copy_(get(name))
