"""Reading one shard: the samples of a tar file, plain or compressed, from a file, a command or a URL.

A sample is a run of neighbouring members whose names agree up to the first dot of the file name (webdataset's
convention); what follows the dot says what the member is.
"""

from __future__ import annotations

import re
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from lzma import LZMAError

IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp")
_FACTS = {"txt", "json", "cls"}
_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")  # the same as webdataset.tariterators.base_plus_ext
_META = re.compile(r"^__[^/]*__($|/)")
_DAMAGE = (OSError, EOFError, zlib.error, LZMAError, tarfile.TarError)


@dataclass
class RawSample:
    """The undecoded members of one sample, by lower-case suffix; `damage` says why they are not to be trusted."""

    key: str
    members: dict[str, bytes] = field(default_factory=dict)
    damage: str | None = None


class _StrictTarInfo(tarfile.TarInfo):
    """tarfile takes a damaged header, and a file without an end marker, for the end of the archive; here both are
    errors: else a shard cut off between two members would lose the rest of its samples unnoticed."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> _StrictTarInfo:
        try:
            return super().fromtarfile(archive)
        except tarfile.HeaderError as error:
            if type(error).__name__ == "EOFHeaderError":
                raise
            raise tarfile.ReadError(f"no valid header or end of the archive here: {error}") from error


def is_local(url: str) -> bool:
    """Whether a shard is a file of this machine (not `pipe:` and not a URL)."""
    return not url.startswith("pipe:") and "://" not in url


@contextmanager
def _open(url: str) -> Iterator[tarfile.TarFile]:
    if is_local(url):
        with tarfile.open(url, "r:*", tarinfo=_StrictTarInfo) as archive:
            yield archive
        return
    from webdataset.gopen import gopen

    stream = gopen(url, "rb")
    try:
        with tarfile.open(fileobj=stream, mode="r|*", tarinfo=_StrictTarInfo) as archive:
            yield archive
    finally:
        with suppress(OSError):  # a command that we stopped reading from may exit as it likes
            stream.close()


def _members(archive: tarfile.TarFile) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    while (info := archive.next()) is not None:
        archive.members.clear()  # type: ignore[attr-defined]  # else the list grows with the shard
        if info.isreg() and not _META.match(info.name) and (match := _NAME.match(info.name)) is not None:
            yield match.group(1), match.group(2).lower(), info


def read_samples(url: str, start: int = 0, images: bool = True) -> Iterator[RawSample]:
    """The samples of a shard from index `start` on, in file order.

    Without `images` the images' bytes are left alone. Never raises for a damaged shard: the last sample then carries
    the reason in `damage`, and the shard ends there.
    """
    wanted = {*IMAGE_SUFFIXES, *_FACTS} if images else _FACTS
    current: RawSample | None = None
    index = -1
    try:
        with _open(url) as archive:
            for key, suffix, info in _members(archive):
                if current is None or key != current.key:
                    if current is not None and index >= start:
                        yield current
                    current, index = RawSample(key), index + 1
                if index < start or suffix not in wanted:
                    continue
                if suffix in current.members:
                    current.damage = f"two members named {info.name}"
                    continue
                content = archive.extractfile(info)
                assert content is not None  # it is a regular file
                current.members[suffix] = content.read()
    except _DAMAGE as error:
        if index < start:
            yield RawSample("", damage=f"shard unreadable before sample {start} ({error})")
            return
        assert current is not None
        current.damage = f"shard damaged here ({error})"
    if current is not None and index >= start:
        yield current


def count_samples(url: str) -> int:
    """How many samples a shard holds, from its headers (a compressed shard or a command is read through).

    Raises OSError, EOFError, zlib.error or tarfile.TarError for a shard that cannot be read to its end.
    """
    count, last = 0, None
    with _open(url) as archive:
        for key, _, _ in _members(archive):
            if key != last:
                count, last = count + 1, key
    return count


def try_count(url: str) -> tuple[int | None, str]:
    """(number of samples, "") or (None, why the shard cannot be read)."""
    try:
        return count_samples(url), ""
    except _DAMAGE as error:
        return None, f"{type(error).__name__}: {error}"
