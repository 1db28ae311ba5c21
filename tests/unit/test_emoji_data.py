"""The shipped `emoji` data is what its index and docs promise, and the code that made it is deterministic."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from compt_megatron.data.emoji import (
    SPLITS,
    build_emoji,
    builtin_emoji_dir,
    emoji_facts,
    emoji_index,
    emoji_shards,
)
from compt_megatron.data.emoji.build import Drawing, is_unseen, render, split_drawings
from compt_megatron.data.emoji.names import EmojiName, match_key, read_names
from compt_megatron.data.emoji.sources import ARTISTS, EMOJIONE, NOTO, fetch
from compt_megatron.data.tar_writer import write_shard
from compt_megatron.errors import UserError

SQUARE = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 4 4"><rect width="2" height="4" fill="#f00"/></svg>'
WIDE = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 8 4"><rect width="8" height="4" fill="#00f"/></svg>'


@pytest.fixture(scope="module")
def facts() -> dict[str, list[dict]]:
    return {split: list(emoji_facts(split)) for split in SPLITS}


def read_shard(path: Path) -> dict[str, dict[str, bytes]]:
    samples: dict[str, dict[str, bytes]] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            key, extension = member.name.split(".")
            samples.setdefault(key, {})[extension] = tar.extractfile(member).read()
    return samples


def test_shards_are_those_of_the_index():
    index = emoji_index()
    listed = [path for split in SPLITS for path in emoji_shards(split)]
    assert sorted(listed) == sorted(builtin_emoji_dir().glob("*.tar.gz"))
    assert [len(emoji_shards(split)) for split in SPLITS] == [16, 2, 2]
    for split in SPLITS:
        part = index["splits"][split]
        counts = {path.name: len(read_shard(path)) for path in emoji_shards(split)}
        assert counts == part["shards"]
        assert max(counts.values()) - min(counts.values()) <= 1
        for path in emoji_shards(split):
            assert hashlib.sha256(path.read_bytes()).hexdigest() == part["sha256"][path.name]


def test_shipped_data_is_small_and_carries_its_licences():
    files = [path for path in builtin_emoji_dir().rglob("*") if path.is_file()]
    assert max(path.stat().st_size for path in files) < 2e6
    assert sum(path.stat().st_size for path in files) < 8e6
    text = (builtin_emoji_dir() / "LICENSES.md").read_text()
    assert all(f"`{artist}`" in text for artist in ARTISTS)
    for licence in (builtin_emoji_dir() / "licenses").iterdir():
        assert f"licenses/{licence.name}" in text
        assert licence.stat().st_size > 500


def test_splits_hold_what_they_promise(facts):
    names = {split: {fact["name"] for fact in part} for split, part in facts.items()}
    assert names["held_out_artist"] <= names["train"]
    assert not names["unseen_names"] & names["train"]
    assert {fact["artist"] for fact in facts["train"]} == set(ARTISTS) - {"twemoji"}
    assert {fact["artist"] for split in SPLITS[1:] for fact in facts[split]} == {"twemoji"}
    for split, part in facts.items():
        assert all(is_unseen(fact["code"]) == (split == "unseen_names") for fact in part)
        assert len({(fact["artist"], fact["code"]) for fact in part}) == len(part)
        assert sorted(names[split]) == emoji_index()["splits"][split]["classes"]
        if split != "train":
            assert len(names[split]) == len(part)
    assert len(names["unseen_names"]) == pytest.approx(0.1 * len(names["train"] | names["unseen_names"]), rel=0.2)
    assert sum(map(len, facts.values())) > 9000
    assert len(names["train"]) > 1700


def test_train_shards_mix_the_artists():
    share = Counter(fact["artist"] for fact in emoji_facts("train"))
    total = sum(share.values())
    for path in emoji_shards("train"):
        here = Counter(key.split("_")[0] for key in read_shard(path))
        for artist, count in share.items():
            assert abs(here[artist] / here.total() - count / total) < 0.1


def test_captions(facts):
    every = [fact for part in facts.values() for fact in part]
    assert all(fact["captions"][0] == fact["name"] for fact in every)
    assert all(len(set(fact["captions"])) == len(fact["captions"]) for fact in every)
    assert not any("skin tone" in fact["name"] for fact in every)
    assert sum(len(fact["captions"]) for fact in every) / len(every) > 4


def test_pictures_decode():
    for split in SPLITS:
        for key, members in read_shard(emoji_shards(split)[0]).items():
            picture = Image.open(io.BytesIO(members["webp"]))
            assert (picture.size, picture.mode) == ((32, 32), "RGB")
            low, high = picture.convert("L").getextrema()
            assert high - low > 10, f"{key} is blank"
            fact = json.loads(members["json"])
            assert members["txt"].decode() == fact["name"]
            assert key == f"{fact['artist']}_{fact['code']}"


def test_most_pictures_have_white_corners():
    pictures = [Image.open(io.BytesIO(m["webp"])) for m in read_shard(emoji_shards("train")[0]).values()]
    white = sum(picture.getpixel((0, 0)) == (255, 255, 255) for picture in pictures)
    assert white > 0.9 * len(pictures)


@pytest.mark.parametrize("ending", ["tar", "tar.gz"])
def test_rewriting_a_shard_gives_its_bytes_whatever_the_clock_says(tmp_path, ending, monkeypatch):
    source = emoji_shards("unseen_names")[0]
    samples = read_shard(source)
    monkeypatch.setattr("time.time", lambda: 1e9)
    first, again = tmp_path / f"a.{ending}", tmp_path / f"b.{ending}"
    assert write_shard(first, samples.items()) == len(samples)
    shuffled_members = {key: dict(reversed(members.items())) for key, members in samples.items()}
    monkeypatch.setattr("time.time", lambda: 2e9)
    write_shard(again, shuffled_members.items())
    assert first.read_bytes() == again.read_bytes()
    assert read_shard(first) == samples
    with tarfile.open(first) as tar, tarfile.open(source) as shipped:
        assert [member.get_info() for member in tar] == [member.get_info() for member in shipped]


def test_shard_writer_refuses_other_endings_and_bad_keys(tmp_path):
    with pytest.raises(UserError, match="ending"):
        write_shard(tmp_path / "a.zip", [])
    for key in ("a.b", "a/b", ""):
        with pytest.raises(AssertionError):
            write_shard(tmp_path / "a.tar", [(key, {"txt": b""})])


def test_render():
    pytest.importorskip("resvg_py")
    for size in (8, 32, 100):
        picture = render(SQUARE, size)
        assert (picture.size, picture.mode) == ((size, size), "RGB")
        assert picture.getpixel((0, size // 2)) == (255, 0, 0)
        assert picture.getpixel((size - 1, size // 2)) == (255, 255, 255)
        assert picture.tobytes() == render(SQUARE, size).tobytes()
    wide = render(WIDE, 32)
    assert [wide.getpixel((16, y)) for y in (0, 16, 31)] == [(255,) * 3, (0, 0, 255), (255,) * 3]


def test_match_key_joins_the_artists_spellings():
    assert match_key("0023-FE0F-20E3") == match_key("23-20e3")
    assert match_key("1f468-200d-1f466") == match_key("1F468-1F466")


def test_names_give_name_aliases_keywords_once():
    def entry(code: str, label: str, tags: list[str], **more):
        return {"hexcode": code, "label": label, "tags": tags, "group": 0, "order": int(code, 16)} | more

    crowd = [entry(f"1F90{i}", f"face {i}", ["face"]) for i in range(9)]
    cat = entry("1F431", "cat face", ["face", "kitten", "Cat-Face"])
    entries = [*crowd, cat, entry("1F9B0", "red hair", [], group=2)]
    names = read_names(
        entries, [{"1F431": ["kitty", "cat_face"]}, {"1F431": "puss"}], [{"order": 0, "message": "smileys"}]
    )
    assert names["1f431"] == EmojiName("1f431", "cat face", ("cat face", "kitty", "puss", "kitten"), "smileys")
    assert len(names) == 10


def test_split_order_depends_on_keys_only():
    names = [EmojiName(f"1f4{i:02x}", f"name {i}", (f"name {i}",), "objects") for i in range(200)]
    drawings = [Drawing(artist, name, SQUARE) for artist in ("noto", "twemoji") for name in names]
    extra = Drawing("twemoji", EmojiName("1f600", "untrained", ("untrained",), "x"), SQUARE)
    assert not is_unseen(extra.name.code)
    splits = split_drawings(drawings)
    assert splits == split_drawings([*drawings[::-1], extra])
    assert [drawing.name for drawing in splits["train"]] != sorted(
        (drawing.name for drawing in splits["train"]), key=lambda name: name.code
    )


def test_user_errors(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no split 'test'"):
        emoji_shards("test")
    with pytest.raises(UserError, match="choose 8 to 1024"):
        build_emoji(tmp_path / "new", size=4)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="not an empty folder"):
        build_emoji(tmp_path / "full")
    monkeypatch.setenv("PATH", str(tmp_path))
    for package, client in ((NOTO, "npm"), (EMOJIONE, "apt-get")):
        with pytest.raises(UserError, match=f"{client}, which fetches {package.name}, is not on PATH: .*put"):
            fetch(package, tmp_path, print)
    (tmp_path / NOTO.file).write_bytes(b"not the package")
    with pytest.raises(UserError, match="SHA-256"):
        fetch(NOTO, tmp_path, print)
    assert (tmp_path / "full" / "mine.txt").exists()
    assert not (tmp_path / "new").exists()
