"""What the writers of all formats share: declaring, checking that everything arrived once, committing, aborting."""

from __future__ import annotations

from abc import ABC, abstractmethod
from itertools import combinations
from math import prod
from pathlib import Path
from typing import Any

import torch

from compt_megatron.checkpoint.commit import Destination
from compt_megatron.checkpoint.contract import Task, TensorInfo, dtype_name, split_name
from compt_megatron.checkpoint.manifest import make_manifest
from compt_megatron.errors import UserError

Box = tuple[tuple[int, ...], tuple[int, ...]]  # offsets, sizes
FileRow = tuple[str, str, int]  # name, xxh3 hex, bytes


class BoxWriter(ABC):
    """A Writer that knows everything but how its format lays out bytes (the three abstract methods)."""

    format_name: str
    copies = 1  # how often the tensors lie on the disk while being written

    def __init__(self, task: Task) -> None:
        self.spec, self.layout = task.spec, task.layout
        self.destination = Destination(task.path, task.rank, task.world, task.exchange, task.overwrite)
        self.party = self.destination.party
        self.folder = self.destination.folder
        self.declared: dict[str, TensorInfo] = {}
        self._boxes: dict[str, list[Box]] = {}
        self._done = False

    @abstractmethod
    def _accept(self, tensors: dict[str, TensorInfo]) -> None:
        """Make ready for newly declared tensors (those of all ranks); UserError for what the format cannot hold."""

    @abstractmethod
    def _put(self, name: str, offsets: tuple[int, ...], tensor: torch.Tensor) -> None:
        """Store a box of a declared tensor."""

    @abstractmethod
    def _finish_rank(self) -> tuple[list[FileRow], Any]:
        """Make this rank's files durable; returns them and what rank 0 must know of them."""

    @abstractmethod
    def _finish_folder(self, parts: list[Any], metadata: dict[str, Any]) -> list[FileRow]:
        """Rank 0, after all ranks finished: write the files that describe the whole; returns them."""

    def declare(self, tensors: dict[str, TensorInfo]) -> None:
        union: dict[str, TensorInfo] = {}
        for part in self.party.share(lambda: tensors):
            for name, info in part.items():
                known = union.setdefault(name, self.declared.get(name, info))
                assert known == info, f"{name}: declared as {known} and as {info}"
        new = {name: info for name, info in union.items() if name not in self.declared}
        for name, info in new.items():
            self._check_against_spec(name, info)
        self.declared.update(new)
        total = sum(info.nbytes for info in self.declared.values())
        self.party.lead(lambda: self.destination.require_space(self.copies * total))
        self._accept(new)

    def _check_against_spec(self, name: str, info: TensorInfo) -> None:
        prefix, rest = split_name(name)
        if prefix in ("weight", "master", "exp_avg", "exp_avg_sq") and (param := self.spec.params.get(rest)):
            assert param.shape == info.shape, f"{name}: declared with shape {info.shape}, the model has {param.shape}"

    def write(self, name: str, offsets: tuple[int, ...], tensor: torch.Tensor) -> None:
        info = self.declared[name]
        offsets, sizes = tuple(offsets), tuple(tensor.shape)
        assert tensor.dtype == info.dtype, f"{name}: {tensor.dtype} written, {info.dtype} declared"
        assert len(offsets) == len(sizes) == len(info.shape), f"{name}: box {offsets}+{sizes} of shape {info.shape}"
        inside = all(0 <= at <= at + n <= size for at, n, size in zip(offsets, sizes, info.shape, strict=True))
        assert inside, f"{name}: box {offsets}+{sizes} outside shape {info.shape}"
        if not tensor.numel():
            return
        self._boxes.setdefault(name, []).append((offsets, sizes))
        self._put(name, offsets, tensor.detach())

    def commit(self, metadata: dict[str, Any]) -> Path:
        assert not self._done, "a writer commits once"
        self._done = True
        try:
            rows = self.party.share(lambda: (self._boxes, *self._finish_rank()))
            self.party.lead(lambda: self._commit_folder(rows, metadata))
        except BaseException:
            self._clean_up()
            raise
        return self.destination.path

    def _commit_folder(self, rows: list[Any], metadata: dict[str, Any]) -> None:
        boxes: dict[str, list[Box]] = {}
        for part, _, _ in rows:
            for name, found in part.items():
                boxes.setdefault(name, []).extend(found)
        for name, info in self.declared.items():
            _check_covered(name, info.shape, boxes.get(name, []))
        files = [row for _, found, _ in rows for row in found]
        files += self._finish_folder([extra for _, _, extra in rows], metadata)
        self.destination.commit(make_manifest(self.format_name, self.spec, self.declared, files, metadata))

    def abort(self) -> None:
        if self._done:
            return
        self._done = True
        try:
            self.party.desert("another rank gave up writing the checkpoint")
        except Exception:  # the ranks that should hear of it may be gone; there is nobody left to tell
            pass
        finally:
            self._clean_up()

    def _clean_up(self) -> None:
        self._release()
        self.destination.discard()

    def _release(self) -> None:  # noqa: B027 - formats without open files have nothing to release
        """Close this rank's files after a failure."""


def _check_covered(name: str, shape: tuple[int, ...], boxes: list[Box]) -> None:
    """Raise RuntimeError unless the boxes cover the tensor exactly once."""
    for (left, left_sizes), (right, right_sizes) in combinations(boxes, 2):
        axes = zip(left, left_sizes, right, right_sizes, strict=True)
        if all(a < b + n and b < a + m for a, m, b, n in axes):
            raise RuntimeError(f"{name}: the boxes at {left} and {right} overlap: an element was written twice")
    written, wanted = sum(prod(sizes) for _, sizes in boxes), prod(shape)
    if written != wanted:
        raise RuntimeError(f"{name}: {written} of {wanted} elements were written before commit")


def one_dtype(key: str, members: list[str], declared: dict[str, TensorInfo]) -> torch.dtype:
    """The dtype of tensors that one tensor of the file holds together; UserError if they differ."""
    dtypes = {declared[name].dtype for name in members}
    if len(dtypes) != 1:
        names = ", ".join(sorted(dtype_name(dtype) for dtype in dtypes))
        raise UserError(f"{key}: holds {members[0]} and others in one dtype, not in {names}; convert to one dtype")
    return dtypes.pop()
