"""Language models run by transformers, built from a checkpoint's tensors."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from compt_megatron.checkpoint.contract import Reader
from compt_megatron.errors import UserError
from compt_megatron.spec.huggingface_names import HEAD, embedding_key, hf_place, hf_shapes
from compt_megatron.spec.table import ModelSpec
from compt_megatron.torchvision_mend import ensure_torchvision

LIBRARY = "transformers"
_ROWS, _LENGTH = 4, 48  # of the probe batch, in tokens
# fields of a config that say how it was stored, not what the model is
_STORAGE = ("dtype", "torch_dtype", "auto_map", "_name_or_path")


def probe(reader_a: Reader, reader_b: Reader, seed: int) -> torch.Tensor:
    """Token ids [rows, length]. Raises UserError where the two models do not have the same vocabulary."""
    (vocab_a, tokens_a), (vocab_b, tokens_b) = (_inputs(reader) for reader in (reader_a, reader_b))
    if vocab_a != vocab_b:
        raise UserError(f"{reader_a.path} and {reader_b.path} hold models of different vocabulary; no parity")
    length = min(_LENGTH, tokens_a, tokens_b)
    return torch.randint(0, vocab_a, (_ROWS, length), generator=torch.Generator().manual_seed(seed))


def build(reader: Reader) -> torch.nn.Module:
    """transformers' causal language model of a checkpoint, fp32 on the CPU, with the checkpoint's weights.

    Every tensor of the model is filled: what transformers has and the checkpoint lacks, or the other way round, is an
    assertion. Memory: the model in fp32 and its largest tensor.
    """
    spec = _spec(reader)
    model = _fresh(spec)
    state = model.state_dict()
    tied = {HEAD} if spec.towers["text"].tied else set()
    shapes = {key: tuple(value.shape) for key, value in state.items() if key not in tied}
    assert shapes == hf_shapes(spec), f"transformers' {type(model).__name__} has other tensors than {spec.name}"
    assert not tied or state[HEAD].data_ptr() == state[embedding_key(spec)].data_ptr(), "the head is tied"
    for name, param in spec.params.items():
        place = hf_place(spec, name)
        target = state[place.key].narrow(-1, place.start, param.shape[-1])
        target.copy_(reader.read(f"weight/{name}"))
    return model.eval()


def run(model: torch.nn.Module, probe: torch.Tensor) -> dict[str, torch.Tensor]:
    """{"logits": [rows, length, vocabulary]} in the model's dtype."""
    return {"logits": model(input_ids=probe, use_cache=False).logits}


def _fresh(spec: ModelSpec) -> Any:
    if importlib.util.find_spec("torchvision") is not None:  # transformers imports it where it is installed
        ensure_torchvision()
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {field: value for field, value in spec.config.items() if field not in _STORAGE}
    with _quiet(), torch.random.fork_rng(devices=[]):
        config = AutoConfig.for_model(**fields)
        # plain attention: fused kernels are not there in every dtype
        return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' remarks on fields that have nothing to do with the weights, such as special tokens."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _inputs(reader: Reader) -> tuple[int, int]:
    """(vocabulary, longest sequence)"""
    spec = _spec(reader)
    return spec.params[embedding_key(spec)].shape[0], spec.towers["text"].tokens


def _spec(reader: Reader) -> ModelSpec:
    assert reader.spec is not None, "the caller has asked for it"
    return reader.spec
