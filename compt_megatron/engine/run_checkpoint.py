"""Saving and loading a student with its optimizer state as the run checkpoint (docs/checkpoint.md), any layout.

Parameters pass the boundary under canonical names, one at a time; a rank never holds more than a few of them. The
data-parallel ranks of one part of the model share out its parameters; tensor-parallel ranks write their regions. What
is on disk does not depend on the engine, the ranks or the ZeRO stage that wrote it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from compt_megatron.checkpoint.contract import Reader, TensorInfo
from compt_megatron.checkpoint.formats import open_reader, open_writer
from compt_megatron.engine.runtime import Runtime
from compt_megatron.engine.topology import Topology
from compt_megatron.errors import UserError
from compt_megatron.models.part import ModelPart, Region

MOMENTS = ("exp_avg", "exp_avg_sq")
_ONE_STEP = "step/optimizer"  # the one count that the first version saved


class ParameterState(Protocol):
    """What an engine's optimizer holds of a parameter, in the shape that the parameter has on this rank's model part.

    Reading is collective over the data-parallel ranks (each gets all of it); writing is local (each passes all of it).
    """

    def master(self, param: torch.nn.Parameter) -> torch.Tensor:
        """The fp32 weight."""
        ...

    def moment(self, param: torch.nn.Parameter, key: str) -> torch.Tensor:
        """`exp_avg` or `exp_avg_sq`, fp32."""
        ...

    def set_weight(self, param: torch.nn.Parameter, weight: torch.Tensor, master: torch.Tensor) -> None:
        """Set the model's weight (any dtype) and its fp32 master."""
        ...

    def set_moment(self, param: torch.nn.Parameter, key: str, value: torch.Tensor) -> None:
        """Set `exp_avg` or `exp_avg_sq`."""
        ...

    @property
    def step(self) -> int:
        """Optimizer steps taken, as Adam's bias correction counts them (equal for all parameters)."""
        ...

    @step.setter
    def step(self, value: int) -> None: ...

    def rest(self) -> None:
        """Have all of it where training expects it: what is offloaded to a disk is in memory while it is used here."""
        ...


@dataclass(frozen=True)
class Held:
    """A parameter of this rank and the tensors of the checkpoint that it holds: canonical ones, or a projection's."""

    param: torch.nn.Parameter
    names: list[str]
    aligns: bool = False  # a projection
    copied: bool = False  # another stage has it too, and writes it: the head of a tied language model

    def boundary(self, prefix: str, name: str) -> str:
        """The name of a tensor on the checkpoint boundary; projections have names of their own beside the model's."""
        return name if prefix == "weight" and self.aligns else f"{prefix}/{name}"


class RunCheckpoint:
    """The checkpoint side of one engine. `held`: the parameters of this rank, in the same order on all ranks that have
    the same part of the model."""

    def __init__(
        self, held: list[Held], part: ModelPart, state: ParameterState, dtype: torch.dtype, runtime: Runtime,
        topology: Topology,
    ) -> None:  # fmt: skip
        self._held, self._part, self._spec, self._state, self._dtype = held, part, part.spec, state, dtype
        self._runtime, self._topology = runtime, topology

    def save(self, path: Path, metadata: dict[str, Any]) -> Path:
        """Write weights, fp32 masters (only where weights are bf16), moments and the step. Collective."""
        prefixes = ["weight", *(["master"] if self._dtype != torch.float32 else []), *MOMENTS]
        writer = open_writer(
            path, "megatron", self._spec, rank=self._runtime.rank, world=self._runtime.world,
            exchange=self._runtime.exchange, overwrite=True,
        )  # fmt: skip
        try:
            steps = {f"step/{name}": TensorInfo((), torch.float32) for name in self._spec.params}
            writer.declare({**self._declared(prefixes), **steps})
            for index, held in enumerate(self._held):
                master = self._state.master(held.param)
                tensors = {"weight": master.to(self._dtype), "master": master}
                tensors |= {key: self._state.moment(held.param, key) for key in MOMENTS}
                if held.copied or index % self._topology.data != self._topology.data_rank:
                    continue
                for prefix in prefixes:
                    for name, region, tensor in self._mine(held, tensors[prefix]):
                        offsets = tuple(side.start for side in region)
                        writer.write(held.boundary(prefix, name), offsets, tensor.contiguous())
            if self._runtime.is_main:
                for name in steps:  # all parameters step together; other optimizers, and growth, count each
                    writer.write(name, (), torch.tensor(float(self._state.step)))
            self._state.rest()
            return writer.commit(metadata)
        except BaseException:
            writer.abort()
            raise

    def _mine(self, held: Held, tensor: torch.Tensor) -> Iterator[tuple[str, Region, torch.Tensor]]:
        """What this rank writes of a parameter: of what all tensor-parallel ranks have alike, the first writes it."""
        first = self._topology.tensor_rank == 0
        if held.aligns:
            if first:
                yield held.names[0], tuple(slice(0, size) for size in tensor.shape), tensor
            return
        for name, region in self._part.split(held.names, tensor).items():
            if first or self._part.is_split(name):
                yield name, self._part.box(name), region

    def load(self, path: Path, optimizer: bool) -> tuple[dict[str, Any], bool]:
        """Read weights, and the optimizer state if it is there and wanted. Returns the metadata, and whether it was.

        Raises UserError for a checkpoint of another model or one that is not whole.
        """
        reader = open_reader(path, self._spec)
        try:
            if reader.spec is not None and reader.spec.digest != self._spec.digest:
                raise UserError(
                    f"{path}: a checkpoint of model {reader.spec.name!r}, whose config differs from "
                    f"{self._spec.name!r}; name a checkpoint of this link's model"
                )
            there = reader.tensors()
            count = next(
                (name for name in (_ONE_STEP, *map("step/{}".format, self._spec.params)) if name in there), None
            )
            resumed = optimizer and count is not None
            for held in self._held:
                self._load_one(reader, there, path, held, resumed)
            self._state.rest()
            self._state.step = int(reader.read(count)) if resumed and count is not None else 0
            return reader.metadata(), resumed
        finally:
            reader.close()

    def _load_one(self, reader: Reader, there: dict[str, TensorInfo], path: Path, held: Held, resumed: bool) -> None:
        first = held.boundary("weight", held.names[0])
        if first not in there:
            if not held.aligns:
                raise UserError(f"{path}: holds no tensor {first}; it is not a whole checkpoint of this model")
            for key in MOMENTS:  # the projections of a link that starts keep the values they were made with
                self._state.set_moment(held.param, key, torch.zeros(_shape(held.param)))
            return
        weight = self._read(reader, held, "weight")
        master = self._read(reader, held, "master") if held.boundary("master", held.names[0]) in there else weight
        if self._dtype == torch.float32:  # a checkpoint in bf16 has both
            weight = master
        self._state.set_weight(held.param, weight, master)
        for key in MOMENTS:
            value = self._read(reader, held, key) if resumed else torch.zeros(master.shape)
            self._state.set_moment(held.param, key, value)

    def _read(self, reader: Reader, held: Held, prefix: str) -> torch.Tensor:
        if held.aligns:
            return reader.read(held.boundary(prefix, held.names[0]))
        return self._part.fuse(
            {name: reader.read(held.boundary(prefix, name), self._part.box(name)) for name in held.names}
        )

    def _declared(self, prefixes: list[str]) -> dict[str, TensorInfo]:
        declared = {}
        for held in self._held:
            for name in held.names:
                shape = _shape(held.param) if held.aligns else self._spec.params[name].shape
                for prefix in prefixes:
                    dtype = self._dtype if prefix == "weight" else torch.float32
                    declared[held.boundary(prefix, name)] = TensorInfo(shape, dtype)
        return declared


def _shape(param: torch.nn.Parameter) -> tuple[int, ...]:
    """A parameter's shape, also where ZeRO 3 has emptied it."""
    return tuple(getattr(param, "ds_shape", param.shape))
