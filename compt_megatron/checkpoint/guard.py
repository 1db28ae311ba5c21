"""A damaged file is found before anything made of it counts: every data file is compared with its checksum once.

Where a checkpoint is opened for use, a file is checked before anything of it is returned. Where it is copied or grown
(`deferred`), that would read it twice: there the large files are checked beside the work, shared among the workers, and
nothing is committed before `Checks.settle` has returned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any, NoReturn

from compt_megatron.checkpoint.changed_config import changed_config
from compt_megatron.checkpoint.pace import Pace, Stopped
from compt_megatron.checkpoint.sums import PIECE, piece_sums, pieces, split_sums, whole_hash
from compt_megatron.errors import UserError

_SMALL = 2**20  # bytes of a file that is hashed when its checkpoint is opened
_LARGE = PIECE  # bytes above which a check may be deferred
_AT_ONCE = 8  # pieces that are checked in one go


class Checks:
    """Checks of this worker's share of the files, made by a thread beside the work, no faster than the work goes on."""

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self.rank, self.world, self.pace = rank, world, Pace()
        self._thread: Thread | None = None
        self._waiting: list[Callable[[], None]] = []
        self._error: BaseException | None = None

    def add(self, check: Callable[[], None]) -> None:
        """Let `check`, which raises UserError, be called beside the work."""
        assert self._thread is None, "the checks have begun"
        self._waiting.append(check)

    def begin(self) -> None:
        """Start checking. The work reports to `pace` how far it is."""
        if self._waiting:
            self._thread = Thread(target=self._run, name="check", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        try:
            for index, check in enumerate(self._waiting):
                self.pace.wait_for(index / len(self._waiting))
                check()
        except Stopped:
            pass
        except BaseException as error:  # raised by `settle`, in the thread that must know
            self._error = error

    def look(self) -> None:
        """Raise UserError if something was found damaged so far."""
        if self._error is not None:
            raise self._error

    def settle(self) -> None:
        """Wait until all is checked. Raises UserError if something was damaged."""
        self.pace.release()
        if self._thread is not None:
            self._thread.join()
        self.look()

    def close(self) -> None:
        """Give up what was not checked yet."""
        self.pace.stop()
        if self._thread is not None:
            self._thread.join()


class _Trusting(Checks):
    """For a second look at files that are being checked already."""

    def add(self, check: Callable[[], None]) -> None:
        pass


_deferred: ContextVar[Checks | None] = ContextVar("deferred", default=None)


@contextmanager
def deferred(rank: int = 0, world: int = 1) -> Iterator[Checks]:
    """Checkpoints that are opened inside leave the check of large files to `Checks`; see the module's docstring.

    Every one of `world` workers must do so: each checks its share.
    """
    checks = Checks(rank, world)
    with _entered(checks):
        yield checks


@contextmanager
def already_checked() -> Iterator[None]:
    """Large files of checkpoints that are opened inside are checked by somebody else."""
    with _entered(_Trusting()):
        yield


@contextmanager
def _entered(checks: Checks) -> Iterator[None]:
    token = _deferred.set(checks)
    try:
        yield
    finally:
        _deferred.reset(token)
        checks.close()


class Guard:
    """The files of one checkpoint and their checksums from compt.json (None: a foreign checkpoint, unchecked).

    `at_once`: whether what is cheap to check is checked now. Raises UserError for the first file that is not whole.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any] | None, at_once: bool = True) -> None:
        self.folder = folder
        self._sums: dict[str, str] | None = None if manifest is None else manifest["checksums"]
        self._sizes: dict[str, int] = {} if manifest is None else manifest["files"]
        self._manifest = manifest or {}
        self._whole = manifest is not None and manifest["format_version"] == 1
        self._checked: set[str] = set()
        self._refused: dict[str, str] = {}
        if not at_once:
            return
        self._check_cheaply()
        if (checks := _deferred.get()) is not None and self._sums is not None:
            self._defer(checks)

    def _check_cheaply(self) -> None:
        """What costs next to nothing when a checkpoint is opened: that all files are there in their sizes, and the
        bytes of the small ones, which say what the large ones mean."""
        for name, size in sorted(self._sizes.items()):
            if size <= _SMALL and not name.endswith(".distcp"):
                self.file(name)
            else:
                self._compare_size(self._existing(name), name)

    def _defer(self, checks: Checks) -> None:
        """Hand over this worker's share of the large files: whole files in turn, or a run of the pieces of each."""
        large = [name for name, size in sorted(self._sizes.items()) if size > _LARGE]
        self._checked.update(large)
        for index, name in enumerate(large):
            first, last = self._share(index, pieces(self._sizes[name]), checks)
            for at in range(first, last, _AT_ONCE):
                checks.add(partial(self._compare, name, at, min(at + _AT_ONCE, last)))

    def _share(self, index: int, count: int, checks: Checks) -> tuple[int, int]:
        if self._whole:
            return 0, int(index % checks.world == checks.rank)
        return checks.rank * count // checks.world, (checks.rank + 1) * count // checks.world

    def file(self, name: str) -> Path:
        """The path of a file, checked. Raises UserError if it is missing, truncated or changed."""
        if name in self._refused:
            raise UserError(self._refused[name])
        if name not in self._checked:
            try:
                self._check(name)
            except UserError as error:  # whoever asks again need not wait until all of it is hashed again
                self._refused[name] = str(error)
                raise
            self._checked.add(name)
        return self.folder / name

    def _check(self, name: str) -> None:
        path = self._existing(name)
        if self._sums is None:
            return
        if name not in self._sums:
            raise UserError(
                f"{path}: is not among the files that compt.json lists; remove it or restore the checkpoint"
            )
        self._compare_size(path, name)
        self._compare(name, 0, pieces(self._sizes[name]))

    def _existing(self, name: str) -> Path:
        path = self.folder / name
        if not path.is_file():
            raise UserError(f"{path}: this file of the checkpoint is missing; restore it or use another checkpoint")
        return path

    def _compare_size(self, path: Path, name: str) -> None:
        size = path.stat().st_size
        if size != self._sizes[name]:
            self._refuse(path, f"truncated or changed: {size} bytes where {self._sizes[name]} were written")

    def _compare(self, name: str, first: int, last: int) -> None:
        """Compare pieces [first, last) of a file with their sums (in format version 1: all of it with its own)."""
        assert self._sums is not None
        path = self.folder / name
        if self._whole:
            good = whole_hash(path) == self._sums[name]
        else:
            good = list(piece_sums(path, first, last)) == split_sums(self._sums[name])[first:last]
        if not good:
            self._refuse(path, "its bytes do not match their checksum")

    def _refuse(self, path: Path, what: str) -> NoReturn:
        what = changed_config(path, self._manifest) or what
        raise UserError(f"{path}: {what}; restore it or use another checkpoint")


def damaged_files(folder: Path, manifest: dict[str, Any]) -> list[str]:
    """A line for each file that compt.json lists and that is missing, truncated or changed. All of them are read."""
    guard, found = Guard(folder, manifest, at_once=False), []
    for name in sorted(manifest["files"]):
        try:
            guard.file(name)
        except UserError as error:
            found.append(str(error))
    return found
