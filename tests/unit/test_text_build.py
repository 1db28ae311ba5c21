"""`compt data text`: the same data for any number of workers, whole or not at all, and one line for each mistake."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import zstandard
from tokenizers import Tokenizer

from compt_megatron import cli
from compt_megatron.data.text import build as build_module
from compt_megatron.data.text import encode as encode_module
from compt_megatron.data.text.build import Request, build_text
from compt_megatron.data.text.documents import RawDocument, Reader, find_files
from compt_megatron.data.text.indexed import IndexedTokens
from compt_megatron.data.text.record import read_record
from compt_megatron.data.text.tokenizer import find_tokenizer, train_bpe
from compt_megatron.errors import UserError, WorkerLost
from tests.unit.text_samples import texts, write_jsonl

TEXTS = texts(40)
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a byte-level BPE of 300 tokens."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe(TEXTS, 300, folder)
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TEXTS in a plain file, a gzip file, a zstd file of two frames, and a text file, in folders."""
    folder = tmp_path_factory.mktemp("corpus")
    write_jsonl(folder / "a.jsonl", TEXTS[:10])
    plain = write_jsonl(folder / "rest", TEXTS[10:20]).read_bytes()
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(plain))
    (folder / "c").mkdir()
    rows = [write_jsonl(folder / "rest", part).read_bytes() for part in (TEXTS[20:30], TEXTS[30:39])]
    (folder / "c" / "d.jsonl.zst").write_bytes(b"".join(map(zstandard.compress, rows)))
    (folder / "c" / "e.txt").write_text(TEXTS[39], encoding="utf-8")
    (folder / "empty.txt").write_text("\n")
    (folder / "rest").unlink()
    return folder


def documents(prefix: Path, tokenizer: Path) -> list[str]:
    data = IndexedTokens(prefix)
    inner = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    return [inner.decode(data.document(index).tolist()) for index in range(len(data))]


def test_every_document_is_there_in_order(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    record = build_text([corpus], tmp_path / "out", Request(tokenizer=tokenizer))
    assert documents(tmp_path / "out" / "train", tokenizer) == TEXTS
    assert record == read_record(tmp_path / "out")
    train = record.splits["train"]
    assert (train.documents, train.bytes) == (40, sum(len(text.encode()) for text in TEXTS))
    assert train.tokens == IndexedTokens(tmp_path / "out" / "train").tokens
    assert (record.vocab_size, record.eod, record.append_eod) == (300, 0, False)
    assert find_tokenizer(tmp_path / "out") == find_tokenizer(tokenizer).__class__(
        tmp_path / "out" / "tokenizer.json", 300, 0, "<|endoftext|>", record.sha256
    )


def test_workers_do_not_change_a_byte(
    corpus: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode_module, "CHUNK_DOCUMENTS", 3)
    request = Request(tokenizer=tokenizer, append_eod=True, held_out=0.2)
    seen: list[int] = []
    for workers in (1, 3):
        record = build_text(
            [corpus], tmp_path / str(workers), request, workers=workers, progress=lambda done, *_: seen.append(done)
        )
    assert sorted(seen[: len(seen) // 2]) == seen[: len(seen) // 2]
    assert seen[-1] == sum(path.stat().st_size for path in corpus.rglob("*.*"))
    names = sorted(path.name for path in (tmp_path / "1").iterdir())
    assert names == ["held_out.bin", "held_out.idx", "text.json", "tokenizer.json", "tokenizer_config.json",
                     "train.bin", "train.idx"]  # fmt: skip
    for name in names:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "3" / name).read_bytes()
    parts = {split: documents(tmp_path / "1" / split, tokenizer) for split in record.splits}
    assert sorted(parts["train"] + parts["held_out"]) == sorted(TEXTS)
    data = IndexedTokens(tmp_path / "1" / "train")
    assert all(data.document(index)[-1] == 0 for index in range(len(data)))


def test_a_split_depends_on_each_document_alone(tokenizer: Path, tmp_path: Path) -> None:
    """More text around them, in another order and under other names, leaves documents where they were."""
    found = {}
    for name, rows in (("few", TEXTS[:30]), ("all", TEXTS[::-1])):
        source = write_jsonl(tmp_path / f"{name}.jsonl", rows)
        build_text([source], tmp_path / name, Request(tokenizer=tokenizer, held_out=0.3))
        found[name] = set(documents(tmp_path / name / "held_out", tokenizer))
    assert found["few"] == found["all"] & set(TEXTS[:30])
    assert 3 <= len(found["all"]) <= 21


def test_whole_files_can_be_held_out(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    for index in range(8):
        write_jsonl(tmp_path / "c" / f"{index}.jsonl", TEXTS[index * 5 : index * 5 + 5])
    build_text([tmp_path / "c"], tmp_path / "out", Request(tokenizer=tokenizer, held_out=0.5, by_file=True))
    held_out = documents(tmp_path / "out" / "held_out", tokenizer)
    files = {TEXTS.index(text) // 5 for text in held_out}
    assert held_out == [TEXTS[index * 5 + row] for index in sorted(files) for row in range(5)]
    assert 0 < len(files) < 8


def test_the_name_of_a_special_token_in_the_text_is_text(tokenizer: Path, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["chain <|endoftext|> chain"])
    build_text([source], tmp_path / "out", Request(tokenizer=tokenizer, append_eod=True))
    ids = IndexedTokens(tmp_path / "out" / "train").document(0).tolist()
    assert [place for place, token in enumerate(ids) if token == 0] == [len(ids) - 1]


def test_lines_of_text_files_can_be_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\r\n\ntwo\nthree")
    found = [(document.line, document.data) for document in Reader(find_files([tmp_path / "a.txt"]), lines=True)]
    assert found == [(1, b"one"), (3, b"two"), (4, b"three")]


TRAIN = """
import sys
from pathlib import Path
from compt_megatron.data.text.tokenizer import train_bpe
train_bpe(sys.stdin.read().split(chr(0)), 320, Path(sys.argv[1]))
"""


def test_a_bpe_is_trained_alike_in_every_process(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS, "body")
    argv = ["data", "text", str(source), "--train-bpe", "320", "--append-eod", "--field", "body", "--json"]
    assert cli.main([*argv, str(tmp_path / "here")]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["vocab_size"], shown["eod"], shown["splits"]["train"]["documents"]) == (320, 0, 40)
    (tmp_path / "there").mkdir()
    command = [sys.executable, "-c", TRAIN, str(tmp_path / "there")]
    assert subprocess.run(command, input="\0".join(TEXTS).encode(), cwd=ROOT, timeout=120).returncode == 0
    for path in (tmp_path / "there").iterdir():
        assert path.read_bytes() == (tmp_path / "here" / path.name).read_bytes()


def test_a_bpe_is_trained_on_an_even_share_of_much_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_module, "BPE_BYTES", 1000)
    rows = texts(200)
    files = find_files([write_jsonl(tmp_path / "a.jsonl", rows)])
    taken = list(build_module._sample(Request(train_bpe=300), files))
    assert [text for text in rows if text in taken] == taken
    assert 5 <= len(taken) <= 40
    held_out = list(build_module._sample(Request(train_bpe=300, held_out=0.5), files))
    assert set(held_out) < set(taken)


def test_transformers_reads_the_tokenizer(tokenizer: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(str(tokenizer))
    text = "größer 日本\n  chain of models"
    assert theirs.decode(theirs(text)["input_ids"]) == text
    assert theirs.eos_token_id == 0


@pytest.mark.parametrize(
    ("config", "eod", "found"),
    [
        ({}, None, "<|endoftext|>"),
        ({"eos_token": "Ġof"}, None, "Ġof"),
        ({"eos_token": {"content": "Ġof"}}, None, "Ġof"),
        ({"eos_token": "not there"}, None, "<|endoftext|>"),
        ({"eos_token": "Ġof"}, "a", "a"),
    ],
)
def test_the_end_of_documents_is_found(
    config: dict[str, object], eod: str | None, found: str, tokenizer: Path, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.json").write_bytes((tokenizer / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    made = find_tokenizer(tmp_path, eod)
    assert (made.eod_token, made.eod) == (found, Tokenizer.from_file(str(made.path)).token_to_id(found))


def _words(tmp_path: Path) -> None:
    """A tokenizer without a token that ends documents."""
    from tokenizers import models, pre_tokenizers

    inner = Tokenizer(models.WordLevel({"chain": 0, "of": 1}))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.save(str(tmp_path / "words.json"))


@pytest.mark.parametrize("is_json", [True, False])
def test_a_mark_at_the_begin_of_a_file_is_no_text(is_json: bool) -> None:
    """Some editors put U+FEFF there. Elsewhere it is text."""
    stored = b'{"text": "one"}' if is_json else b"one"
    first = RawDocument("a", "a:1", 1 if is_json else 0, b"\xef\xbb\xbf" + stored, is_json)
    assert first.text("text") == "one"
    if not is_json:
        assert RawDocument("a", "a:2", 2, b"\xef\xbb\xbf" + stored, is_json).text("text") == "\ufeffone"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("a.jsonl", "give the corpus and DST"),
        ("a.jsonl out", "give either --tokenizer or --train-bpe"),
        ("a.jsonl out --tokenizer t --train-bpe 300", "give either --tokenizer or --train-bpe"),
        ("a.jsonl --tokenizer no out", "no: does not exist; name a tokenizer.json"),
        ("a.jsonl out --tokenizer a.jsonl", "a.jsonl: is no tokenizer that can be read"),
        ("a.jsonl out --tokenizer words.json --append-eod", "words.json: has no token that ends a document"),
        ("a.jsonl out --tokenizer t --eod </s>", "has no token '</s>'"),
        ("a.jsonl out --train-bpe 256", "257 are the fewest"),
        ("a.jsonl out --train-bpe 5000", "5000 are asked for"),
        ("no.jsonl out --tokenizer t", "no.jsonl: does not exist"),
        ("a.json out --tokenizer t", "a.json: is not one of .txt, .txt.gz"),
        ("t out --tokenizer t", "t: the folder holds no .txt, "),
        ("empty.txt empty.jsonl out --tokenizer t", "empty.txt and 1 more files: no text in it"),
        ("empty.txt out --train-bpe 300", "empty.txt: no text in it"),
        ("a.jsonl a.jsonl --tokenizer t", "a.jsonl: exists and is not an empty folder"),
        ("a.jsonl out --tokenizer t --field body", "a.jsonl: line 1: 'body' is not there as text, the line has 'text'"),
        ("a.jsonl bad.jsonl out --tokenizer t", "bad.jsonl: line 3: not JSON (Expecting"),
        ("a.jsonl bad.jsonl out --tokenizer t --workers 2", "bad.jsonl: line 3: not JSON (Expecting"),
        ("list.jsonl out --tokenizer t", "list.jsonl: line 1: 'text' is not there as text, the line is no JSON object"),
        ("half.jsonl out --tokenizer t", "half.jsonl: line 1: 'text' holds half a surrogate pair"),
        ("latin.txt out --tokenizer t", "latin.txt: byte 1 is not UTF-8"),
        ("cut.jsonl.gz out --tokenizer t", "cut.jsonl.gz: cannot be read to its end"),
        (
            "cut.jsonl.zst out --tokenizer t",
            "cut.jsonl.zst: cannot be read to its end (the last zstd frame is cut off)",
        ),
        ("plain.jsonl.zst out --tokenizer t", "plain.jsonl.zst: cannot be read to its end"),
        ("one.jsonl out --tokenizer t --held-out 0.01", "the split 'held_out' has no document"),
        ("one.jsonl out --tokenizer t --held-out 1", "'1' is not a share of at least 0"),
        ("a.jsonl out --tokenizer t --split-by line", "invalid choice: 'line'"),
        ("a.jsonl out --tokenizer t --worker 2", "unknown option '--worker'; did you mean '--workers'?"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    argv: str, message: str, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t").symlink_to(tokenizer)
    _words(tmp_path)
    plain = write_jsonl(tmp_path / "a.jsonl", TEXTS[:5]).read_bytes()
    write_jsonl(tmp_path / "one.jsonl", TEXTS[:1])
    for name, content in {
        "empty.txt": b" \n",
        "empty.jsonl": b'\n{"text": ""}\n',
        "a.json": plain,
        "bad.jsonl": b'{"text": "x"}\n\n{"text" "x"}\n',
        "list.jsonl": b"[1]\n",
        "half.jsonl": b'{"text": "\\ud800"}\n',
        "latin.txt": "aä".encode("latin-1"),
        "cut.jsonl.gz": gzip.compress(plain)[:-9],
        "cut.jsonl.zst": zstandard.compress(plain)[:-9],
        "plain.jsonl.zst": plain,
    }.items():
        (tmp_path / name).write_bytes(content)
    before = sorted(tmp_path.iterdir())
    assert cli.main(["data", "text", *argv.split()]) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert err.count("\n") == 1
    assert out == ""
    assert sorted(tmp_path.iterdir()) == before


def test_a_killed_build_leaves_no_data_and_no_worker(tokenizer: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    argv = ["data", "text", "a.jsonl", "out", "--tokenizer", str(tokenizer), "--workers", "2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "compt_megatron", *argv], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    with open(tmp_path / "a.jsonl", "wb"):  # opens when the build reads; it waits for more for ever
        while len(workers := _children(process.pid)) < 2:
            time.sleep(0.01)
        other = write_jsonl(tmp_path / "other.jsonl", TEXTS)
        with pytest.raises(UserError, match=r"out\.partial: another job is writing it"):
            build_text([other], tmp_path / "out", Request(tokenizer=tokenizer))
        process.kill()
        process.wait(60)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="does not exist"):
        IndexedTokens(tmp_path / "out.partial" / "train")
    while any(map(_alive, workers)):
        time.sleep(0.01)
    build_text([other], tmp_path / "out", Request(tokenizer=tokenizer))  # takes the place
    assert documents(tmp_path / "out" / "train", tokenizer) == TEXTS
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "text.json", "tokenizer.json", "tokenizer_config.json", "train.bin", "train.idx",
    }  # fmt: skip
    assert not (tmp_path / "out.partial").exists()


def test_a_build_that_is_asked_to_stop_leaves_nothing(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    fifo = os.open(tmp_path / "a.jsonl", os.O_RDWR)  # the build waits for more for ever
    before, started = set(_children(os.getpid())), set()
    ended = threading.Event()

    def stop() -> None:
        while len(started) < 2 and not ended.wait(0.01):
            started.update(set(_children(os.getpid())) - before)
        if not ended.is_set():
            os.kill(os.getpid(), signal.SIGTERM)

    stopper = threading.Thread(target=stop)
    stopper.start()
    argv = ["data", "text", str(tmp_path / "a.jsonl"), str(tmp_path / "new" / "out"), "--tokenizer", str(tokenizer)]
    status = cli.main([*argv, "--workers", "2"])
    ended.set()
    stopper.join()
    os.close(fifo)
    assert status == 3
    assert "stopped on request" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
    while any(map(_alive, started)):
        time.sleep(0.01)


def test_a_worker_that_dies_is_not_the_texts_fault(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode_module, "_COMMAND", "import os; os._exit(7)")
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    with pytest.raises(WorkerLost, match="a worker ended with status 7"):
        build_text([source], tmp_path / "out", Request(tokenizer=tokenizer), workers=2)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def _children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def _alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
