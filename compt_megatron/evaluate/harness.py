"""EleutherAI's lm-eval on a Hugging Face folder: which tasks there are, and what a model reaches on them.

lm-eval (extra `eval`) is imported where it is used. Its results are those of `lm_eval --model hf` on the folder.
"""

from __future__ import annotations

import difflib
import importlib.util
import io
import logging
import math
import os
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compt_megatron.data.text.tokenizer import FILE, find_tokenizer
from compt_megatron.errors import UserError
from compt_megatron.torchvision_mend import ensure_torchvision_if_installed

BATCH_SIZE = 16  # sequences at once, where nothing is said
RESAMPLES = 1000  # for standard errors that have no formula, which are then right to 2 %
Results = dict[str, dict[str, float]]
_LONGEST = 200  # characters of another library's message that one of ours quotes


class Tasks:
    """Tasks of lm-eval with their data, to be run on any number of models."""

    def __init__(self, names: Sequence[str], include: Path | str | None = None) -> None:
        """`names`: of tasks, groups and tags; `include`: a folder with tasks of one's own, which come first. Loads the
        data sets, from the network where they are not in the cache.

        Raises UserError where lm-eval is not installed, a task is not known or cannot be set up.
        """
        if importlib.util.find_spec("lm_eval") is None:
            raise UserError("lm-eval is not installed, which tasks need; pip install 'compt-megatron[eval]'")
        ensure_torchvision_if_installed()  # transformers imports it
        os.environ["DISABLE_MULTIPROC"] = "1"  # lm-eval's: its resampling would fork this process, with all its threads
        with _quiet():
            self._manager = _manager(names, include)
            try:
                self._loaded = self._manager.load([task for name in names for task in self._load(name)])
            except ValueError as error:
                raise UserError(f"tasks {', '.join(names)}: {_line(error)}; name each task once") from error
        self._shots = {name: task.get_config("num_fewshot") for name, task in self._loaded["tasks"].items()}
        for name, task in self._loaded["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False):
                raise UserError(f"task {name!r}: runs code that the model writes; use lm-eval itself for it")
            if getattr(task, "MULTIMODAL", False):
                raise UserError(f"task {name!r}: is not of text alone; leave it out")

    def _load(self, name: str) -> list[Any]:
        """A task, or a group, or the tasks of a tag, with their data."""
        try:
            found = self._manager.load([name])
        except Exception as error:  # whatever the libraries of data sets and metrics raise
            raise UserError(
                f"task {name!r}: cannot be set up ({_line(error)}); correct the task, or put its data set where "
                "lm-eval finds it"
            ) from error
        groups = found.get("groups") or {}
        return [groups[name]] if name in groups else list(found["tasks"].values())

    def run(
        self, folder: Path, device: torch.device | str = "cpu", limit: int | None = None, shots: int | None = None,
        batch_size: int | None = None,
    ) -> Results:  # fmt: skip
        """{task or group: {metric: value}} of the model in a Hugging Face folder, in the dtype that it is stored in.

        Metrics are named as in lm-eval, `acc` or with a filter `exact_match,strict-match`, standard errors
        `acc_stderr`; `samples` are the documents that were used, `shots` the examples before each. `limit`: documents
        of each task; `shots`: examples, instead of each task's own number; `batch_size`: sequences at once. Sets the
        seeds of all random generators. Raises UserError where the model or its tokenizer cannot be loaded, or memory
        is short.
        """
        from lm_eval.evaluator import evaluate

        batch_size = batch_size or BATCH_SIZE
        try:
            with _quiet():
                self._seed(shots)
                model = _model(folder, device, batch_size)
                found = evaluate(
                    lm=model, task_dict=self._loaded, limit=limit, bootstrap_iters=RESAMPLES, log_samples=False
                )
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"{folder}: not enough memory on {device} for lm-eval with {batch_size} sequences at once; lower "
                "batch_size"
            ) from error
        return _results(found)

    def _seed(self, shots: int | None) -> None:
        """What lm-eval's command does before it evaluates: seeds, and the examples in a prompt (a task that says none
        keeps to it)."""
        from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

        random.seed(DEFAULT_RANDOM_SEED)
        np.random.seed(DEFAULT_OTHER_SEED)
        torch.manual_seed(DEFAULT_OTHER_SEED)
        for name, task in self._loaded["tasks"].items():
            own = self._shots[name]
            task.set_config(key="num_fewshot", value=shots if shots is not None and own != 0 else own or 0)
            task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)


def _manager(names: Sequence[str], include: Path | str | None) -> Any:
    """The index of tasks, of which `names` must be some. To list lm-eval's own takes seconds: they are left out where
    `include` has all that is asked for."""
    from lm_eval.tasks import TaskManager

    own = None
    if include is not None:
        if not Path(include).is_dir():
            raise UserError(f"{include}: no such folder of tasks; name one that holds lm-eval's YAML files")
        own = TaskManager(include_path=str(include), include_defaults=False)
        if not own.all_tasks:
            raise UserError(f"{include}: holds no task; name a folder of lm-eval's YAML files, each with a `task`")
        if set(names) <= set(own.all_subtasks):
            return own
    manager = TaskManager(include_path=None if include is None else str(include))
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "`lm_eval ls tasks` lists them"
            raise UserError(f"task {name!r}: lm-eval has none of that name; {hint}")
    return manager


def _model(folder: Path, device: torch.device | str, batch_size: int) -> Any:
    """lm-eval's wrapper of a model that is loaded already: it then looks for no other processes."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM

    tokenizer = _tokenizer(folder)
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        model = model.to(device).eval()
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: transformers cannot load it ({_line(error)})") from error
    if len(tokenizer) > model.config.vocab_size:
        raise UserError(
            f"{folder}: its tokenizer has {len(tokenizer)} tokens, the model {model.config.vocab_size}; put the "
            "model's own tokenizer there"
        )
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


def _tokenizer(folder: Path) -> Any:
    """The tokenizer beside a model, with the token that ends documents, before which lm-eval puts a text."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # of any kind, where files are missing or not what they should be
        raise UserError(
            f"{folder}: transformers finds no tokenizer there ({_line(error)}); put tokenizer.json beside the weights"
        ) from error
    if tokenizer.eos_token_id is None and tokenizer.bos_token_id is None and (folder / FILE).is_file():
        tokenizer.eos_token = find_tokenizer(folder).eod_token
    if tokenizer.eos_token_id is None and tokenizer.bos_token_id is None:
        raise UserError(f"{folder}: its tokenizer has no token that begins or ends a text, which lm-eval needs; name "
                        "one as eos_token in tokenizer_config.json")  # fmt: skip
    return tokenizer


def _results(found: dict[str, Any]) -> Results:
    results: Results = {}
    for name, values in {**found["results"], **(found.get("groups") or {})}.items():
        numbers = {}
        for key, value in values.items():
            metric, comma, kind = key.partition(",")
            if comma and isinstance(value, int | float) and math.isfinite(value):
                numbers[metric if kind == "none" else key] = float(value)
        for known, key in (("samples", "n-samples"), ("shots", "n-shot")):
            count = (found.get(key) or {}).get(name)
            count = count.get("effective") if isinstance(count, dict) else count
            if numbers and isinstance(count, int):
                numbers[known] = count
        if numbers:
            results[name] = numbers
    return results


@contextmanager
def _quiet() -> Iterator[None]:
    """Bars and remarks on stderr, where that is a terminal; stdout is the caller's."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    hidden = nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO())
    try:
        with hidden, redirect_stdout(sys.stderr):
            yield
    finally:
        logger.setLevel(before)


def _line(error: BaseException) -> str:
    """The first line of another library's message."""
    text = " ".join((str(error).strip() or repr(error)).splitlines()[0].split())
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
