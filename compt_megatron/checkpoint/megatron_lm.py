"""Megatron-LM's --save and --load folder: `latest_checkpointed_iteration.txt`, and a torch_dist folder an iteration.

Written for language models: weights, and the arguments that `--use-checkpoint-args` looks for, as iteration 0. Such a
folder is loaded with `--load DST --ckpt-format torch_dist --finetune` (or `--no-load-optim --no-load-rng`), at any
layout. Read: what Megatron-LM saved, whichever version.
"""

from __future__ import annotations

import argparse
from math import ceil
from pathlib import Path
from typing import Any

import torch

from compt_megatron.checkpoint.commit import fsync_folder
from compt_megatron.checkpoint.contract import Format, Task
from compt_megatron.checkpoint.hashed_file import HashedFile
from compt_megatron.checkpoint.megatron import MegatronReader
from compt_megatron.checkpoint.megatron_args import left_to_the_user, model_args
from compt_megatron.checkpoint.megatron_home import TRACKER, iteration_folder, tracked
from compt_megatron.checkpoint.megatron_legacy import holds_ranks
from compt_megatron.checkpoint.megatron_writer import MegatronWriter
from compt_megatron.checkpoint.writing import FileRow
from compt_megatron.errors import UserError
from compt_megatron.spec.megatron_names import PADDED_KEYS

_DIVISIBLE_BY = 128  # Megatron-LM's default of --make-vocab-size-divisible-by, times tensor-parallel ranks


class MegatronLmWriter(MegatronWriter):
    """Writes DST/iter_0000000, DST/latest_checkpointed_iteration.txt and DST/compt.json.

    The vocabulary is padded as Megatron-LM pads it. The padding repeats the last row, as Megatron-LM's own converter
    does: Megatron's loss runs over the padding too, and rows of zeros, with logit 0, may beat every real token.
    """

    format_name = "megatron-lm"
    inner = iteration_folder(0)

    def __init__(self, task: Task) -> None:
        if not task.spec.is_language_model:
            raise UserError(
                f"{task.path}: '{task.spec.name}' is no language model, Megatron-LM does not know it; "
                "choose --format megatron"
            )
        self._args = model_args(task.spec)
        multiple = _DIVISIBLE_BY * task.layout.tensor
        self._entries = next(param.dims[0].size for param in task.spec.params.values() if param.dims[0].axis == "vocab")
        self._padded = ceil(self._entries / multiple) * multiple
        super().__init__(task)

    def _padded_vocabulary(self) -> int:
        return self._padded

    def _store(self, key: str, name: str, offsets: tuple[int, ...], values: torch.Tensor) -> None:
        super()._store(key, name, offsets, values)
        padding = self._padded - self._entries
        if key in PADDED_KEYS and padding and offsets[0] + values.shape[0] == self._entries:
            super()._store(key, name, (self._entries, *offsets[1:]), values[-1:].expand(padding, *values.shape[1:]))

    def _common(self, metadata: dict[str, Any]) -> dict[str, Any]:
        ranks = self.layout.tensor * self.layout.pipeline
        args = argparse.Namespace(
            **self._args,
            vocab_size=self._entries,
            padded_vocab_size=self._padded,
            make_vocab_size_divisible_by=_DIVISIBLE_BY,
            tensor_model_parallel_size=self.layout.tensor,
            pipeline_model_parallel_size=self.layout.pipeline,
            virtual_pipeline_model_parallel_size=None,
            expert_model_parallel_size=1,
            context_parallel_size=1,
            data_parallel_size=1,
            world_size=ranks,
            ckpt_format="torch_dist",
            use_dist_ckpt=True,
            use_distributed_optimizer=False,
            no_save_optim=True,
            no_save_rng=True,
            iteration=0,
            consumed_train_samples=0,
            skipped_train_samples=0,
            consumed_valid_samples=0,
        )
        return {
            "args": args,
            "checkpoint_version": 3.0,
            "iteration": 0,
            "num_floating_point_operations_so_far": 0,
            "content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True},
        }

    def _finish_folder(self, parts: list[Any], metadata: dict[str, Any]) -> list[FileRow]:
        metadata["notes"] = [*(metadata.get("notes") or []), *left_to_the_user(self.spec)]
        metadata["layout"] = {"tensor": self.layout.tensor, "pipeline": self.layout.pipeline}
        rows = super()._finish_folder(parts, metadata)
        tracker = HashedFile(self.folder / TRACKER)
        tracker.write(b"0\n")
        fsync_folder(self.folder / self.inner)
        return [*rows, tracker.finish()]


def _recognises(path: Path) -> bool:
    return path.is_dir() and (path / TRACKER).is_file() and not holds_ranks(path / tracked(path))


FORMAT = Format("megatron-lm", _recognises, MegatronReader, MegatronLmWriter, prefixes=("weight",), layouts=True)
