"""What names of text data stand for, the built-in text, and data that does not fit the model or itself."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compt_megatron.data.text import source as source_module
from compt_megatron.data.text import stdlib as stdlib_module
from compt_megatron.data.text.build import Request, build_text
from compt_megatron.data.text.indexed import IndexedTokens
from compt_megatron.data.text.loader import TokenLoader
from compt_megatron.data.text.source import TextSource
from compt_megatron.data.text.stdlib import source_files, stdlib_text, user_cache
from compt_megatron.errors import UserError
from tests.unit.text_samples import numbered, texts, write_jsonl


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`built` and `other`: of `compt data text`, with different tokenizers; `raw`, `shards/{a,b}`: Megatron's own."""
    folder = tmp_path_factory.mktemp("text")
    source = write_jsonl(folder / "a.jsonl", texts(60))
    build_text([source], folder / "built", Request(train_bpe=300, append_eod=True, held_out=0.2))
    build_text([source], folder / "other", Request(train_bpe=310))
    (folder / "shards").mkdir()
    numbered(folder / "raw", [30, 10], 100)
    numbered(folder / "shards" / "a", [30] * 10, 100)
    numbered(folder / "shards" / "b", [100], 100)
    return folder


def test_every_way_to_name_data(folder: Path) -> None:
    built = TextSource.open("built", beside=folder)
    assert [part.name for part in built.parts] == ["built"]
    assert built.record is not None
    assert built.tokens == built.record.splits["train"].tokens
    assert built.bytes == built.record.splits["train"].bytes
    assert built.tokenizer == folder / "built" / "tokenizer.json"
    held_out = TextSource.open(str(folder / "built" / "held_out"))
    assert (held_out.tokens, held_out.bytes) == (
        built.record.splits["held_out"].tokens,
        built.record.splits["held_out"].bytes,
    )
    for name in ("raw", "raw.bin", "raw.idx"):
        raw = TextSource.open(name, beside=folder)
        assert (raw.tokens, raw.bytes, raw.record, raw.tokenizer) == (40, None, None, None)


def test_a_blend_of_folders_ranges_and_shards(folder: Path) -> None:
    source = TextSource.open(
        [
            {"path": "shards", "weight": 3},
            {"path": "built", "weight": 1, "documents": [0, 0.5]},
        ],
        beside=folder,
    )
    assert [(part.name, part.weight) for part in source.parts] == [("shards/a", 2.25), ("shards/b", 0.75), ("built", 1)]
    assert len(source.parts[2].documents) == len(source.parts[2].documents.data) // 2
    assert source.bytes is None
    by_size = TextSource.open(["raw", "shards"], beside=folder)
    assert [part.weight for part in by_size.parts] == [40, 300, 100]
    low, high = (
        TextSource.open({"path": "shards/a", "documents": [*ends]}, beside=folder) for ends in ((0, 0.7), (0.7, 1))
    )
    assert (low.tokens, high.tokens) == (210, 90)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere", "data 'nowhere': there is neither such a folder nor nowhere.idx"),
        ("empty", "holds no .idx file"),
        ("stdlib/test", "data 'stdlib/test': the splits are train and held_out"),
        ([], "no data set is named"),
        ([{"path": "raw", "weight": 1}, "shards"], "data 'shards': has no weight, others have"),
        ({"path": "raw", "weight": 0}, "data 'raw': weight 0 is not a number above 0"),
        ({"path": "raw", "weight": "1"}, "weight '1' is not a number above 0"),
        ({"path": "raw", "wait": 1}, "unknown key 'wait'"),
        ({"weight": 1}, "has no path"),
        ({"path": "raw", "documents": [0.5, 0.2]}, "are not two fractions in order"),
        ({"path": "raw", "documents": "all"}, "are not two fractions in order"),
        ({"path": "raw", "documents": [0, 0.1]}, "documents 0 to 0.1 of 2 are none"),
        (["built", "other"], "data 'other' and 'built' are of different tokenizers"),
        ("future", "format version 2; version 1 is the one"),
        ("strange", "is not what `compt data text` writes"),
        ("cut", "train.bin: is cut off"),
    ],
)
def test_a_mistake_is_one_line(spec: Any, message: str, folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "empty").mkdir()
    record = (folder / "built" / "text.json").read_text()
    for name, text in (
        ("future", record.replace('version": 1', 'version": 2')),
        ("strange", record.replace("eod", "e")),
    ):
        shutil.copytree(folder / "built", tmp_path / name)
        (tmp_path / name / "text.json").write_text(text)
    shutil.copytree(folder / "built", tmp_path / "cut")
    whole = (tmp_path / "cut" / "train.bin").read_bytes()
    (tmp_path / "cut" / "train.bin").write_bytes(whole[:-1])
    with pytest.raises(UserError) as caught:
        TextSource.open(spec, beside=tmp_path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_model_must_have_the_tokenizers_vocabulary(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built, raw = (TextSource.open(name, beside=folder) for name in ("built", "raw"))
    for fitting in (300, 304, 315):
        built.require_vocabulary(fitting)
    for other in (299, 316, 32_000):
        with pytest.raises(UserError, match=f"its tokenizer has 300 tokens, the model {other}; build the data"):
            built.require_vocabulary(other)
    raw.require_vocabulary(40)
    with pytest.raises(UserError, match="document 1 has id 39, beyond a vocabulary of 39 tokens"):
        TokenLoader(raw, length=8, batch_size=1, vocab_size=39)
    monkeypatch.setattr(source_module, "SCANNED_BYTES", 0)  # as if it were large: ids are checked as they are met
    with pytest.raises(UserError, match="id 39 is beyond the vocabulary of 39 tokens"):
        next(iter(TokenLoader(raw, length=39, batch_size=1, vocab_size=39)))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small library: 60 sources, and what does not belong to the text."""
    root = tmp_path_factory.mktemp("library")
    for name in ("test", "encodings", "config-3", "json/tests", "site-packages/x"):
        (root / name).mkdir(parents=True)
        (root / name / "module.py").write_text("left out")
    (root / "_sysconfigdata_x.py").write_text("left out")
    (root / "latin.py").write_bytes("ä".encode("latin-1"))
    for index, text in enumerate(texts(60)):
        (root / "json" / f"m{index}.py").write_text(text, encoding="utf-8")
    (root / "json" / "module.py").write_text("kept = 1\n")
    return root


def test_the_built_in_text_is_made_once_and_always_the_same(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [file.key for file in source_files(library)] == sorted(
        ["json/module.py", *(f"json/m{index}.py" for index in range(60))]
    )
    train = stdlib_text("train", 300, None, tmp_path / "one", library)
    again = stdlib_text("held_out", 300, None, tmp_path / "two", library)
    assert train.parent.name == again.parent.name
    names = sorted(path.name for path in train.parent.iterdir())
    for name in names:
        assert (train.parent / name).read_bytes() == (again.parent / name).read_bytes()
    assert len(IndexedTokens(train)) + len(IndexedTokens(again)) == 61
    assert [path.name for path in (tmp_path / "one").iterdir()] == [train.parent.name]
    monkeypatch.setattr(stdlib_module, "_build_once", lambda *_: pytest.fail("built again"))
    assert stdlib_text("train", 300, None, tmp_path / "one", library) == train


def test_the_built_in_text_in_another_tokenizer_or_as_another_process_made_it(library: Path, tmp_path: Path) -> None:
    train = stdlib_text("train", 300, None, tmp_path, library)
    other = stdlib_text(
        "train", None, train.parent, tmp_path, library
    )  # the model's tokenizer, here a copy of that one
    assert other != train
    assert np.array_equal(IndexedTokens(other).ids, IndexedTokens(train).ids)
    files = source_files(library)
    stdlib_module._build_once(files, train.parent, Request(train_bpe=300))  # the other process was faster
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([train.parent.name, other.parent.name])


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPT_CACHE", "/a")
    assert user_cache() == Path("/a")
    monkeypatch.delenv("COMPT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert user_cache() == Path("/b/compt_megatron")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/c")
    assert user_cache() == Path("/c/.cache/compt_megatron")


def test_the_standard_library_of_this_python_is_there() -> None:
    import sysconfig

    files = source_files(Path(sysconfig.get_paths()["stdlib"]))
    names = {file.key for file in files}
    assert {"heapq.py", "json/decoder.py", "asyncio/events.py"} <= names
    assert sum(file.path.stat().st_size for file in files) > 5e6
    assert not any(name.startswith("test/") or "-packages" in name for name in names)
