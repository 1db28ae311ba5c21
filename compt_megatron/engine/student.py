"""The module in training: the model and, where its features differ in width from the teacher's, the projections."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import exp, log
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from compt_megatron.align.projection import Projections
from compt_megatron.engine.run_checkpoint import Held
from compt_megatron.engine.topology import Topology
from compt_megatron.models.block import LayerKind
from compt_megatron.models.build import build_language_model, build_model
from compt_megatron.models.clip import ClipModel
from compt_megatron.models.language import LanguageModel, layer_key
from compt_megatron.models.part import ModelPart
from compt_megatron.recipe.parallel_section import ParallelSettings
from compt_megatron.spec.megatron_names import OUTPUT_LAYER
from compt_megatron.spec.table import ModelSpec

Outputs = dict[str, Any]  # tensors; of a language model also its `head`
_PROJECTIONS = "projections.layers."


class Student(nn.Module):
    """One module, one forward: everything the loss needs comes out of it, so that any wrapper (ZeRO) sees all uses.

    Outputs are rows ([b, ...], one or `captions` per sample) except 0-D ones such as `logit_scale`.
    """

    def __init__(self, model: ClipModel, projections: Projections | None = None) -> None:
        super().__init__()
        self.model = model
        self.projections = projections

    def forward(self, images: torch.Tensor | None = None, texts: torch.Tensor | None = None) -> Outputs:
        """images [b, 3, H, W], texts [n, context] -> un-normalised features, logit scale and aligned features."""
        outputs = self.model(images=images, texts=texts)
        return outputs if self.projections is None else self.projections(outputs)


class LanguageStudent(nn.Module):
    """A language model whose loss is made inside its forward, where ZeRO 3 has gathered the head's weight."""

    def __init__(self, model: LanguageModel, projections: Projections | None = None) -> None:
        super().__init__()
        self.model = model
        self.projections = projections

    def forward(
        self, tokens: torch.Tensor, use: Callable[[Outputs], Any] | None = None, layers: Sequence[int] = ()
    ) -> Any:
        """tokens [b, n] -> the stage's outputs, with those of its `layers`, projections added; on the last stage what
        `use` makes of them."""

        def finish(outputs: Outputs) -> Any:
            outputs = self._projected(outputs)
            return outputs if use is None else use(outputs)

        found = self.model(tokens, layers=layers, use=finish)
        return found if self.model.post_process else self._projected(found)

    def _projected(self, outputs: Outputs) -> Outputs:
        return outputs if self.projections is None else self.projections(outputs)


AnyStudent = Student | LanguageStudent


def build_student(
    spec: ModelSpec,
    dtype: torch.dtype,
    parallel: ParallelSettings,
    part: ModelPart,
    projections: Projections | None,
    chunk: int = 0,
    layers: LayerKind = "torch",
) -> AnyStudent:
    """A chunk of `part` of the model in training mode, without weights; projections where its features come out."""
    options: dict[str, Any] = {"recompute": parallel.recompute, "sequence": parallel.sequence, "layers": layers}
    own = None if projections is None else _own_projections(projections.to(dtype), spec, part, chunk)
    if spec.is_language_model:
        return LanguageStudent(build_language_model(spec, dtype=dtype, part=part, chunk=chunk, **options), own)
    return Student(build_model(spec, dtype=dtype, part=part, chunk=chunk, **options), own)


def _own_projections(projections: Projections, spec: ModelSpec, part: ModelPart, chunk: int) -> Projections | None:
    """Those whose features come out of a chunk."""
    if not spec.is_language_model:
        return projections if part.is_last(chunk) else None
    final = ["hidden"] if part.is_last(chunk) else []
    return projections.only([*final, *map(layer_key, part.layers("text", chunk))])


def logit_scale_of(student: AnyStudent) -> nn.Parameter | None:
    """The logarithm of a contrastive model's logit scale, on the stage that has it."""
    return getattr(student.model, "logit_scale", None)


def held_by(student: AnyStudent, part: ModelPart, chunk: int = 0) -> dict[str, Held]:
    """What each parameter of a student (one chunk of a part of the model) holds, in the module's order."""
    names = part.names(chunk)
    copy = f"model.{OUTPUT_LAYER}" if part.copied_head(chunk) else None
    held = {}
    for name, param in student.named_parameters():
        if name.startswith(_PROJECTIONS):
            held[name] = Held(param, [f"align/{name.removeprefix(_PROJECTIONS)}"], aligns=True)
        else:
            held[name] = Held(param, names[name.removeprefix("model.")], copied=name == copy)
    return held


def decays(held: Held, spec: ModelSpec) -> bool:
    """Whether weight decay applies to a parameter: to matrices, never to biases or norms."""
    return held.names[0].endswith("weight") if held.aligns else spec.params[held.names[0]].decays


def step_factors_of(held: Held, factors: Mapping[str, tuple[float, float]], spec: ModelSpec) -> tuple[float, float]:
    """Factors on a parameter's learning rate and weight decay. Where it joins tensors with different ones (query, key
    and value, when growth rescaled the queries), their geometric mean, each counted by its size."""
    if held.aligns or not any(name in factors for name in held.names):
        return 1.0, 1.0
    own = {factors.get(name, (1.0, 1.0)) for name in held.names}
    if len(own) == 1:
        return own.pop()
    sizes = [spec.params[name].numel for name in held.names]
    logs = [[log(value) for value in factors.get(name, (1.0, 1.0))] for name in held.names]
    rate, decay = (exp(sum(n * each[i] for n, each in zip(sizes, logs)) / sum(sizes)) for i in (0, 1))
    return rate, decay


def sum_sequence_gradients(student: nn.Module, topology: Topology) -> None:
    """Under sequence parallelism each rank's norms and biases see its own tokens only: sum their gradients.

    Hooks on the parameters, so that it happens before any engine takes the gradients.
    """
    if topology.tensor == 1:
        return

    def over_ranks(gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient, group=topology.tensor_group)
        return gradient

    for param in student.parameters():
        if getattr(param, "sequence_parallel", False):
            param.register_hook(over_ranks)


def is_per_row(value: torch.Tensor) -> bool:
    """Whether an output has a row for each sample; 0-D outputs belong to the model as a whole."""
    return value.dim() > 0


def join_rows(parts: list[Outputs]) -> Outputs:
    """The outputs of a whole batch from those of its micro-batches, in order."""
    return {
        key: torch.cat([part[key] for part in parts]) if is_per_row(value) else value for key, value in parts[0].items()
    }
