"""Where samples come from, and what happens with those that are broken."""

from __future__ import annotations

import gzip
import json
import tarfile
from itertools import islice
from pathlib import Path

import pytest
import torch
from data_samples import Members, WordTokenizer, plain_transform, png, sample, write_set, write_shard

from compt_megatron.data.batch import Batch
from compt_megatron.data.loader import TrainLoader
from compt_megatron.data.samples import Broken, Decoder, Sample
from compt_megatron.data.source import ShardSource
from compt_megatron.data.tar_reader import count_samples, read_samples
from compt_megatron.errors import UserError


def batches(source: ShardSource, count: int, **changes: object) -> list[Batch]:
    options: dict[str, object] = {
        "tokenizer": WordTokenizer(),
        "transform": plain_transform,
        "batch_size": 4,
        "streams": 2,
    }
    loader = TrainLoader(source, **{**options, **changes})  # type: ignore[arg-type]
    try:
        return list(islice(iter(loader), count))
    finally:
        loader.close()


def numbers(found: list[Batch]) -> list[int]:
    return [int(name.rpartition("/s")[2]) for batch in found for name in batch.sample_ids]


def test_every_way_to_name_the_shards_gives_the_same_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = write_set(tmp_path / "set", [6, 5, 9])
    monkeypatch.chdir(tmp_path)
    pattern = "set/{00000..00002}.tar"
    specs: list[tuple[str | list[str], Path | None]] = [
        (str(tmp_path / "set"), None),
        (pattern, None),
        ([str(path) for path in paths], None),
        ("{00000..00002}.tar", tmp_path / "set"),
        (f"pipe:cat {tmp_path}/{pattern}", None),
        ([str(paths[0]), f"pipe:gzip -c {paths[1]}", str(paths[2])], None),
    ]
    expected = [batch.images for batch in batches(ShardSource.open("set"), 5)]
    for spec, beside in specs:
        source = ShardSource.open(spec, beside=beside)
        assert source.sizes == [6, 5, 9]
        for images, batch in zip(expected, batches(source, 5), strict=True):
            assert torch.equal(images, batch.images)


def test_compressed_shards_read_the_same(tmp_path: Path) -> None:
    write_set(tmp_path / "plain", [6, 5])
    write_set(tmp_path / "packed", [6, 5], suffix=".tar.gz")
    plain, packed = (batches(ShardSource.open(str(tmp_path / name)), 4, cache=False) for name in ("plain", "packed"))
    assert [batch.sample_ids for batch in plain] == [batch.sample_ids for batch in packed]
    assert all(torch.equal(a.images, b.images) for a, b in zip(plain, packed))


def test_sizes_are_taken_from_beside_the_shards_or_counted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = write_set(tmp_path / "set", [4, 3])
    before = sorted(path.name for path in (tmp_path / "set").iterdir())
    counted = ShardSource.open(str(tmp_path / "set"), cache_dir=tmp_path / "cache")
    assert counted.sizes == [4, 3]
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == before
    calls: list[str] = []
    monkeypatch.setattr("compt_megatron.data.source.try_count", lambda url: (calls.append(url), (99, ""))[1])
    assert ShardSource.open(str(tmp_path / "set"), cache_dir=tmp_path / "cache").sizes == [4, 3]
    assert not calls
    write_shard(paths[1], [sample(n) for n in range(9)])  # another file now: its count is stale
    assert ShardSource.open(str(tmp_path / "set"), cache_dir=tmp_path / "cache").sizes == [4, 99]
    (tmp_path / "set" / "00000_stats.json").write_text(json.dumps({"successes": 7}))
    assert ShardSource.open(str(tmp_path / "set"), cache_dir=tmp_path / "cache").sizes == [7, 99]
    (tmp_path / "set" / "sizes.json").write_text(json.dumps({"00000.tar": 5, "00001.tar": 6}))
    assert ShardSource.open(str(tmp_path / "set")).sizes == [5, 6]
    (tmp_path / "sizes.json").write_text(json.dumps({f"pipe:cat {paths[0]}": 4}))
    piped = ShardSource.open(f"pipe:cat {paths[0]}", sizes="sizes.json", beside=tmp_path)
    assert piped.sizes == [4]
    assert calls == [str(paths[1])]


def test_sources_that_do_not_exist_are_named(tmp_path: Path) -> None:
    write_set(tmp_path, [4, 3])
    with pytest.raises(UserError, match=r"00002.tar does not exist \(one of 3 in the pattern\)"):
        ShardSource.open(str(tmp_path / "{00000..00002}.tar"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no .tar"):
        ShardSource.open(str(tmp_path / "empty"))
    with pytest.raises(UserError, match="emoji has no split 'training'"):
        ShardSource.open("emoji/training")
    with pytest.raises(UserError, match="damaged or cut off"):
        ShardSource.open("pipe:exit 3")
    (tmp_path / "sizes.json").write_text('{"00000.tar": -1}')
    with pytest.raises(UserError, match="must be a number of samples, not -1"):
        ShardSource.open(str(tmp_path))


@pytest.mark.parametrize("damage", ["cut", "between", "header", "gzip"])
def test_a_damaged_shard_is_refused_when_counted(tmp_path: Path, damage: str) -> None:
    path = write_set(tmp_path, [20], suffix=".tar.gz" if damage == "gzip" else ".tar")[0]
    content = bytearray(path.read_bytes())
    with tarfile.open(path) as archive:
        middle = archive.getmembers()[20].offset
    if damage == "header":
        content[middle + 10] ^= 0xFF
    end = {"cut": middle + 700, "between": middle, "header": len(content), "gzip": len(content) // 2}[damage]
    path.write_bytes(content[:end])
    with pytest.raises(UserError, match=f"{path} is damaged or cut off"):
        ShardSource.open(str(path))
    read = list(read_samples(str(path)))  # what the training stream would see, had sizes.json named the size
    assert 0 < len(read) < 20
    assert read[-1].damage is not None
    assert all(raw.damage is None for raw in read[:-1])


BROKEN: dict[str, Members] = {
    "image": {"png": png(0)[:60], "txt": b"a caption"},
    "missing image": {"txt": b"a caption"},
    "missing caption": {"png": png(0)},
    "blank caption": {"png": png(0), "txt": b" \n "},
    "json": {"png": png(0), "json": b'{"captions": ["a"'},
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_samples_within_the_budget_give_way_to_good_ones(tmp_path: Path, kind: str) -> None:
    write_set(tmp_path, [16, 16], lambda n: BROKEN[kind] if n == 21 else sample(n))
    source = ShardSource.open(str(tmp_path))
    found = batches(source, 8, shuffle_window=4)
    clean = tmp_path / "clean"
    write_set(clean, [16, 16])
    expected = batches(ShardSource.open(str(clean)), 8, shuffle_window=4)
    differing = [(a, b) for a, b in zip(numbers(found), numbers(expected), strict=True) if a != b]
    assert len(differing) == 1
    assert differing[0][1] == 21
    assert differing[0][0] in range(16, 32)  # from the same window, so the same shard's neighbourhood
    at = numbers(expected).index(21) // 4
    resumed = batches(source, 8 - at, shuffle_window=4, start_step=at, workers=2)
    assert [batch.sample_ids for batch in resumed] == [batch.sample_ids for batch in found[at:]]


@pytest.mark.parametrize("position", range(8))
def test_the_substitute_is_the_same_wherever_a_run_resumes(tmp_path: Path, position: int) -> None:
    write_set(tmp_path, [8], lambda n: BROKEN["image"] if n in (2, 5, 6) else sample(n))
    source = ShardSource.open(str(tmp_path))
    options = {"batch_size": 1, "streams": 1, "shuffle_window": 8, "skip_budget": 0.5, "cache": False}
    whole = batches(source, 16, **options)
    assert set(numbers(whole)) == {0, 1, 3, 4, 7}
    assert [b.sample_ids for b in batches(source, 8, start_step=position, **options)] == [
        b.sample_ids for b in whole[position : position + 8]
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_broken_samples_stop_the_run_with_one_line(tmp_path: Path, workers: int) -> None:
    paths = write_set(tmp_path, [16, 16], lambda n: BROKEN["image"] if n in (17, 23, 30) else sample(n))
    source = ShardSource.open(str(tmp_path))
    with pytest.raises(UserError) as error:
        batches(source, 8, workers=workers)
    message = str(error.value)
    assert f"{paths[1]}: 2 broken samples among its 16, the skip budget allows 1" in message
    assert "raise data.skip_budget" in message
    assert "\n" not in message
    with pytest.raises(UserError, match="1 broken samples among its 16, the skip budget allows 0"):
        batches(source, 8, skip_budget=0)
    assert 17 not in numbers(batches(source, 16, skip_budget=0.2))


def test_a_shard_shorter_than_its_recorded_size_is_judged_by_the_budget(tmp_path: Path) -> None:
    path = write_set(tmp_path, [15])[0]
    (tmp_path / "sizes.json").write_text('{"00000.tar": 16}')
    source = ShardSource.open(str(tmp_path))
    assert set(numbers(batches(source, 8))) == set(range(15))
    (tmp_path / "sizes.json").write_text('{"00000.tar": 40}')
    with pytest.raises(UserError, match=f"{path}: 2 broken samples among its 40.*ends after 15 of 40"):
        batches(ShardSource.open(str(tmp_path)), 8)
    path.unlink()
    with pytest.raises(UserError, match=f"{path}: .* broken samples among its 40.*No such file"):
        batches(ShardSource("gone", [str(path)], [40]), 8)


def test_captions_and_labels_are_found_where_they_may_be(tmp_path: Path) -> None:
    members: list[Members] = [
        {"jpg": png(0), "txt": b"one\n two \n\n"},
        {"png": png(1), "json": b'{"captions": ["x", "", "y"], "label": 4}', "txt": b"unused"},
        {"webp": png(2), "json": b'{"caption": "z", "name": "cat"}', "cls": b"7"},
        {"png": png(3), "json": b'{"long": ["l1", "l2"], "raw": "r", "name": "dog"}'},
    ]
    path = write_shard(tmp_path / "a.tar", members)
    raw = list(read_samples(str(path)))
    assert len(raw) == count_samples(str(path)) == 4

    def decode(index: int, **options: object) -> Sample | Broken:
        return Decoder(**options)(raw[index], 0, index, "a")  # type: ignore[arg-type]

    def captions(index: int, **options: object) -> tuple[str, ...]:
        decoded = decode(index, **options)
        assert isinstance(decoded, Sample), decoded
        return decoded.captions

    def label(index: int, **options: object) -> int | None:
        decoded = decode(index, need="label", **options)
        return decoded.label if isinstance(decoded, Sample) else None

    assert [captions(index) for index in range(3)] == [("one", "two"), ("x", "y"), ("z",)]
    assert captions(3, caption_keys=["raw", "long"]) == ("r", "l1", "l2")
    assert captions(1, caption_member="txt") == ("unused",)
    assert isinstance(decode(0, caption_member="json"), Broken)
    assert isinstance(decode(3), Broken)
    assert [label(index) for index in range(4)] == [None, 4, 7, None]
    assert label(3, classes=["cat", "dog"]) == 1
    assert [raw[index].key for index in range(4)] == ["s00000", "s00001", "s00002", "s00003"]


def test_labels_without_a_tokenizer(tmp_path: Path) -> None:
    write_set(tmp_path, [12], lambda n: {"png": png(n), "cls": str(n % 5).encode()})
    found = batches(ShardSource.open(str(tmp_path)), 3, tokenizer=None)
    assert all(batch.texts is None for batch in found)
    labels = [int(label) for batch in found for label in batch.labels]  # type: ignore[union-attr]
    assert labels == [number % 5 for number in numbers(found)]


def test_the_built_in_emoji_are_all_readable() -> None:
    source = ShardSource.open("emoji/train")
    shard, size = source.shards[3], source.sizes[3]
    assert count_samples(shard) == size
    decoder = Decoder("captions", classes=source.classes)
    for index, raw in enumerate(read_samples(shard)):
        decoded = decoder(raw, 3, index, "train-00003")
        assert isinstance(decoded, Sample), decoded
        assert decoded.image is not None
        assert decoded.image.size == (32, 32)
        assert decoded.label is not None
    found = batches(source, 1, batch_size=64, streams=None, transform=lambda image: torch.zeros(3, 32, 32), captions=3)
    assert found[0].texts is not None
    assert found[0].texts.shape[:2] == (64, 3)


def test_gzip_of_a_tar_is_recognised_by_content(tmp_path: Path) -> None:
    plain = write_set(tmp_path, [3])[0]
    disguised = tmp_path / "x.tar"
    disguised.write_bytes(gzip.compress(plain.read_bytes()))
    assert ShardSource.open(str(disguised)).sizes == [3]


def test_a_pattern_of_too_many_shards_is_refused_before_it_is_expanded() -> None:
    with pytest.raises(UserError, match=r"stands for 1,000,000,000,000 shards"):
        ShardSource.open("shards/{0..999999}-{0..999999}.tar")
