"""What the writers of all formats share: declaring, checking that everything arrived once, committing, aborting, and
continuing what a killed run left."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch
import xxhash

from compt_megatron.checkpoint.commit import Destination
from compt_megatron.checkpoint.contract import Layout, Region, Task, TensorInfo, dtype_name, slabs, split_name, whole
from compt_megatron.checkpoint.journal import Box, Entry, Journal, earlier_entries
from compt_megatron.checkpoint.manifest import make_manifest
from compt_megatron.checkpoint.out_file import OutFile
from compt_megatron.checkpoint.sums import joined
from compt_megatron.errors import UserError
from compt_megatron.spec.table import ModelSpec

FileRow = tuple[str, str, int]  # name, checksum, bytes
Place = tuple[tuple[int, ...], tuple[int, ...]]  # offsets, sizes
Unit = list[tuple[str, Region]]  # boxes of tensors that one worker had best write one after the other

KEEP = 256 * 2**20  # bytes that a kill may cost


class BoxWriter(ABC):
    """A Writer that knows everything but how its format lays out bytes (the abstract methods).

    A format that can be continued after a kill has `_sync` and `_restore` too. One that fills files in place gets both
    by saying which files it fills (`_out_files`) and by reading back what it wrote (`_read_back`).
    """

    format_name: str
    copies = 1  # how often the tensors lie on the disk while being written

    def __init__(self, task: Task) -> None:
        self.spec, self.layout = task.spec, task.layout
        mine = type(self)
        self._reads_back = mine._read_back is not BoxWriter._read_back
        continuable = mine._restore is not BoxWriter._restore or self._reads_back
        self._request = task.request if continuable else None
        self.destination = Destination(task.path, task.rank, task.world, task.exchange, task.overwrite, self._request)
        self.party = self.destination.party
        self.folder = self.destination.folder
        self.declared: dict[str, TensorInfo] = {}
        self._boxes: dict[str, list[Place]] = {}
        self._journal: Journal | None = None
        self._unkept: list[Box] = []
        self._unkept_bytes = 0
        self._sums: dict[str, dict[int, str]] = {}
        self._done = False

    # -- what a format adds

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

    def _release(self) -> None:  # noqa: B027 - formats without open files have nothing to release
        """Close this rank's files after a failure."""

    def _end_unit(self) -> None:  # noqa: B027 - only formats that fuse tensors keep boxes back
        """Store what `_put` kept back until its neighbours come."""

    def _interleaved(self, name: str) -> tuple[Any, int] | None:
        """(key, blocks): the tensors of the same key are stored together, their rows cut into so many equal blocks that
        take turns. None: the tensor is stored by itself."""
        return None

    def _out_files(self) -> Iterable[OutFile]:
        """The files that the ranks fill together, in place."""
        return ()

    def _read_back(self, name: str, region: Region) -> torch.Tensor | None:
        """A box of a tensor as it lies in `_out_files`, its bytes noted in their sums."""
        return None

    def _sync(self) -> Any:
        """Make durable all that was put; returns what `_restore` must know of it, as JSON can hold it."""
        for file in self._out_files():
            file.sync()

    def _restore(self, entry: Entry) -> bool:
        """Whether what an earlier run noted is really there; takes it up if it is."""
        for box in entry.boxes:
            region = tuple(slice(at, at + size) for at, size in zip(box.offsets, box.sizes, strict=True))
            found = self._read_back(box.name, region)
            if found is None or box_hash(found) != box.hash:
                return False
        return True

    def units(self, limit: int) -> Iterator[Unit]:
        """All that was declared, cut into boxes of at most `limit` bytes, in the order that suits the files."""
        together: dict[Any, list[str]] = {}
        for name in sorted(self.declared, key=self._position):
            woven = self._interleaved(name)
            together.setdefault(("alone", name) if woven is None else ("woven", *woven), []).append(name)
        for (kind, *_, blocks), names in together.items():
            if kind == "alone":
                yield from ([(names[0], region)] for region in slabs(self.declared[names[0]], limit))
            else:
                yield from self._woven_units(names, blocks, limit)

    def _woven_units(self, names: list[str], blocks: int, limit: int) -> Iterator[Unit]:
        infos = [self.declared[name] for name in names]
        step = limit * blocks // max(1, sum(info.nbytes for info in infos))
        if not step:  # a single block is too large: each tensor by itself
            yield from ([(name, box)] for name, info in zip(names, infos, strict=True) for box in slabs(info, limit))
            return
        for start in range(0, blocks, step):
            stop = min(start + step, blocks)
            rows = [slice(start * info.shape[0] // blocks, stop * info.shape[0] // blocks) for info in infos]
            yield [(name, (own, *whole(info.shape[1:]))) for name, own, info in zip(names, rows, infos, strict=True)]

    def _position(self, name: str) -> Any:
        """What tensors are sorted by in `units`, so that those that lie beside each other in a file come together."""
        return 0

    @classmethod
    def file_sizes(
        cls, path: Path, spec: ModelSpec, tensors: dict[str, TensorInfo], layout: Layout, workers: int
    ) -> dict[str, int]:
        """The data files that a checkpoint of such tensors would have, and about how many bytes: for a dry run."""
        return {path.name: sum(info.nbytes for info in tensors.values())}

    # -- writing

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

    def recover(self) -> set[tuple[str, Place]]:
        """The boxes that an earlier run of the same request wrote, which need not be written again.

        Call it once, after everything was declared. From then on `keep` notes what there is.
        """
        request = self._request
        kept: list[Entry] = []
        if request is None:
            return set()
        if self.destination.continued:
            for entry in earlier_entries(self.folder, self.party.rank, request):
                if not self._restore(entry):
                    break
                kept.append(entry)
        self._journal = Journal(self.folder, self.party.rank, request, kept)
        for box in (box for entry in kept for box in entry.boxes):
            self._boxes.setdefault(box.name, []).append((box.offsets, box.sizes))
        return {(box.name, (box.offsets, box.sizes)) for entry in kept for box in entry.boxes}

    def keep(self) -> None:
        """Where a unit ends: store what was kept back; every 256 MB, make what was written survive a kill."""
        self._end_unit()
        if self._journal is not None and self._unkept_bytes >= KEEP:
            self._journal.add(Entry(self._unkept, self._sync()))
            self._unkept, self._unkept_bytes = [], 0

    def write(self, name: str, offsets: tuple[int, ...], tensor: torch.Tensor) -> None:
        info = self.declared[name]
        offsets, sizes = tuple(offsets), tuple(tensor.shape)
        assert tensor.dtype == info.dtype, f"{name}: {tensor.dtype} written, {info.dtype} declared"
        assert len(offsets) == len(sizes) == len(info.shape), f"{name}: box {offsets}+{sizes} of shape {info.shape}"
        inside = all(0 <= at <= at + n <= size for at, n, size in zip(offsets, sizes, info.shape, strict=True))
        assert inside, f"{name}: box {offsets}+{sizes} outside shape {info.shape}"
        if not tensor.numel():
            return
        tensor = tensor.detach()
        self._boxes.setdefault(name, []).append((offsets, sizes))
        self._put(name, offsets, tensor)
        if self._journal is not None:
            self._unkept.append(Box(name, offsets, sizes, box_hash(tensor) if self._reads_back else ""))
            self._unkept_bytes += tensor.nbytes

    def commit(self, metadata: dict[str, Any]) -> Path:
        assert not self._done, "a writer commits once"
        self._done = True
        try:
            rows = self.party.share(lambda: (self._boxes, *self._finish_rank(), self._found_sums()))
            self.party.lead(lambda: self._commit_folder(rows, metadata))
        except Exception:
            self._clean_up()
            raise
        except BaseException:
            self.leave()
            raise
        self._close_journal()
        return self.destination.path

    def _found_sums(self) -> dict[str, dict[int, str]]:
        return {file.name: file.sums.found(file.path.stat().st_size) for file in self._out_files()}

    def _commit_folder(self, rows: list[Any], metadata: dict[str, Any]) -> None:
        boxes: dict[str, list[Place]] = {}
        for part, _, _, sums in rows:
            for name, found in part.items():
                boxes.setdefault(name, []).extend(found)
            for name, pieces in sums.items():
                self._sums.setdefault(name, {}).update(pieces)
        for name, info in self.declared.items():
            check_covered(name, info.shape, boxes.get(name, []))
        files = [row for _, found, _, _ in rows for row in found]
        files += self._finish_folder([extra for _, _, extra, _ in rows], metadata)
        self.destination.commit(make_manifest(self.format_name, self.spec, self.declared, files, metadata))

    def _file_row(self, path: Path) -> FileRow:
        """For `_finish_folder`: the row of a file that the ranks filled together; only what they could not sum is read
        again."""
        size = path.stat().st_size
        return path.relative_to(self.folder).as_posix(), joined(path, size, self._sums.get(path.name, {})), size

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

    def leave(self) -> None:
        """Stop, and let what is there be continued by the next run of the same request."""
        self._done = True
        self._release()
        self._close_journal()
        self.destination.unclaim()

    def _clean_up(self) -> None:
        self._release()
        self._close_journal()
        self.destination.discard()

    def _close_journal(self) -> None:
        if self._journal is not None:
            self._journal.close()


def check_covered(name: str, shape: tuple[int, ...], boxes: list[Place]) -> None:
    """Raise RuntimeError unless the boxes cover the tensor exactly once."""
    near: list[Place] = []  # earlier boxes that reach beyond the first index of this one
    for box in sorted(boxes):
        offsets, sizes = box
        near = [(at, n) for at, n in near if not at or at[0] + n[0] > offsets[0]]
        for left, left_sizes in near:
            axes = zip(left, left_sizes, offsets, sizes, strict=True)
            if all(a < b + n and b < a + m for a, m, b, n in axes):
                raise RuntimeError(f"{name}: the boxes at {left} and {offsets} overlap: an element was written twice")
        near.append(box)
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


def box_hash(tensor: torch.Tensor) -> str:
    return str(xxhash.xxh3_64(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data).hexdigest())
