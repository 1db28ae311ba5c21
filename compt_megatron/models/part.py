"""What one rank has of a model that tensor and pipeline parallelism split, in the table's names and in the modules'.

Tensor parallelism cuts single parameters (heads, MLP units, vocabulary entries); pipeline parallelism deals out layers:
with `virtual` chunks a stage, chunk c of stage r has the layers of part c * pipeline + r. The functions on single
tensors serve weights, gradients and optimizer moments alike: they only move rows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from compt_megatron.spec.huggingface_names import embedding_key
from compt_megatron.spec.megatron_names import OUTPUT_LAYER, megatron_place, place_on_rank
from compt_megatron.spec.table import ModelSpec

Region = tuple[slice, ...]

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
_names: dict[tuple[object, ...], dict[str, list[str]]] = {}  # asked for once a tensor


@dataclass(frozen=True)
class ModelPart:
    """The part of tensor-parallel rank `tensor_rank` of `tensor` and pipeline stage `stage` of `pipeline`."""

    spec: ModelSpec
    tensor: int = 1
    tensor_rank: int = 0
    pipeline: int = 1
    stage: int = 0
    virtual: int = 1

    @classmethod
    def current(cls, spec: ModelSpec) -> ModelPart:
        """This rank's, in megatron's current process groups."""
        from megatron.core import parallel_state as groups

        return cls(
            spec,
            groups.get_tensor_model_parallel_world_size(),
            groups.get_tensor_model_parallel_rank(),
            groups.get_pipeline_model_parallel_world_size(),
            groups.get_pipeline_model_parallel_rank(),
            groups.get_virtual_pipeline_model_parallel_world_size() or 1,
        )

    # -- which layers ------------------------------------------------------------------------------------------------

    def is_first(self, chunk: int = 0) -> bool:
        """Whether a chunk begins with the embeddings."""
        return self.stage == 0 and chunk == 0

    def is_last(self, chunk: int = 0) -> bool:
        """Whether a chunk ends with the head."""
        return self.stage == self.pipeline - 1 and chunk == self.virtual - 1

    def layers(self, tower: str, chunk: int = 0) -> range:
        """The layers of a tower that a chunk has."""
        count = self.spec.towers[tower].layers // (self.pipeline * self.virtual)
        first = (chunk * self.pipeline + self.stage) * count
        return range(first, first + count)

    def has(self, name: str, chunk: int = 0) -> bool:
        """Whether a chunk has (its part of) a parameter."""
        param = self.spec.params[name]
        if param.layer is not None:
            return param.layer in self.layers(param.tower, chunk)
        return self.is_first(chunk) if param.stage == "pre" else self.is_last(chunk)

    def copied_head(self, chunk: int = 0) -> bool:
        """Whether a chunk has a copy of the token embedding, on another stage, as its head (a module parameter by name
        OUTPUT_LAYER). Both copies step alike: `models.tied` sums their gradients; files hold the first stage's."""
        tied = self.spec.is_language_model and self.spec.towers["text"].tied
        return tied and self.is_last(chunk) and not self.is_first(chunk)

    # -- which rows --------------------------------------------------------------------------------------------------

    def is_split(self, name: str) -> bool:
        """Whether the tensor-parallel ranks have different parts of a parameter; otherwise all have the same."""
        return self.tensor > 1 and self.spec.params[name].tensor_dim is not None

    def box(self, name: str) -> Region:
        """The region of a parameter that this rank has; of a vocabulary that is padded, the last rank has less."""
        param = self.spec.params[name]
        region = [slice(0, size) for size in param.shape]
        if self.is_split(name):
            dim = param.tensor_dim
            assert dim is not None
            size = param.shape[dim]
            own = -(-size // self.tensor)
            padded = self.spec.is_language_model and param.stage != "layer"
            assert padded or own * self.tensor == size, f"{name}: {param.shape} is not cut evenly by {self.tensor}"
            region[dim] = slice(min(self.tensor_rank * own, size), min((self.tensor_rank + 1) * own, size))
        return tuple(region)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a parameter's region on this rank."""
        return tuple(side.stop - side.start for side in self.box(name))

    # -- module parameters -------------------------------------------------------------------------------------------

    def names(self, chunk: int = 0) -> dict[str, list[str]]:
        """Name of each parameter of a chunk's module -> the canonical names it holds: one, or all that share it."""
        key = (self.spec.digest, self.pipeline, self.stage, self.virtual, chunk)
        if key not in _names:
            found: dict[str, list[str]] = {}
            for name, param in self.spec.params.items():
                if self.has(name, chunk):
                    module = megatron_place(self.spec, name).module
                    if param.layer is not None:
                        own = param.layer - self.layers(param.tower, chunk).start
                        module = _LAYER.sub(f"decoder.layers.{own}.", module)
                    found.setdefault(module, []).append(name)
            if self.copied_head(chunk):
                found[OUTPUT_LAYER] = [embedding_key(self.spec)]
            _names[key] = found
        return _names[key]

    def split(self, names: list[str], tensor: Tensor) -> dict[str, Tensor]:
        """Canonical name -> this rank's region of it, from the module parameter (or its gradient or moment) that holds
        `names`. One that holds a single parameter is not copied; padding is left out."""
        if len(names) == 1:
            place = place_on_rank(self.spec, names[0], self.tensor)
            shape = self.shape(names[0])
            oriented = tensor.t() if place.transposed else tensor
            return {names[0]: oriented[: shape[0]] if self._padding(names[0]) else oriented.view(shape)}
        parts = {}
        for name in names:
            parts[name] = tensor.new_empty(self.shape(name))
            for own, fused in self._views({name: parts[name]}, tensor):
                own.copy_(fused)
        return parts

    def fuse(self, tensors: dict[str, Tensor]) -> Tensor:
        """The inverse of `split`: the module parameter that holds the regions `tensors`; padding is zero."""
        name, first = next(iter(tensors.items()))
        place = place_on_rank(self.spec, name, self.tensor)
        if len(tensors) == 1:
            if missing := self._padding(name):
                return torch.cat([first, first.new_zeros(missing, *first.shape[1:])])
            if place.transposed:
                return first.t().contiguous()
            return first.view(1) if first.dim() == 0 else first  # modules hold scalars as [1], see ClipModel
        whole = first.new_empty(place.shape)
        for own, fused in self._views(tensors, whole):
            fused.copy_(own)
        return whole

    def _padding(self, name: str) -> int:
        """Rows of this rank's module parameter that are no vocabulary entries."""
        param = self.spec.params[name]
        if not self.is_split(name) or param.stage == "layer":
            return 0
        return place_on_rank(self.spec, name, self.tensor).shape[0] - self.shape(name)[0]

    def _views(self, tensors: dict[str, Tensor], fused: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """For each run of rows that the regions `tensors` have in the `fused` one: a view of it in either."""
        for name, tensor in tensors.items():
            place = place_on_rank(self.spec, name, self.tensor)
            own = tensor.t() if place.transposed else tensor
            for run in place.rows.runs(0, own.shape[0]):
                yield own[run.start : run.stop], fused[run.at : run.at + run.stop - run.start]
