"""Which samples, captions and augmentations form step t depends on the seed, t and the data only."""

from __future__ import annotations

import pickle
import random
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from data_samples import WordTokenizer, plain_transform, sample, write_set
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from compt_megatron.data.batch import Batch
from compt_megatron.data.loader import TrainLoader
from compt_megatron.data.source import ShardSource
from compt_megatron.data.stream import StreamPlan, default_streams
from compt_megatron.data.tokenizer import build_tokenizer
from compt_megatron.data.transforms import train_transform
from compt_megatron.errors import UserError

SIZES = [7, 13, 5, 11, 9, 3]  # 48 samples: shards end inside windows, and streams inside shards
COMMON = {
    "tokenizer": WordTokenizer(),
    "transform": plain_transform,
    "batch_size": 8,
    "captions": 2,
    "seed": 3,
    "streams": 4,
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ShardSource:
    folder = tmp_path_factory.mktemp("shards")
    write_set(folder, SIZES, lambda n: sample(n, [f"a {n}", f"bb {n}", f"ccc {n}"]))
    return ShardSource.open(str(folder))


def steps(source: ShardSource, count: int, **changes: object) -> list[Batch]:
    loader = TrainLoader(source, **{"shuffle_window": 5, **COMMON, **changes})  # type: ignore[arg-type]
    batches = iter(loader)
    try:
        return list(islice(batches, count))
    finally:
        batches.close()  # type: ignore[attr-defined]


def assert_same(left: list[Batch], right: list[Batch]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right):
        assert (a.sample_ids, a.step) == (b.sample_ids, b.step)
        assert torch.equal(a.images, b.images)
        assert a.texts is not None
        assert b.texts is not None
        assert torch.equal(a.texts, b.texts)


@pytest.mark.parametrize(("world", "workers"), [(1, 2), (2, 0), (2, 2), (4, 0), (4, 2)])
def test_ranks_and_workers_change_nothing(source: ShardSource, world: int, workers: int) -> None:
    alone = steps(source, 9)
    ranks = [steps(source, 9, rank=rank, world=world, workers=workers) for rank in range(world)]
    assert_same(alone, [Batch.join([rank[step] for rank in ranks]) for step in range(9)])


@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("start", [1, 6, 17])
def test_resuming_continues(source: ShardSource, start: int, workers: int) -> None:
    assert_same(steps(source, start + 3)[start:], steps(source, 3, start_step=start, workers=workers))


def test_cache_changes_nothing(source: ShardSource) -> None:
    assert_same(steps(source, 8, cache=True), steps(source, 8, cache=False))


def test_an_epoch_sees_every_sample_once_in_another_order_each_time(source: ShardSource) -> None:
    epochs = [
        [name for batch in steps(source, 6, start_step=6 * epoch) for name in batch.sample_ids] for epoch in (0, 1)
    ]
    for names in epochs:
        assert len(names) == 48
        assert set(Counter(names).values()) == {1}
    assert epochs[0] != epochs[1]


def test_seeds_and_windows_shuffle(source: ShardSource) -> None:
    names = {
        (seed, window): [
            name for batch in steps(source, 6, seed=seed, shuffle_window=window) for name in batch.sample_ids
        ]
        for seed in (3, 4)
        for window in (1, 12)
    }
    assert names[3, 12] != names[4, 12]
    assert names[3, 1] != names[3, 12]
    assert sorted(names[3, 1]) == sorted(names[3, 12])


def test_a_window_permutes_only_its_own_samples(source: ShardSource) -> None:
    plain = steps(source, 6, streams=1, shuffle_window=1)
    shuffled = steps(source, 6, streams=1, shuffle_window=16)
    plain_names = [name for batch in plain for name in batch.sample_ids]
    shuffled_names = [name for batch in shuffled for name in batch.sample_ids]
    for start in range(0, 48, 16):
        window = plain_names[start : start + 16]
        assert sorted(window) == sorted(shuffled_names[start : start + 16])
        assert window != shuffled_names[start : start + 16]


def test_augmentation_differs_between_visits_and_leaves_the_trainer_alone(source: ShardSource) -> None:
    torch.manual_seed(7)
    random.seed(7)
    np.random.seed(7)
    expected = (torch.rand(3).tolist(), random.random(), np.random.rand())
    torch.manual_seed(7)
    random.seed(7)
    np.random.seed(7)
    batches = steps(source, 12) + steps(source, 1, workers=2)
    assert (torch.rand(3).tolist(), random.random(), np.random.rand()) == expected
    images: dict[str, list[torch.Tensor]] = {}
    for batch in batches[:12]:
        for name, image in zip(batch.sample_ids, batch.images):
            images.setdefault(name, []).append(image)
    assert all(len(seen) == 2 and not torch.equal(seen[0], seen[1]) for seen in images.values())


def test_captions_are_drawn_without_replacement_and_repeated_where_there_are_too_few(source: ShardSource) -> None:
    def lengths(captions: int) -> list[tuple[int, ...]]:
        found = []
        for batch in steps(source, 12, captions=captions):
            assert batch.texts is not None
            assert batch.texts.shape[1] == batch.captions == captions
            for name, texts in zip(batch.sample_ids, batch.texts):
                number = int(name.rpartition("/s")[2])
                assert texts[:, 0].eq(number).all()
                found.append(tuple((texts[:, 1] - len(str(number)) - 1).tolist()))
        return found

    assert all(len(set(drawn)) == 2 for drawn in lengths(2))
    assert set(lengths(1)) == {(1,), (2,), (3,)}
    repeated = lengths(7)
    assert all(sorted(Counter(drawn).values()) == [2, 2, 3] for drawn in repeated)
    assert len(set(repeated)) > 3


def test_layouts_that_cannot_work_are_refused(source: ShardSource) -> None:
    with pytest.raises(UserError, match=r"data.batch_size 8 is not a multiple of the 3 data-parallel ranks; use 9"):
        steps(source, 1, world=3)
    with pytest.raises(
        UserError, match=r"8 do not divide among 3 data-parallel ranks; .* divides 8, a new one data.streams: 24"
    ):
        steps(source, 1, world=3, batch_size=24, streams=8)
    with pytest.raises(UserError, match=r"batch_size 8 is not a multiple of data.streams 3"):
        steps(source, 1, streams=3)
    with pytest.raises(UserError, match="48 samples, fewer than one batch of 64"):
        steps(source, 1, batch_size=64)


def test_any_number_of_ranks_that_divides_the_batch_can_read(source: ShardSource) -> None:
    """Also one that no default number of streams is a multiple of: the ranks' rows are one process's."""
    whole = steps(source, 3, batch_size=24, streams=24)
    for world in (3, 12, 24):
        ranks = [steps(source, 3, batch_size=24, streams=None, rank=rank, world=world) for rank in range(world)]
        for step, batch in enumerate(whole):
            assert [name for rank in ranks for name in rank[step].sample_ids] == batch.sample_ids


def test_default_streams_is_a_power_of_two_that_divides_the_batch() -> None:
    assert default_streams(332, 1024) == 64
    assert default_streams(20, 256) == 16
    assert default_streams(1, 256) == 16
    assert default_streams(332, 24) == 8
    assert [default_streams(332, 24, world) for world in (1, 2, 8, 3, 12, 24)] == [8, 8, 8, 24, 24, 24]
    assert [default_streams(332, 16384, world) for world in (64, 128, 512)] == [64, 128, 512]
    assert default_streams(332, 96 * 5, 5) == 160
    assert default_streams(332, 8 * 3 * 3, 9) == 72
    assert default_streams(332, 10, 10) == 10


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 20), min_size=1, max_size=8).filter(lambda sizes: sum(sizes) >= 8),
    streams=st.integers(1, 8),
    seed=st.integers(0, 5),
    number=st.integers(0, 3),
)
def test_streams_cut_a_pass_into_equal_disjoint_pieces(sizes: list[int], streams: int, seed: int, number: int) -> None:
    plan = StreamPlan(sizes, streams, seed, window=4)
    seen: Counter[tuple[int, int]] = Counter()
    for stream in range(streams):
        pieces = [(s, i) for s, start, end in plan.segments(stream, number) for i in range(start, end)]
        assert len(pieces) == plan.per_pass == sum(sizes) // streams
        seen.update(pieces)
    assert set(seen.values()) == {1}
    assert all(index < sizes[shard] for shard, index in seen)
    assert sum(sizes) - len(seen) < streams


def test_micro_batches_are_the_rows_in_order(source: ShardSource) -> None:
    batch = steps(source, 1)[0]
    assert_same([batch], [Batch.join(batch.split(4))])
    with pytest.raises(AssertionError, match="do not split"):
        batch.split(3)


def test_resume_opens_no_shard_before_its_position(tmp_path: Path) -> None:
    paths = write_set(tmp_path, [8] * 6)
    source = ShardSource.open(str(tmp_path))
    wanted = steps(source, 4, streams=1, captions=1, start_step=2, cache=False)
    passed = {name.partition("/")[0] for batch in steps(source, 2, streams=1, captions=1) for name in batch.sample_ids}
    ahead = {name.partition("/")[0] for batch in wanted for name in batch.sample_ids}
    for path in paths:
        if path.stem in passed - ahead:
            path.write_bytes(b"never to be read")
    again = TrainLoader(
        source, **{**COMMON, "streams": 1, "captions": 1, "start_step": 2, "cache": False, "shuffle_window": 5}
    )
    assert passed - ahead
    assert_same(wanted[:3], list(islice(iter(again), 3)))


def test_a_spawned_worker_gets_the_same_batches_without_importing_torchvision_first(source: ShardSource) -> None:
    config = {"embed_dim": 8, "vision_cfg": {"image_size": 8}, "text_cfg": {"context_length": 6, "vocab_size": 49408}}
    real = {"tokenizer": build_tokenizer(config), "transform": train_transform(config, {"scale": [0.5, 1.0]})}
    sent = pickle.dumps(TrainLoader(source, **{**COMMON, **real, "shuffle_window": 5})._parts)
    assert b"torchvision" not in sent  # its objects would import it before the mend that a CPU torch needs
    assert b"open_clip" not in sent
    assert_same(steps(source, 2, **real), list(islice(iter(pickle.loads(sent)), 2)))


def test_every_draw_is_its_own(source: ShardSource) -> None:
    noise = [image.flatten()[0].item() for batch in steps(source, 6, transform=noise_only) for image in batch.images]
    assert len(set(noise)) == 48
    plan = StreamPlan([100], streams=2, seed=0, window=25)
    windows = [(stream, number, start) for stream in range(2) for number in range(3) for start in (0, 25)]
    assert len({tuple(plan.window_order(*window, 25).tolist()) for window in windows}) == len(windows)


def noise_only(image: Image.Image) -> torch.Tensor:
    return torch.rand(1).expand(3, 8, 8)
