"""Writes open_clip's files: a folder with weights and config, or one `.pt` or `.safetensors` file."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from compt_megatron.checkpoint.commit import SINGLE_FILES, fsync_files
from compt_megatron.checkpoint.contract import Layout, Region, Task, TensorInfo, split_name
from compt_megatron.checkpoint.filled_archive import ArchiveLayout, FilledArchive, Hole
from compt_megatron.checkpoint.flat_file import FlatFile
from compt_megatron.checkpoint.hashed_file import HashedFile
from compt_megatron.checkpoint.out_file import OutFile
from compt_megatron.checkpoint.writing import BoxWriter, FileRow, one_dtype
from compt_megatron.errors import UserError
from compt_megatron.spec.open_clip_names import FilePlace, open_clip_place, open_clip_shapes
from compt_megatron.spec.table import ModelSpec

CONFIG = "open_clip_config.json"
WEIGHTS = "open_clip_model.safetensors"
# the image normalisation that every open_clip model uses unless its config says otherwise
_PREPROCESS = {
    "mean": [0.48145466, 0.4578275, 0.40821073],
    "std": [0.26862954, 0.26130258, 0.27577711],
}


class OpenClipWriter(BoxWriter):
    """Writes a folder with weights and config, or one file. Weights go straight to their place."""

    format_name = "open_clip"

    def __init__(self, task: Task) -> None:
        if task.spec.is_language_model:
            raise UserError(f"{task.path}: open_clip has no language models; write '{task.spec.name}' as hf")
        self._places: dict[str, FilePlace] = {name: open_clip_place(task.spec, name) for name in task.spec.params}
        self._file: FlatFile | FilledArchive | None = None
        super().__init__(task)

    def _accept(self, tensors: dict[str, TensorInfo]) -> None:
        for name in tensors:
            prefix, rest = split_name(name)
            if prefix != "weight" or rest not in self._places:
                raise UserError(
                    f"{self.destination.path}: open_clip files hold weights only, '{name}' has no place there"
                )
        if self._file is not None:
            assert not tensors, "an open_clip file is declared at once"
            return
        missing = [name for name in self._places if f"weight/{name}" not in self.declared]
        assert not missing, f"{missing[0]} and {len(missing) - 1} others are not declared"
        stored = {}
        for key, shape in open_clip_shapes(self.spec).items():
            members = [f"weight/{name}" for name, place in self._places.items() if place.key == key]
            stored[key] = TensorInfo(shape, one_dtype(key, members, self.declared))
        path = self.folder / (self.destination.path.name if self.destination.single else WEIGHTS)
        if path.suffix == ".pt":
            self._file = FilledArchive(path, ArchiveLayout(stored))
            return
        self._file = FlatFile(path, stored)
        self.party.lead(self._file.create)
        self._file.open()

    def _put(self, name: str, offsets: tuple[int, ...], tensor: torch.Tensor) -> None:
        assert self._file is not None
        place = self._places[split_name(name)[1]]
        if offsets:
            offsets = (offsets[0] + place.start, *offsets[1:])
        self._file.write(place.key, offsets, tensor)

    def _out_files(self) -> Iterable[OutFile]:
        return [self._file.out] if isinstance(self._file, FlatFile) else []

    def _sync(self) -> Any:
        if isinstance(self._file, FilledArchive):
            self._file.sync()
        return super()._sync()

    def _read_back(self, name: str, region: Region) -> torch.Tensor | None:
        assert self._file is not None
        place = self._places[split_name(name)[1]]
        if region:
            region = (slice(region[0].start + place.start, region[0].stop + place.start), *region[1:])
        try:
            return self._file.read_back(place.key, region)
        except OSError:  # an archive that was not written so far
            return None

    def _position(self, name: str) -> tuple[int, int]:
        assert self._file is not None
        place = self._places[split_name(name)[1]]
        start = self._file.position if isinstance(self._file, FlatFile) else self._file.layout.start
        return start(place.key), place.start

    @classmethod
    def file_sizes(
        cls, path: Path, spec: ModelSpec, tensors: dict[str, TensorInfo], layout: Layout, workers: int
    ) -> dict[str, int]:
        total = sum(info.nbytes for info in tensors.values())
        return {path.name: total} if path.suffix in SINGLE_FILES else {WEIGHTS: total, CONFIG: 0}

    def _finish_rank(self) -> tuple[list[FileRow], Any]:
        assert self._file is not None, "commit without declare"
        if isinstance(self._file, FlatFile):
            self._file.finish()
            return [], None
        self._file.close()
        return [], self._file.progress()

    def _finish_folder(self, parts: list[Any], metadata: dict[str, Any]) -> list[FileRow]:
        assert self._file is not None
        weights = self._file.path
        if isinstance(self._file, FilledArchive):
            digest, size = self._file.seal(parts, {key: Hole(key) for key in self._file.layout.tensors})
            fsync_files([weights])
            return [(weights.name, digest, size)]
        files = [self._file_row(weights)]
        if not self.destination.single:
            preprocess = metadata.get("preprocess_cfg") or _PREPROCESS
            config = {"model_cfg": self.spec.config, "preprocess_cfg": preprocess}
            written = HashedFile(self.folder / CONFIG)
            written.write((json.dumps(config, indent=2) + "\n").encode())
            files.append(written.finish())
            for name, source in metadata.pop("attachments", {}).items():
                attached = HashedFile(self.folder / name)
                attached.write(Path(source).read_bytes())
                files.append(attached.finish())
        return files

    def _release(self) -> None:
        if isinstance(self._file, FilledArchive):
            self._file.abandon()
        elif self._file is not None:
            self._file.close()
