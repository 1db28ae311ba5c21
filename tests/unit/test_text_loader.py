"""The loaders of text: the same rows of every step for any ranks, workers and interruptions."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
import torch

from compt_megatron.data.text.batch import TokenBatch
from compt_megatron.data.text.loader import HeldOutLoader, TokenLoader
from compt_megatron.data.text.source import TextPart, TextSource
from compt_megatron.errors import UserError
from tests.unit.text_samples import numbered

BATCH, LENGTH = 12, 16


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> TextSource:
    """Two data sets of 900 and 400 tokens, drawn 3 : 1; a pass over both is 80 samples."""
    folder = tmp_path_factory.mktemp("source")
    parts = [("a", [7, 30, 0, 63] * 9, 3.0), ("b", [100] * 4, 1.0)]
    return TextSource(
        "both", tuple(TextPart(name, numbered(folder / name, lengths), weight) for name, lengths, weight in parts)
    )


def steps(source: TextSource, count: int, **options: object) -> list[TokenBatch]:
    loader = TokenLoader(source, length=LENGTH, batch_size=BATCH, seed=4, **options)  # type: ignore[arg-type]
    try:
        return list(islice(loader, count))
    finally:
        loader.close()


def same(left: TokenBatch, right: TokenBatch) -> bool:
    tensors = zip((left.tokens, left.targets, left.mask), (right.tokens, right.targets, right.mask))
    return (left.step, left.sample_ids) == (right.step, right.sample_ids) and all(a.equal(b) for a, b in tensors)


def test_a_batch_is_tokens_and_what_follows_them(source: TextSource) -> None:
    batch = steps(source, 1)[0]
    assert (len(batch), batch.length, batch.step) == (BATCH, LENGTH, 0)
    assert batch.tokens.shape == batch.targets.shape == batch.mask.shape == (BATCH, LENGTH)
    assert batch.tokens.dtype == batch.targets.dtype == torch.int64
    assert batch.mask.dtype == torch.bool
    assert batch.tokens[:, 1:].equal(batch.targets[:, :-1])
    assert len(set(batch.sample_ids)) == BATCH
    pieces = batch.split(3)
    assert [len(piece) for piece in pieces] == [4, 4, 4]
    assert same(TokenBatch.join(pieces), batch)
    assert same(batch.to("cpu"), batch)
    assert TokenLoader(source, length=LENGTH, batch_size=BATCH).steps_per_epoch == (56 + 24) // BATCH


@pytest.mark.parametrize(("world", "workers", "start"), [(1, 0, 5), (3, 0, 0), (4, 0, 7), (1, 2, 3), (2, 3, 4)])
def test_ranks_workers_and_resuming_change_nothing(source: TextSource, world: int, workers: int, start: int) -> None:
    """Two passes over the data and more: steps 0 to 19 of one rank, against the same steps from `start` on."""
    whole = steps(source, 20)
    ranks = [
        steps(source, 20 - start, rank=rank, world=world, workers=workers, start_step=start) for rank in range(world)
    ]
    for expected, *parts in zip(whole[start:], *ranks):
        assert [len(part) for part in parts] == [BATCH // world] * world
        assert same(TokenBatch.join(parts), expected)


def test_a_run_goes_on_with_another_batch_size(source: TextSource) -> None:
    """After 3 steps of 12 rows, 36 samples are consumed: with 18 rows a step the rest follows without gap or repeat."""
    rows = [name for batch in steps(source, 9) for name in batch.sample_ids]
    loader = TokenLoader(source, length=LENGTH, batch_size=18, seed=4, start_step=3, start_sample=36)
    again = list(islice(loader, 4))
    assert [batch.step for batch in again] == [3, 4, 5, 6]
    assert [name for batch in again for name in batch.sample_ids] == rows[36:]


def test_the_trainers_generators_are_left_alone(source: TextSource) -> None:
    before = torch.get_rng_state()
    steps(source, 2, workers=1)
    assert torch.get_rng_state().equal(before)


def test_an_error_in_a_worker_is_one_line(source: TextSource, tmp_path: Path) -> None:
    data = numbered(tmp_path / "d", [400])
    lone = TextSource("lone", (TextPart("d", data, 1.0),))
    loader = TokenLoader(lone, length=LENGTH, batch_size=BATCH, workers=1)
    loader.sequences.vocab_size = 300
    with pytest.raises(UserError, match=r"id 3\d\d is beyond the vocabulary of 300 tokens"):
        list(islice(loader, 2))
    with pytest.raises(UserError, match="batch_size 12 does not divide among 5 data-parallel ranks"):
        TokenLoader(source, length=LENGTH, batch_size=BATCH, world=5)
    with pytest.raises(UserError, match="fewer than one sequence"):
        TokenLoader(source, length=1000, batch_size=BATCH)


@pytest.mark.parametrize("world", [1, 4])
def test_evaluation_meets_every_token_once_in_order(source: TextSource, world: int) -> None:
    ranks = [
        list(HeldOutLoader(source, length=LENGTH, batch_size=BATCH, rank=rank, world=world)) for rank in range(world)
    ]
    batches = [TokenBatch.join(list(parts)) for parts in zip(*ranks, strict=True)]
    assert [len(batch) for batch in batches] == [BATCH] * 7  # 57 + 25 windows
    targets = torch.cat([batch.targets[batch.mask] for batch in batches]).tolist()
    assert targets == [*range(1, 900), *range(1, 400)]
    tokens = torch.cat([batch.tokens[batch.mask] for batch in batches]).tolist()
    assert tokens == [*range(899), *range(399)]
    loader = HeldOutLoader(source, length=LENGTH, batch_size=BATCH, limit=13)
    assert sum(int(batch.mask.sum()) for batch in loader) == 13 * LENGTH
    assert len(loader) == 2
