"""Writes Hugging Face's folders of language models, or one safetensors file."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from compt_megatron.checkpoint.commit import SINGLE_FILES
from compt_megatron.checkpoint.contract import Layout, Region, Task, TensorInfo, dtype_name, split_name
from compt_megatron.checkpoint.flat_file import FlatFile
from compt_megatron.checkpoint.hashed_file import HashedFile
from compt_megatron.checkpoint.huggingface_files import CONFIG, INDEX, WEIGHTS, shard_name
from compt_megatron.checkpoint.out_file import OutFile
from compt_megatron.checkpoint.writing import BoxWriter, FileRow, one_dtype
from compt_megatron.errors import UserError
from compt_megatron.spec.huggingface_names import HfPlace, explicit_config, hf_place, hf_shapes
from compt_megatron.spec.table import ModelSpec

SHARD_BYTES = 5 * 10**9  # of one file, as transformers cuts them
_PENDING_LIMIT = 128 * 2**20  # bytes of parts of rows that are kept until the rest of their rows has come

Rows = tuple[str, tuple[int, ...], tuple[int, ...]]  # key, offsets and sizes without the last dimension


class _Partial(NamedTuple):
    """Whole rows of a tensor, of which the columns `columns` have come."""

    values: torch.Tensor
    columns: list[slice]


class HuggingFaceWriter(BoxWriter):
    """Writes a folder with `config.json` and weights, in shards of at most SHARD_BYTES, or one safetensors file.

    Weights go straight to their place in the files. Boxes that have parts of rows (the thirds of GPT-2's `c_attn`) wait
    for the rest of their rows, up to _PENDING_LIMIT bytes. `attachments` of the metadata are copied into the folder.
    """

    format_name = "hf"

    def __init__(self, task: Task) -> None:
        if not task.spec.is_language_model:
            raise UserError(f"{task.path}: hf holds language models, '{task.spec.name}' is none; choose another format")
        if task.path.suffix == ".pt":
            raise UserError(f"{task.path}: hf is written as a folder or as one .safetensors file; rename it")
        self._places: dict[str, HfPlace] = {name: hf_place(task.spec, name) for name in task.spec.params}
        self._files: dict[str, FlatFile] = {}
        self._home: dict[str, FlatFile] = {}
        self._pending: dict[Rows, _Partial] = {}
        self._pending_bytes = 0
        super().__init__(task)

    def _accept(self, tensors: dict[str, TensorInfo]) -> None:
        for name in tensors:
            prefix, rest = split_name(name)
            if prefix != "weight" or rest not in self._places:
                raise UserError(f"{self.destination.path}: hf holds weights only, '{name}' has no place there")
        if self._files:
            assert not tensors, "a Hugging Face checkpoint is declared at once"
            return
        missing = [name for name in self._places if f"weight/{name}" not in self.declared]
        assert not missing, f"{missing[0]} and {len(missing) - 1} others are not declared"
        for name, part in _cut(_stored(self.spec, self.declared), self.destination.path):
            file = self._files[name] = FlatFile(self.folder / name, part)
            self._home |= dict.fromkeys(part, file)
        self.party.lead(self._create)
        for file in self._files.values():
            file.open()

    def _create(self) -> None:
        for file in self._files.values():
            file.create()

    @classmethod
    def file_sizes(
        cls, path: Path, spec: ModelSpec, tensors: dict[str, TensorInfo], layout: Layout, workers: int
    ) -> dict[str, int]:
        return {name: sum(info.nbytes for info in part.values()) for name, part in _cut(_stored(spec, tensors), path)}

    def _put(self, name: str, offsets: tuple[int, ...], tensor: torch.Tensor) -> None:
        place = self._places[split_name(name)[1]]
        file, at = self._home[place.key], (*offsets[:-1], offsets[-1] + place.start)
        width = file.tensors[place.key].shape[-1]
        if tensor.dim() < 2 or tensor.shape[-1] == width:
            file.write(place.key, at, tensor)
            return
        rows = (place.key, at[:-1], tuple(tensor.shape[:-1]))
        if rows not in self._pending:
            self._pending[rows] = _Partial(torch.empty((*rows[2], width), dtype=tensor.dtype), [])
            self._pending_bytes += self._pending[rows].values.nbytes
        partial = self._pending[rows]
        columns = slice(at[-1], at[-1] + tensor.shape[-1])
        partial.values[..., columns] = tensor
        partial.columns.append(columns)
        if sum(part.stop - part.start for part in partial.columns) == width:
            partial.columns[:] = [slice(0, width)]
            self._flush(rows)
        while self._pending_bytes > _PENDING_LIMIT:
            self._flush(next(iter(self._pending)))

    def _flush(self, rows: Rows) -> None:
        """Write what has come of some rows."""
        key, offsets, _ = rows
        partial = self._pending.pop(rows)
        self._pending_bytes -= partial.values.nbytes
        for columns in partial.columns:
            self._home[key].write(key, (*offsets, columns.start), partial.values[..., columns])

    def _end_unit(self) -> None:
        while self._pending:
            self._flush(next(iter(self._pending)))

    def _interleaved(self, name: str) -> tuple[Any, int] | None:
        shape, place = self.declared[name].shape, self._places[split_name(name)[1]]
        whole = len(shape) < 2 or self._home[place.key].tensors[place.key].shape[-1] == shape[-1]
        return None if whole else (place.key, shape[0])

    def _position(self, name: str) -> tuple[str, int, int]:
        place = self._places[split_name(name)[1]]
        file = self._home[place.key]
        return file.path.name, file.position(place.key), place.start

    def _out_files(self) -> Iterable[OutFile]:
        return [file.out for file in self._files.values()]

    def _read_back(self, name: str, region: Region) -> torch.Tensor:
        place = self._places[split_name(name)[1]]
        last = slice(region[-1].start + place.start, region[-1].stop + place.start)
        return self._home[place.key].read_back(place.key, (*region[:-1], last))

    def _finish_rank(self) -> tuple[list[FileRow], Any]:
        assert self._files, "commit without declare"
        self._end_unit()
        for file in self._files.values():
            file.finish()
        return [], None

    def _finish_folder(self, parts: list[Any], metadata: dict[str, Any]) -> list[FileRow]:
        rows = [self._file_row(file.path) for file in self._files.values()]
        if self.destination.single:
            return rows
        if len(self._files) > 1:
            total = sum(info.nbytes for file in self._files.values() for info in file.tensors.values())
            home = {key: file.path.name for key, file in self._home.items()}
            rows.append(self._json(INDEX, {"metadata": {"total_size": total}, "weight_map": home}))
        rows.append(self._json(CONFIG, explicit_config(self.spec, self._main_dtype())))
        for name, source in (metadata.get("attachments") or {}).items():
            attached = HashedFile(self.folder / name)
            attached.write(Path(source).read_bytes())
            rows.append(attached.finish())
        return rows

    def _main_dtype(self) -> str:
        """The dtype of most elements."""
        counts: Counter[torch.dtype] = Counter()
        for info in self.declared.values():
            counts[info.dtype] += info.nbytes // info.dtype.itemsize
        return dtype_name(max(counts, key=lambda dtype: counts[dtype]))

    def _json(self, name: str, content: dict[str, Any]) -> FileRow:
        file = HashedFile(self.folder / name)
        file.write((json.dumps(content, indent=2) + "\n").encode())
        return file.finish()

    def _release(self) -> None:
        for file in self._files.values():
            file.close()


def _stored(spec: ModelSpec, tensors: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The tensors of the files by transformers' keys, in the order of the model; `tensors` are the boundary's."""
    members: dict[str, list[str]] = {}
    for name in spec.params:
        members.setdefault(hf_place(spec, name).key, []).append(f"weight/{name}")
    return {key: TensorInfo(shape, one_dtype(key, members[key], tensors)) for key, shape in hf_shapes(spec).items()}


def _cut(stored: dict[str, TensorInfo], path: Path) -> Iterator[tuple[str, dict[str, TensorInfo]]]:
    """File names and the tensors in them, of a checkpoint at `path`."""
    if path.suffix in SINGLE_FILES:
        yield path.name, stored
        return
    shards: list[dict[str, TensorInfo]] = [{}]
    size = 0
    for key, info in stored.items():
        if shards[-1] and size + info.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][key] = info
        size += info.nbytes
    for index, shard in enumerate(shards):
        yield shard_name(index, len(shards)) if len(shards) > 1 else WEIGHTS, shard
