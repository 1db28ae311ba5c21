"""What Megatron's own checkpoints hold beside the model's tensors: arguments, iteration, optimizer step, other state.

None of it is needed to read weights. It is compared with the model config, and what is not read is said.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from compt_megatron.checkpoint.contract import TensorInfo, whole
from compt_megatron.checkpoint.megatron_args import check_args
from compt_megatron.checkpoint.open_files import OpenFiles
from compt_megatron.checkpoint.saved_archive import Inert, SavedArchive, StoredTensor
from compt_megatron.checkpoint.torch_dist import TorchDistFolder
from compt_megatron.errors import UserError
from compt_megatron.spec.table import ModelSpec

_COMMON_FILE = "common.pt"  # up to megatron-core 0.18
_COMMON_OBJECT = "common_state/shard_0_1"  # from 0.19 on, among the tensors
EVERY_CLASS = ("",)  # becomes inert: nothing of such a file is run, whatever it asks for
_OF_THE_MODEL = ("embedding", "encoder", "decoder", "output_layer", "mtp", "vision", "text", "logit_scale", "model")
_BUCKETS = "optimizer.distributed."  # the distributed optimizer's own flat buffers (dp_reshardable)


class Common:
    """The state that all ranks of a Megatron job share: `args` by name, `iteration`, `step` of the optimizer."""

    def __init__(self, content: Any, number: Callable[[StoredTensor], float] | None = None) -> None:
        """`content`: what was saved; `number` reads a tensor of one element (None: steps are not looked for)."""
        content = content if isinstance(content, dict) else {}
        args = content.get("args")
        found = args.state if isinstance(args, Inert) else args
        self.args: dict[str, Any] = found if isinstance(found, dict) else {}
        iteration = content.get("iteration")
        self.iteration = iteration if isinstance(iteration, int) else 0
        steps = set() if number is None else set(_steps(content.get("optimizer"), number))
        self.step = steps.pop() if len(steps) == 1 else None
        kind = content.get("content_metadata")
        self.optimizer = kind.get("distrib_optim_sharding_type") if isinstance(kind, dict) else None

    @property
    def layout(self) -> dict[str, int] | None:
        """How the job was laid out, where its arguments say so."""
        names = {
            "tensor": "tensor_model_parallel_size",
            "pipeline": "pipeline_model_parallel_size",
            "virtual_pipeline": "virtual_pipeline_model_parallel_size",
            "data": "data_parallel_size",
        }
        sizes = {short: self.args.get(name) for short, name in names.items()}
        return {short: size for short, size in sizes.items() if isinstance(size, int)} or None

    def metadata(self, notes: list[str]) -> dict[str, Any]:
        """What a reader says of the checkpoint."""
        samples = self.args.get("consumed_train_samples")
        train = {"step": self.iteration, "samples": samples if isinstance(samples, int) else 0}
        return {"layout": self.layout, "train": train if self.iteration else None, "notes": notes}


def _steps(optimizer: Any, number: Callable[[StoredTensor], float], depth: int = 6) -> Iterator[float]:
    """Every step that the state of an optimizer, or of a chain of them, names; `depth`: of containers looked into."""
    if depth == 0 or not isinstance(optimizer, dict | list):
        return
    for key, value in optimizer.items() if isinstance(optimizer, dict) else enumerate(optimizer):
        if key not in ("common_step", "step"):
            yield from _steps(value, number, depth - 1)
        elif isinstance(value, int | float):
            yield float(value)
        elif isinstance(value, StoredTensor) and value.numel == 1:
            yield number(value)


def read_common(folder: TorchDistFolder) -> Common:
    """Read the common state of a torch_dist folder, in the form of either version; empty if there is none."""
    path, span = folder.path / _COMMON_FILE, None
    if not path.is_file():
        place = folder.objects.get(_COMMON_OBJECT)
        if place is None:
            return Common({})
        path, span = folder.path / place.file, (place.start, place.length)
    files = OpenFiles(os.O_RDONLY)
    try:
        archive = SavedArchive(path, files, inert=EVERY_CLASS, span=span)
        content = archive.content
        if span is not None and isinstance(content, list) and content:
            content = content[0]
        return Common(content, lambda value: float(archive.read(value, whole(value.shape)).item()))
    finally:
        files.close()


class Foreign:
    """Reads a torch_dist folder's other content and compares it with the model that it is said to be of."""

    def __init__(self, spec: ModelSpec, folder: TorchDistFolder, path: Path) -> None:
        self._path = path
        self._common = read_common(folder)
        self._told = check_args(spec, self._common.args, path)
        self._ignored: list[str] = []

    def check_strangers(self, keys: Iterable[str]) -> None:
        """Raise UserError if a tensor that the model lacks is one of a model; the others are not read."""
        for key in keys:
            if "_extra_state" in key:
                continue
            if key.split(".")[0] in _OF_THE_MODEL:
                raise UserError(
                    f"{self._path}: checkpoint of another model: it also has '{key}'; name the right model config "
                    "with --from"
                )
            self._ignored.append(key)

    @property
    def step(self) -> torch.Tensor:
        return torch.tensor(self._common.step)

    def steps(self, moments: Iterable[str]) -> dict[str, TensorInfo]:
        """`step/` for every parameter with moments: Megatron keeps one step for all."""
        if self._common.step is None:
            return {}
        return {f"step/{name.partition('/')[2]}": TensorInfo((), torch.float32) for name in moments}

    def metadata(self, padding: int) -> dict[str, Any]:
        notes = [*self._told]
        if padding:
            notes.append(f"{padding} rows of padding of the vocabulary were left out")
        buckets = [key for key in self._ignored if key.startswith(_BUCKETS)]
        if buckets:
            notes.append(
                "optimizer state in flat buckets (dp_reshardable) was left out; save with "
                "--dist-ckpt-optim-fully-reshardable to keep it"
            )
        if others := [key for key in self._ignored if not key.startswith(_BUCKETS)]:
            notes.append(f"left out: {len(others)} tensors that are not the model's, such as '{others[0]}'")
        return self._common.metadata(notes)
