"""Small tasks of lm-eval over local files, and a tiny language model with a tokenizer to run them on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from compt_megatron.torchvision_mend import ensure_torchvision
from tests.end_to_end import tiny_text

WITHOUT = "lm-eval is not installed: pip install 'compt-megatron[eval]'"
CHOICES = [
    {"question": f"Of {number} models the largest is", "choices": [" one", " the last of them", " two"], "answer": 1}
    for number in range(5)
]
TEXTS = [{"text": f"Each model is grown from the one before. It has {number} layers more."} for number in range(4)]
WORDS = [{"start": f"A chain of {number} models", "end": " grows"} for number in (3, 4, 7)]


def write_tasks(folder: Path) -> Path:
    """`folder` with the tasks tiny_choice, tiny_text (perplexity of a whole text) and tiny_word (of its last word)."""
    folder.mkdir(parents=True)
    mean = {"aggregation": "mean", "higher_is_better": True}
    _write(folder, "tiny_choice", CHOICES, output_type="multiple_choice", doc_to_text="{{question}}",
           doc_to_choice="choices", doc_to_target="answer", target_delimiter="",
           metric_list=[{"metric": "acc", **mean}])  # fmt: skip
    _write(folder, "tiny_text", TEXTS, output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{text}}",
           metric_list=[{"metric": "bits_per_byte"}, {"metric": "word_perplexity"}])  # fmt: skip
    _write(folder, "tiny_word", WORDS, output_type="loglikelihood", doc_to_text="{{start}}", doc_to_target="{{end}}",
           target_delimiter="", metric_list=[{"metric": "perplexity", "aggregation": "perplexity"},
                                             {"metric": "acc", **mean}])  # fmt: skip
    return folder


def _write(folder: Path, name: str, rows: list[dict[str, Any]], **task: Any) -> None:
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
    whole = {"task": name, **source, **task, "metadata": {"version": 1.0}}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(whole))


def write_model(folder: Path, text: Path) -> Path:
    """transformers' folder of a tiny Llama of random weights, with the tokenizer of the data in `text`."""
    ensure_torchvision()
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    fields = tiny_text.model(16, 2, 2, max_position_embeddings=64, initializer_range=0.4)
    LlamaForCausalLM(LlamaConfig(**fields)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((text / name).read_bytes())
    return folder


def require_lm_eval() -> None:
    pytest.importorskip("lm_eval", reason=WITHOUT)


def log_likelihood(model: Any, tokenizer: Any, start: str, end: str) -> tuple[float, bool]:
    """The log-probability of `end` behind `start` by transformers' own logits, and whether it is the likeliest."""
    whole, before = tokenizer(start + end).input_ids, len(tokenizer(start).input_ids)
    with torch.no_grad():
        scores = model(torch.tensor([whole])).logits[0, before - 1 : -1].double().log_softmax(-1)
    targets = torch.tensor(whole[before:])
    return float(scores.gather(1, targets[:, None]).sum()), bool((scores.argmax(1) == targets).all())
