"""Perplexity and bits per byte: transformers' own losses summed over a text, however its windows are shared out."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from compt_megatron.chain.evaluation import Sharing, evaluation_rows, perplexities
from compt_megatron.data.text.loader import HeldOutLoader
from compt_megatron.data.text.source import TextPart, TextSource
from compt_megatron.engine.runtime import Runtime
from compt_megatron.errors import UserError
from compt_megatron.evaluate.perplexity import losses_of, perplexity
from compt_megatron.models.build import build_language_model
from compt_megatron.models.groups import lone_groups
from compt_megatron.models.part import ModelPart
from compt_megatron.models.state import load_canonical
from compt_megatron.recipe.sections import EvaluateSettings
from tests.unit.lm_helpers import hf_model, llama, make_spec, split_state
from tests.unit.text_samples import numbered

LENGTH, TOKENS = 12, 100


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> TextSource:
    """100 tokens in five documents: eight windows of 12, and one of 3."""
    folder = tmp_path_factory.mktemp("text")
    documents = numbered(folder / "text", [7, 30, 1, 40, 22], vocab_size=61)
    return TextSource("text", (TextPart("text", documents, 1.0),))


@pytest.mark.parametrize("shares", [1, 3])
def test_it_is_transformers_mean_loss_over_the_whole_text(text: TextSource, shares: int) -> None:
    config = llama()
    spec, theirs = make_spec(config), hf_model(config)
    model = build_language_model(spec, part=ModelPart(spec), groups=lone_groups())
    load_canonical(model, spec, split_state(spec, theirs.state_dict()).__getitem__)
    losses = losses_of(model.eval(), chunk=5)
    nats = 0.0
    ids = torch.arange(TOKENS) % 61
    for start in range(0, TOKENS - 1, LENGTH):
        window = ids[start : start + LENGTH + 1]
        with torch.no_grad():
            logits = theirs(window[None, :-1]).logits[0]
        nats += float(torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum"))

    sums: list[torch.Tensor] = []
    for rank in range(shares):
        batches = HeldOutLoader(text, length=LENGTH, batch_size=2 * shares, rank=rank, world=shares)
        perplexity(losses, batches, lambda own: sums.append(own) or own)  # type: ignore[func-returns-value]
    found = perplexity(losses, [], lambda own: own + torch.stack(sums).sum(0), bytes=250)
    assert found["tokens"] == TOKENS - 1
    assert found["loss"] == pytest.approx(nats / (TOKENS - 1), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(nats / (TOKENS - 1)), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / 250, rel=1e-5)


def test_without_a_record_of_its_size_a_text_has_no_bits_per_byte(text: TextSource) -> None:
    runtime, alone = Runtime.start(), Sharing(0, 1, lambda values: values)
    found = perplexities([text], ["held"], lambda batch: (2.0 * float(batch.mask.sum()), float(batch.mask.sum())),
                         LENGTH, 4, alone, runtime, 10**6)  # fmt: skip
    assert found == {"held": {"perplexity": math.exp(2.0), "loss": 2.0, "tokens": TOKENS - 1, "length": LENGTH}}


def test_a_text_that_cannot_be_measured(text: TextSource, tmp_path: Path) -> None:
    """One of a single token, of which nothing is predicted, and ids that the model has not, in a set of any size."""
    one = TextSource("one", (TextPart("one", numbered(tmp_path / "one", [1], vocab_size=61), 1.0),))
    with pytest.raises(UserError, match="data 'one': has no token to predict, one alone; name a longer text"):
        HeldOutLoader(one, length=LENGTH, batch_size=4)
    with pytest.raises(UserError, match="data 'text': id 60 is beyond the vocabulary of 60 tokens"):
        list(HeldOutLoader(text, length=LENGTH, batch_size=4, vocab_size=60))


def test_a_batch_is_as_many_tokens_at_most_and_suits_a_pipeline() -> None:
    settings = EvaluateSettings(batch_size=64)
    assert evaluation_rows(settings, 16) == 64
    assert evaluation_rows(settings, 4096) == 4
    assert evaluation_rows(settings, 100_000) == 1
    assert evaluation_rows(settings, 100_000, multiple=4) == 4
