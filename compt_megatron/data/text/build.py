"""Builds text data: a corpus becomes a folder with an indexed dataset for each split, the tokenizer and a record."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import xxhash

from compt_megatron.checkpoint.commit import fsync_files, fsync_folder, partial_path
from compt_megatron.checkpoint.journal import claim, remove_journals
from compt_megatron.data.text.documents import Reader, TextFile, find_files
from compt_megatron.data.text.encode import Recipe, encode, is_held_out
from compt_megatron.data.text.indexed import IndexedWriter, id_dtype
from compt_megatron.data.text.record import SplitRecord, TextRecord, write_record
from compt_megatron.data.text.tokenizer import COMPANIONS, FILE, TextTokenizer, find_tokenizer, train_bpe
from compt_megatron.errors import UserError

SPLITS = ("train", "held_out")
BPE_BYTES = 1 << 28  # text that a BPE is trained on; of more, every n-th document is taken

Progress = Callable[[int, int, int], None]  # bytes read, bytes in all, 0 (nothing is kept from an earlier run)


@dataclass(frozen=True)
class Request:
    """How a corpus is to be built. Either `tokenizer`, a tokenizer.json or its folder, or `train_bpe`, the size of a
    vocabulary. `append_eod`: the token that ends documents (`eod_token`, or as `find_tokenizer` finds it) follows each.
    `field`: of a .jsonl line; `lines`: each line of a .txt file is a document. `held_out`: the share of documents, or
    of files (`by_file`), that become the split `held_out`."""

    tokenizer: Path | str | None = None
    train_bpe: int | None = None
    append_eod: bool = False
    eod_token: str | None = None
    field: str = "text"
    lines: bool = False
    held_out: float = 0.0
    by_file: bool = False


def build_text(
    sources: Sequence[str | Path], dst: Path | str, request: Request, *, workers: int = 1,
    progress: Progress | None = None,
) -> TextRecord:  # fmt: skip
    """Build text data from .txt and .jsonl files (.gz, .zst) or folders of them in the new folder `dst`.

    `dst` gets `train.bin`, `train.idx` (and `held_out.*`), `tokenizer.json` and `text.json`, whole or not at all; the
    result does not depend on `workers`. Raises UserError for input that cannot be used, WorkerLost for a killed worker.
    """
    return build_from(find_files(sources), dst, request, workers=workers, progress=progress)


def build_from(
    files: Sequence[TextFile], dst: Path | str, request: Request, *, workers: int = 1,
    progress: Progress | None = None,
) -> TextRecord:  # fmt: skip
    """`build_text` for a list of files."""
    _check(request)
    with _new_folder(Path(os.path.abspath(dst))) as folder:
        tokenizer = _tokenizer(request, files, folder)
        return _write(files, folder, request, tokenizer, workers, progress)


def _check(request: Request) -> None:
    if (request.tokenizer is None) == (request.train_bpe is None):
        raise UserError("text data needs a tokenizer: give either --tokenizer or --train-bpe")
    if not 0 <= request.held_out < 1:
        raise UserError(f"held out: a share of {request.held_out}; choose at least 0 and less than 1")


@contextmanager
def _new_folder(dst: Path) -> Iterator[Path]:
    """A folder beside `dst`, claimed for one job, that becomes `dst` at the end; it goes if something goes wrong."""
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise UserError(f"{dst}: exists and is not an empty folder; name another or delete it")
    missing = [folder for folder in dst.parents if not folder.exists()]
    partial = partial_path(dst)
    partial.mkdir(parents=True, exist_ok=True)
    held = claim(partial)
    try:
        _remove_leftovers(partial, held)
        yield partial
        remove_journals(partial)
        fsync_files(path for path in partial.iterdir())
        fsync_folder(partial)
        os.replace(partial, dst)
        fsync_folder(dst.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        for folder in missing:
            if any(folder.iterdir()):
                break
            folder.rmdir()
        raise
    finally:
        os.close(held)


def _remove_leftovers(folder: Path, held: int) -> None:
    """Remove what a killed build left, but for the file that is our claim."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif not os.path.samestat(path.stat(), os.fstat(held)):
            path.unlink()


def _tokenizer(request: Request, files: Sequence[TextFile], folder: Path) -> TextTokenizer:
    """The tokenizer, in `folder`."""
    if request.train_bpe is not None:
        return train_bpe(_sample(request, files), request.train_bpe, folder)
    assert request.tokenizer is not None
    given = find_tokenizer(request.tokenizer, request.eod_token)
    if request.append_eod and given.eod is None:
        raise UserError(f"{given.path}: has no token that ends a document; name one with --eod")
    for name in COMPANIONS:
        if (given.path.parent / name).is_file():
            shutil.copyfile(given.path.parent / name, folder / name)
    shutil.copyfile(given.path, folder / FILE)
    return given


def _sample(request: Request, files: Sequence[TextFile]) -> Iterator[str]:
    """The texts that a BPE is trained on: those of the split `train`; of more than BPE_BYTES, an even share."""
    size = sum(len(document.data) for document in Reader(files, request.lines))
    if not size:
        raise UserError(_nothing(files))
    for document in Reader(files, request.lines):
        if size > BPE_BYTES and xxhash.xxh3_64_intdigest(document.data, seed=1) >= BPE_BYTES / size * 2.0**64:
            continue
        text = document.text(request.field)
        if not is_held_out(document, text, request.held_out, request.by_file):
            yield text


def _write(
    files: Sequence[TextFile], folder: Path, request: Request, tokenizer: TextTokenizer, workers: int,
    progress: Progress | None,
) -> TextRecord:  # fmt: skip
    dtype = id_dtype(tokenizer.vocab_size)
    append = tokenizer.eod if request.append_eod else None
    recipe = Recipe(folder / FILE, dtype.str, append, request.field, request.held_out, request.by_file)
    reader = Reader(files, request.lines)
    names = SPLITS if request.held_out else SPLITS[:1]
    documents, text_bytes = [0] * len(names), [0] * len(names)
    with ExitStack() as stack:
        writers = [stack.enter_context(IndexedWriter(folder / name, dtype)) for name in names]
        for encoded in stack.enter_context(closing(encode(reader, recipe, workers))):
            for index, writer in enumerate(writers):
                part = encoded[index]
                writer.add_documents(part.ids, part.lengths)
                documents[index] += len(part.lengths)
                text_bytes[index] += part.text_bytes
            if progress is not None:
                progress(reader.done, reader.total, 0)
        if not any(documents):
            raise UserError(_nothing(files))
        for name, count in zip(names, documents):
            if not count:
                raise UserError(f"the split {name!r} has no document; change the share that is held out, or add text")
    splits = {
        name: SplitRecord(*sizes) for name, *sizes in zip(names, documents, [w.tokens for w in writers], text_bytes)
    }
    record = TextRecord(FILE, tokenizer.sha256, tokenizer.vocab_size, tokenizer.eod, request.append_eod, splits)
    write_record(folder, record)
    return record


def _nothing(files: Sequence[TextFile]) -> str:
    more = f" and {len(files) - 1} more files" if len(files) > 1 else ""
    return f"{files[0].name}{more}: no text in it; name a corpus that is not empty"
