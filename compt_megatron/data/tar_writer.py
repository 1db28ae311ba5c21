"""Webdataset shards whose bytes depend on their content only: no clock, user, host or file order gets in."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO

from compt_megatron.errors import UserError

Sample = tuple[str, Mapping[str, bytes]]  # key, {extension without dot: content}


def write_shard(path: Path, samples: Iterable[Sample]) -> int:
    """Write samples, in the order given, as one webdataset shard; return how many there were.

    `path` ends in `.tar` (plain) or `.tar.gz` (compressed). A sample's members lie together, sorted by extension, named
    `<key>.<extension>`. Equal samples give equal bytes (for `.tar.gz`: with the same zlib). Raises UserError for
    another ending; a key that webdataset would split wrongly (a dot or slash in it) or that repeats is an assert.
    """
    if path.name.endswith(".tar.gz"):
        with open(path, "wb") as raw, gzip.GzipFile("", "wb", compresslevel=9, fileobj=raw, mtime=0) as compressed:
            return _write_tar(compressed, samples)
    if path.name.endswith(".tar"):
        with open(path, "wb") as raw:
            return _write_tar(raw, samples)
    raise UserError(f"shard {path}: unknown ending; name it *.tar or *.tar.gz")


def _write_tar(stream: IO[bytes] | gzip.GzipFile, samples: Iterable[Sample]) -> int:
    seen: set[str] = set()
    with tarfile.open(fileobj=stream, mode="w|", format=tarfile.USTAR_FORMAT) as tar:
        for key, members in samples:
            assert key, "a sample's key is empty"
            assert not set(key) & set("./"), f"sample key {key!r} would be split by webdataset"
            assert key not in seen, f"sample key {key!r} repeats"
            assert members, f"sample {key!r} has no members"
            seen.add(key)
            for extension in sorted(members):
                info = tarfile.TarInfo(f"{key}.{extension}")  # its defaults: mtime 0, uid 0, gid 0, no user names
                info.mode = 0o644
                info.size = len(members[extension])
                tar.addfile(info, io.BytesIO(members[extension]))
    return len(seen)
