"""Text to token ids, a chunk of documents at a time: in this process, or in worker processes that keep their order.

A worker is a process of its own that hears chunks on its standard input and ends with it, so that none outlives a
build that was killed. It imports neither torch nor what the starting program imports.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import xxhash

from compt_megatron.data.text.documents import RawDocument
from compt_megatron.data.text.tokenizer import open_tokenizer
from compt_megatron.errors import UserError, WorkerLost

CHUNK_BYTES = 1 << 20  # a chunk ends with the document that reaches this size ...
CHUNK_DOCUMENTS = 4096  # ... or this number
_COMMAND = "import sys; sys.path[:] = {path!r}; from compt_megatron.data.text.encode import _serve; _serve()"


@dataclass(frozen=True)
class Recipe:
    """How documents become ids. `append`: an id after each document; `held_out`: the share of documents (or of files,
    `by_file`) that belong to the second split; `dtype`: numpy's name of the ids' type."""

    tokenizer: Path
    dtype: str
    append: int | None
    field: str
    held_out: float
    by_file: bool


@dataclass
class Encoded:
    """One split of a chunk: ids end to end (bytes of the dtype), tokens of each document (int32), bytes of UTF-8."""

    ids: bytes
    lengths: np.ndarray[Any, np.dtype[np.int32]]
    text_bytes: int


Split = tuple[Encoded, Encoded]  # trained on, held out


def is_held_out(document: RawDocument, text: str, share: float, by_file: bool) -> bool:
    """Whether a document belongs to the held-out split: by a hash of its text, so that copies stay together, or of its
    file's name inside the corpus. Nothing else matters, neither order nor what else there is."""
    if not share:
        return False
    key = document.key if by_file else text
    return bool(xxhash.xxh3_64_intdigest(key.encode("utf-8")) < share * 2.0**64)


class Encoder:
    """Encodes chunks in this process."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.tokenizer = recipe, open_tokenizer(recipe.tokenizer)

    def __call__(self, chunk: list[RawDocument]) -> Split:
        """The ids of a chunk's documents, in order. Documents without a token are left out. UserError: a bad line."""
        recipe = self.recipe
        texts = [document.text(recipe.field) for document in chunk]
        rows = [row.ids for row in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        aside = [is_held_out(*pair, recipe.held_out, recipe.by_file) for pair in zip(chunk, texts)]
        return self._split(texts, rows, aside, False), self._split(texts, rows, aside, True)

    def _split(self, texts: list[str], rows: list[list[int]], aside: list[bool], held_out: bool) -> Encoded:
        mine = [index for index, row in enumerate(rows) if row and aside[index] == held_out]
        end = [] if self.recipe.append is None else [self.recipe.append]
        ids = np.fromiter((token for index in mine for token in (*rows[index], *end)), np.dtype(self.recipe.dtype))
        lengths = np.array([len(rows[index]) + len(end) for index in mine], np.int32)
        return Encoded(ids.tobytes(), lengths, sum(len(texts[index].encode("utf-8")) for index in mine))


def chunks(documents: Iterable[RawDocument]) -> Iterator[list[RawDocument]]:
    """The documents in chunks, which depend on nothing but the documents."""
    chunk: list[RawDocument] = []
    size = 0
    for document in documents:
        chunk.append(document)
        size += len(document.data)
        if size >= CHUNK_BYTES or len(chunk) >= CHUNK_DOCUMENTS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def encode(documents: Iterable[RawDocument], recipe: Recipe, workers: int = 1) -> Generator[Split]:
    """The encoded chunks of the documents, in order, whatever the number of `workers` (1: this process).

    At most three chunks a worker are in memory. Raises UserError for a bad document, the first in order, and WorkerLost
    for a worker that was killed.
    """
    if workers == 1:
        yield from map(Encoder(recipe), chunks(documents))
        return
    crew = _Crew(workers)
    waiting: deque[Future[Split]] = deque()
    try:
        crew.start(recipe)
        for chunk in chunks(documents):
            waiting.append(crew.submit(chunk))
            if len(waiting) >= 3 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        crew.end()


class _Crew:
    """Worker processes, each served by a thread of this one.

    They talk by pickles over pipes that nobody else has: both ends are this program, and nothing that was read from a
    file or a network is unpickled.
    """

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._idle: SimpleQueue[subprocess.Popen[bytes]] = SimpleQueue()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._threads = ThreadPoolExecutor(workers)

    def start(self, recipe: Recipe) -> None:
        command = [sys.executable, "-c", _COMMAND.format(path=sys.path)]
        env = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        for _ in range(self._workers):
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env)
            self._processes.append(process)
            self._idle.put(process)
            assert process.stdin is not None
            pickle.dump(recipe, process.stdin)

    def submit(self, chunk: list[RawDocument]) -> Future[Split]:
        return self._threads.submit(self._ask, chunk)

    def _ask(self, chunk: list[RawDocument]) -> Split:
        process = self._idle.get()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            pickle.dump(chunk, process.stdin, pickle.HIGHEST_PROTOCOL)
            process.stdin.flush()
            answer = pickle.load(process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            raise WorkerLost(
                f"a worker ended with status {process.wait()}; nothing is wrong with the text, start it again"
            ) from error
        finally:
            self._idle.put(process)
        if isinstance(answer, Exception):
            raise answer
        assert isinstance(answer, tuple)
        return answer[0], answer[1]

    def end(self) -> None:
        """No worker is left, done or not."""
        for process in self._processes:
            process.kill()
        self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                try:
                    pipe.close()
                except OSError:  # what was not sent has no reader any more
                    continue


def _serve() -> None:
    """A worker's life: a recipe, then chunks, until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    hear, tell = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever else prints does not mix with the answers
    encoder = Encoder(pickle.load(hear))
    while True:
        try:
            chunk = pickle.load(hear)
        except (EOFError, pickle.UnpicklingError):
            return
        try:
            answer: Split | Exception = encoder(chunk)
        except UserError as error:
            answer = UserError(str(error))
        except Exception:
            answer = RuntimeError(f"in a worker: {traceback.format_exc()}")
        pickle.dump(answer, tell, pickle.HIGHEST_PROTOCOL)
        tell.flush()
