"""Saving and loading a student with its optimizer state as the run checkpoint (docs/checkpoint.md), any ZeRO stage.

Parameters pass the boundary under canonical names, whole, one at a time; a rank never holds more than a few of them.
What is on disk does not depend on the ranks or the ZeRO stage that wrote it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from compt_megatron.checkpoint.contract import Reader, TensorInfo
from compt_megatron.checkpoint.formats import open_reader, open_writer
from compt_megatron.engine.runtime import Runtime
from compt_megatron.engine.student import Student
from compt_megatron.engine.zero_state import MOMENTS, ZeroState
from compt_megatron.errors import UserError
from compt_megatron.models.state import fuse, split_fused
from compt_megatron.spec.table import ModelSpec

_ONE_STEP = "step/optimizer"  # the one count that the first version saved


class RunCheckpoint:
    """The checkpoint side of one engine. `canonical`: the student's parameter name -> the canonical names it holds."""

    def __init__(
        self, student: Student, spec: ModelSpec, canonical: dict[str, list[str]], state: ZeroState, dtype: torch.dtype,
        runtime: Runtime,
    ) -> None:  # fmt: skip
        self._student, self._spec, self._canonical = student, spec, canonical
        self._state, self._dtype, self._runtime = state, dtype, runtime

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
            for index, (name, param) in enumerate(self._student.named_parameters()):
                master = self._state.master(param)
                tensors = {"weight": master.to(self._dtype), "master": master}
                tensors |= {key: self._state.moment(param, key) for key in MOMENTS}
                if index % self._runtime.world != self._runtime.rank:
                    continue
                for prefix in prefixes:
                    for member, tensor in self._split(name, tensors[prefix]).items():
                        writer.write(_boundary_name(prefix, member), (0,) * tensor.dim(), tensor.contiguous())
            if self._runtime.is_main:
                for name in steps:  # all parameters step together; other optimizers, and growth, count each
                    writer.write(name, (), torch.tensor(float(self._state.step)))
            return writer.commit(metadata)
        except BaseException:
            writer.abort()
            raise

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
            held = reader.tensors()
            count = next(
                (name for name in (_ONE_STEP, *map("step/{}".format, self._spec.params)) if name in held), None
            )
            resumed = optimizer and count is not None
            for name, param in self._student.named_parameters():
                self._load_one(reader, held, path, name, param, resumed)
            self._state.step = int(reader.read(count)) if resumed and count is not None else 0
            return reader.metadata(), resumed
        finally:
            reader.close()

    def _load_one(
        self,
        reader: Reader,
        held: dict[str, TensorInfo],
        path: Path,
        name: str,
        param: torch.nn.Parameter,
        resumed: bool,
    ) -> None:
        first = self._members(name)[0]
        if _boundary_name("weight", first) not in held:
            if name in self._canonical:
                raise UserError(f"{path}: holds no tensor weight/{first}; it is not a whole checkpoint of this model")
            for key in MOMENTS:  # the projections of a link that starts keep the values they were made with
                self._state.set_moment(param, key, torch.zeros(_full_shape(param)))
            return
        weight = self._read(reader, name, "weight")
        master = self._read(reader, name, "master") if _boundary_name("master", first) in held else weight
        self._state.set_weight(param, weight, master)
        for key in MOMENTS:
            value = self._read(reader, name, key) if resumed else torch.zeros(master.shape)
            self._state.set_moment(param, key, value)

    def _members(self, name: str) -> list[str]:
        """The canonical names that one parameter of the student holds."""
        return self._canonical.get(name) or ["align/" + name.removeprefix("projections.layers.")]

    def _declared(self, prefixes: list[str]) -> dict[str, TensorInfo]:
        declared = {}
        for name, param in self._student.named_parameters():
            for member in self._members(name):
                shape = self._spec.params[member].shape if name in self._canonical else _full_shape(param)
                for prefix in prefixes:
                    dtype = self._dtype if prefix == "weight" else torch.float32
                    declared[_boundary_name(prefix, member)] = TensorInfo(shape, dtype)
        return declared

    def _split(self, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        if name in self._canonical:
            return split_fused(self._spec, name.removeprefix("model."), tensor)
        return {self._members(name)[0]: tensor}

    def _read(self, reader: Reader, name: str, prefix: str) -> torch.Tensor:
        members = {member: reader.read(_boundary_name(prefix, member)) for member in self._members(name)}
        if name in self._canonical:
            return fuse(self._spec, name.removeprefix("model."), members)
        return next(iter(members.values()))


def _full_shape(param: torch.nn.Parameter) -> tuple[int, ...]:
    """A parameter's shape, also where ZeRO 3 has emptied it."""
    return tuple(getattr(param, "ds_shape", param.shape))


def _boundary_name(prefix: str, member: str) -> str:
    """The name of a tensor on the checkpoint boundary; projections have names of their own beside the model's."""
    return member if prefix == "weight" and member.startswith("align/") else f"{prefix}/{member}"
