"""A file of torch.save that is filled in place: its tensors arrive in any order, as boxes, from several ranks.

torch.save wants whole tensors in memory. Here the archive is laid out from shapes alone: an uncompressed zip with an
entry `data/N` for every tensor, `data.pkl` (the objects, which name the tensors) behind them, and the directory at the
end. As in torch's own files an entry's checksum (CRC-32) follows its data, so that nothing is written twice. torch.load
does not look at it; zip tools do.
"""

from __future__ import annotations

import collections
import io
import os
import pickle
import struct
import zlib
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch

from compt_megatron.checkpoint.contract import Region, TensorInfo
from compt_megatron.checkpoint.out_file import OutFile
from compt_megatron.checkpoint.saved_tensor import STORAGES, read_strided, strides
from compt_megatron.checkpoint.sums import Sums, joined

_TOP = "archive/"  # torch takes any name of the folder inside the zip
_ALIGN = 64  # bytes; where storages begin, as in torch's own files, so that mapped tensors are aligned
_FLAGS = 0x0808  # of an entry: its CRC follows its data, its name is UTF-8
_IN_ZIP64 = 2**32 - 1  # in a 32-bit field: the real value is in the zip64 record
_DAY = 0x21  # 1980-01-01, in the way of DOS: the same bytes whenever they are written
_LOCAL = struct.Struct("<4s5H3L2H")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR = struct.Struct("<4sLQL")
_END = struct.Struct("<4s4H2LH")
_BLOCK = 4 * 2**20  # bytes read back at a time
_SPOILT = -1  # where a CRC cannot be told from the order in which the bytes came
_STORAGE_TYPES = {dtype: getattr(torch, name) for name, dtype in STORAGES.items()}


class Hole(NamedTuple):
    """Stands in an archive's content for the tensor that is written under `key`."""

    key: str


class _Storage(NamedTuple):
    number: int
    info: TensorInfo


class _Entry(NamedTuple):
    name: bytes
    header: int  # byte at which its header begins
    start: int  # byte at which its data begin
    size: int

    @property
    def end(self) -> int:
        """The byte at which the next entry begins."""
        return self.start + self.size + len(_trailer(0, self.size))


class ArchiveLayout:
    """Where the tensors lie in an archive. The same on every rank, and whatever else the archive will hold."""

    def __init__(self, tensors: dict[str, TensorInfo]) -> None:
        self.tensors = tensors
        self._entries: dict[str, _Entry] = {}
        end = 0
        for index, (key, info) in enumerate(tensors.items()):
            self._entries[key] = entry = _entry(f"data/{index}", end, info.nbytes)
            end = entry.end
        self._end = end

    def start(self, key: str) -> int:
        """The first byte of a tensor."""
        return self._entries[key].start

    def before(self, key: str) -> tuple[int, bytes]:
        """What lies directly before a tensor, and at which byte."""
        entry = self._entries[key]
        return entry.header, _header(entry)

    def after(self, key: str, crc: int) -> tuple[int, bytes]:
        """What follows a tensor directly, and at which byte; `crc` is the CRC-32 of its bytes."""
        entry = self._entries[key]
        return entry.start + entry.size, _trailer(crc, entry.size)

    def tail(self, content: Any, crcs: dict[str, int]) -> tuple[int, bytes]:
        """The rest of an archive that holds `content`, plain objects with a `Hole` for every tensor, and at which byte.
        `crcs`: CRC-32 of every tensor."""
        pickled = io.BytesIO()
        _Pickler(pickled, self.tensors).dump(content)
        out, end = bytearray(), self._end
        entries = [(entry, crcs[key]) for key, entry in self._entries.items()]
        for name, data in (("data.pkl", pickled.getvalue()), ("byteorder", b"little"), ("version", b"3\n")):
            entry, crc = _entry(name, end, len(data)), zlib.crc32(data)
            entries.append((entry, crc))
            out += _header(entry) + data + _trailer(crc, len(data))
            end = entry.end
        return self._end, bytes(out + _directory(entries, end))


class _Pickler(pickle.Pickler):
    """Writes objects as torch.save does: a tensor is a call with its storage, which is named, not written."""

    def __init__(self, file: Any, tensors: dict[str, TensorInfo]) -> None:
        super().__init__(file, protocol=2)
        self._storages = {key: _Storage(index, info) for index, (key, info) in enumerate(tensors.items())}

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, Hole):
            return NotImplemented
        storage = self._storages[obj.key]
        shape = storage.info.shape
        return torch._utils._rebuild_tensor_v2, (storage, 0, shape, strides(shape), False, collections.OrderedDict())

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, _Storage):
            return None
        return "storage", _STORAGE_TYPES[obj.info.dtype], str(obj.number), "cpu", prod(obj.info.shape)


def _entry(name: str, at: int, size: int) -> _Entry:
    """An entry whose header begins at byte `at`, its data at a multiple of 64 bytes."""
    full = (_TOP + name).encode()
    start = at + _LOCAL.size + len(full) + 4
    return _Entry(full, at, start + -start % _ALIGN, size)


def _header(entry: _Entry) -> bytes:
    room = entry.start - entry.header - _LOCAL.size - len(entry.name) - 4
    extra = b"FB" + room.to_bytes(2, "little") + b"Z" * room  # how torch pads
    return _LOCAL.pack(b"PK\3\4", 20, _FLAGS, 0, 0, _DAY, 0, 0, 0, len(entry.name), len(extra)) + entry.name + extra


def _trailer(crc: int, size: int) -> bytes:
    return struct.pack("<4s3L" if size < _IN_ZIP64 else "<4sLQQ", b"PK\7\10", crc, size, size)


def _directory(entries: list[tuple[_Entry, int]], start: int) -> bytes:
    """The central directory, which begins at byte `start` of the file, in the form for files of any size."""
    out = bytearray()
    for entry, crc in entries:
        extra = struct.pack("<2H3Q", 1, 24, entry.size, entry.size, entry.header)
        sizes = (_IN_ZIP64, _IN_ZIP64, len(entry.name), len(extra), 0, 0, 0, 0, _IN_ZIP64)
        out += _CENTRAL.pack(b"PK\1\2", 45, 45, _FLAGS, 0, 0, _DAY, crc, *sizes) + entry.name + extra
    count, length = len(entries), len(out)
    out += _END64.pack(b"PK\6\6", 44, 45, 45, 0, 0, count, count, length, start)
    out += _LOCATOR.pack(b"PK\6\7", 0, start + length, 1)
    short = min(count, 0xFFFF)
    return bytes(out + _END.pack(b"PK\5\6", 0, 0, short, short, _IN_ZIP64, _IN_ZIP64, 0))


class Progress(NamedTuple):
    """What a rank knows of an archive that it wrote to: checksums of whole pieces, CRCs of whole tensors."""

    sums: dict[int, str]
    crcs: dict[str, int]


class FilledArchive:
    """One rank's handle on an archive. All ranks may `write`; after that one of them calls `seal`.

    Who writes the first element of a tensor also writes what lies before it, so that a file whose tensors come in order
    is written from end to end and nothing of it is read again for its checksums.
    """

    def __init__(self, path: Path, layout: ArchiveLayout) -> None:
        self.path, self.layout = path, layout
        self._out: OutFile | None = None
        self._sums = Sums()
        self._crcs: dict[str, tuple[int, int]] = {}  # tensor -> CRC so far, bytes that it is of

    def write(self, key: str, offsets: tuple[int, ...], box: torch.Tensor) -> None:
        """Store a box of tensor `key`."""
        info = self.layout.tensors[key]
        assert box.dtype == info.dtype, f"{self.path}: {box.dtype} written, {info.dtype} laid out"
        out = self._opened()
        for at, data in _runs(info.shape, offsets, box.cpu().contiguous()):
            self._take(key, at, data, out.put)

    def read_back(self, key: str, region: Region) -> torch.Tensor:
        """A box of tensor `key` as an earlier run left it in the file, taken up as if it were written now.

        Raises OSError if the file does not hold it.
        """
        info, out = self.layout.tensors[key], self._opened()
        values = read_strided(out.descriptor, self.layout.start(key), info.shape, info.dtype, region)
        for at, data in _runs(info.shape, tuple(part.start for part in region), values):
            self._take(key, at, data, lambda start, there: self._sums.update(start, memoryview(there)))
        return values

    def _take(self, key: str, at: int, data: memoryview, put: Callable[[int, Any], None]) -> None:
        """Put bytes of tensor `key`, from its byte `at` on, and what then is known to belong around them."""
        if at == 0:
            put(*self.layout.before(key))
        put(self.layout.start(key) + at, data)
        crc, done = self._crcs.get(key, (0, 0))
        if at != done:  # it will have to be read again, if only because a byte came twice
            self._crcs[key] = (0, _SPOILT) if at < done else (crc, done)
            return
        self._crcs[key] = crc, done = zlib.crc32(data, crc), done + len(data)
        if done == self.layout.tensors[key].nbytes:
            put(*self.layout.after(key, crc))

    def _opened(self) -> OutFile:
        if self._out is None:
            self._out = OutFile(self.path)
            self._out.sums = self._sums
        return self._out

    def sync(self) -> None:
        """Make durable what was written."""
        self._opened().sync()

    def close(self) -> None:
        """Let go of the file; the next `write` opens it again."""
        if self._out is not None:
            self._out.drain()
            self.abandon()

    def abandon(self) -> None:
        """Let go of the file after a failure."""
        if self._out is not None:
            self._out.close()
            self._out = None

    def progress(self) -> Progress:
        """What this rank knows, for the rank that seals the archive."""
        tensors = self.layout.tensors
        whole = {key: crc for key, (crc, done) in self._crcs.items() if done == tensors[key].nbytes}
        return Progress(dict(self._sums.done), whole)

    def seal(self, known: list[Progress], content: Any) -> tuple[str, int]:
        """After all ranks have written and closed: add the rest of the file, which still has to be made durable.

        `content` has a `Hole` for every tensor. Returns the file's checksum and its size in bytes.
        """
        crcs = {key: crc for progress in known for key, crc in progress.crcs.items()}
        out = self._opened()
        for key, info in self.layout.tensors.items():
            if key not in crcs:
                crcs[key] = _crc_of(out.descriptor, self.layout.start(key), info.nbytes)
                out.put(*self.layout.after(key, crcs[key]))
        at, tail = self.layout.tail(content, crcs)
        out.put(at, tail)
        size = at + len(tail)
        out.drain()
        os.ftruncate(out.descriptor, size)  # an earlier run may have left a longer one
        sums = {piece: text for progress in known for piece, text in progress.sums.items()} | self._sums.found(size)
        self.abandon()
        return joined(self.path, size, sums), size


def _runs(shape: tuple[int, ...], offsets: tuple[int, ...], box: torch.Tensor) -> Iterator[tuple[int, memoryview]]:
    """The runs of bytes that a box is in a tensor of `shape`, and at which byte of the tensor each begins."""
    if not shape or tuple(box.shape[1:]) == shape[1:]:
        at = offsets[0] * prod(shape[1:]) * box.dtype.itemsize if shape else 0
        yield at, box.reshape(-1).view(torch.uint8).numpy().data
        return
    step = prod(shape[1:]) * box.dtype.itemsize
    for index in range(box.shape[0]):
        for at, data in _runs(shape[1:], offsets[1:], box[index]):
            yield (offsets[0] + index) * step + at, data


def _crc_of(descriptor: int, start: int, size: int) -> int:
    crc, buffer, stop = 0, memoryview(bytearray(_BLOCK)), start + size
    while start < stop:
        count = os.preadv(descriptor, [buffer[: stop - start]], start)
        assert count, "the file is shorter than its layout"
        crc, start = zlib.crc32(buffer[:count], crc), start + count
    return crc
