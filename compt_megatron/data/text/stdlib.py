"""The built-in text: the sources of the running Python's standard library, always there, tokenised on first use.

Left out: what not every installation has (tests, what belongs to a build) and `encodings`, whose tables are near copies
of one another, so that held-out files would not be unseen. Split by file: one in twenty is held out.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
import uuid
from functools import lru_cache
from pathlib import Path

import xxhash

from compt_megatron.data.text.build import SPLITS, Request, build_from
from compt_megatron.data.text.documents import TextFile
from compt_megatron.data.text.tokenizer import find_tokenizer
from compt_megatron.errors import UserError

VOCABULARY = 4096  # where no model says it
HELD_OUT = 0.05
_LEFT_OUT = {"test", "tests", "idle_test", "encodings", "site-packages", "dist-packages", "__pycache__", "_bundled"}
_OF_THE_BUILD = ("_sysconfigdata", "sitecustomize", "usercustomize", "config-")
_FORMAT = 1


def stdlib_text(
    split: str, vocab_size: int | None = None, tokenizer: Path | str | None = None, cache_dir: Path | None = None,
    root: Path | None = None,
) -> Path:  # fmt: skip
    """The prefix of the split `train` or `held_out`, made if it is not in the cache yet.

    Tokenised with `tokenizer`, else with a BPE of `vocab_size` (4,096) tokens that is trained on the split `train`.
    `root` is where the sources lie. The same sources give the same bytes. Raises UserError for another split.
    """
    if split not in SPLITS:
        raise UserError(f"data 'stdlib/{split}': the splits are {' and '.join(SPLITS)}")
    root = root or Path(sysconfig.get_paths()["stdlib"])
    given = find_tokenizer(tokenizer) if tokenizer is not None else None
    size = vocab_size or VOCABULARY
    request = (_FORMAT, HELD_OUT, _fingerprint(root), given.sha256 if given else size)
    digest = xxhash.xxh3_64_hexdigest(repr(request).encode())
    name = f"stdlib-{sys.version_info.major}.{sys.version_info.minor}-{digest}"
    folder = (cache_dir if cache_dir is not None else user_cache()) / name
    if not folder.is_dir():
        how = Request(
            tokenizer=given.path if given else None,
            train_bpe=None if given else size,
            append_eod=given is None or given.eod is not None,
            held_out=HELD_OUT,
            by_file=True,
        )
        _build_once(source_files(root), folder, how)
    return folder / split


def user_cache() -> Path:
    """Where what every run may use is kept: COMPT_CACHE, else compt_megatron in the user's cache folder."""
    if given := os.environ.get("COMPT_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "compt_megatron"


@lru_cache
def _fingerprint(root: Path) -> str:
    """A hash of the sources under `root`, names and contents."""
    digest = xxhash.xxh3_128()
    for file in source_files(root):
        digest.update(file.key.encode() + b"\0" + file.path.read_bytes() + b"\0")
    return str(digest.hexdigest())


def source_files(root: Path) -> list[TextFile]:
    """The library's sources that every installation has, by path; those that are not UTF-8 are left out."""
    files = []
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root)
        if _LEFT_OUT & set(inside.parts) or inside.parts[0].startswith(_OF_THE_BUILD):
            continue
        try:
            path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        files.append(TextFile(path, str(path), inside.as_posix()))
    if not files:
        raise UserError(f"{root}: holds no sources of Python's standard library; name other text data")
    return files


def _build_once(files: list[TextFile], folder: Path, request: Request) -> None:
    """Build under a name of our own, then take the common one, unless another process was faster."""
    own = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}")
    build_from(files, own, request)
    try:
        os.rename(own, folder)
    except OSError:
        shutil.rmtree(own)
        if not folder.is_dir():
            raise
