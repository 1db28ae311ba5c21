"""`compt eval --tasks`: lm-eval on any checkpoint of a language model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from compt_megatron.chain.export import export
from compt_megatron.chain.run_tokenizer import recorded_tokenizer, with_companions
from compt_megatron.checkpoint.formats import detect, open_reader
from compt_megatron.data.text.tokenizer import FILE, find_tokenizer
from compt_megatron.errors import UserError
from compt_megatron.evaluate.harness import Results, Tasks
from compt_megatron.recipe.files import expanded
from compt_megatron.spec.table import ModelSpec


def evaluate_tasks(
    checkpoint: str | Path, tasks: Sequence[str], *, include: str | Path | None = None, limit: int | None = None,
    shots: int | None = None, batch_size: int | None = None, tokenizer: str | Path | None = None,
    spec: ModelSpec | None = None,
) -> Results:  # fmt: skip
    """{task: {metric: value}} of a checkpoint in any format, as `evaluate.harness.Tasks.run` names them.

    What is no Hugging Face folder is exported to a temporary one first (TMPDIR says where). `tokenizer`: a
    tokenizer.json, or a folder with one; None: that beside the checkpoint, else what the run that it lies in records.
    On the first GPU, where there is one. Raises UserError for tasks, models and tokenizers that cannot be used.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("--tasks: lm-eval runs in one process; start it without a launcher")
    checkpoint = Path(checkpoint)
    reader = open_reader(checkpoint, spec)
    try:
        known, beside = reader.spec, reader.metadata().get("attachments") or {}
    finally:
        reader.close()
    assert known is not None
    if not known.is_language_model:
        raise UserError(f"--tasks: are for language models, {known.name} is none; leave them out")
    ready = detect(checkpoint) == "hf" and checkpoint.is_dir()
    file = find_tokenizer(expanded(str(tokenizer))).path if tokenizer is not None else None
    if file is None and FILE not in beside and (file := recorded_tokenizer(checkpoint)) is None and not ready:
        raise UserError(f"{checkpoint}: has no tokenizer beside it, and none is recorded; name one with --tokenizer")
    loaded = Tasks(tasks, include)
    cuda = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") != "cpu"
    device = "cuda" if cuda else "cpu"
    if ready and file is None:
        return loaded.run(checkpoint, device, limit, shots, batch_size)
    with TemporaryDirectory(prefix="compt-eval-") as folder:
        target = Path(folder) / "export"
        export(checkpoint, target, "hf", spec=spec, attachments=with_companions(file))
        return loaded.run(target, device, limit, shots, batch_size)
