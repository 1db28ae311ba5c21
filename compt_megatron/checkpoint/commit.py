"""Atomic commit: a checkpoint exists whole or not at all.

Everything is written into `DST.partial/`, hashed as it is written and fsynced; compt.json comes last inside; then one
rename makes `DST` appear, and its parent folder is fsynced. What a killed run left is `DST.partial/`: no reader
accepts it, and the next run continues it if it is the same request (journal.py), or else replaces it. A destination
that is a single file (`.pt`, `.safetensors`) is made in `FILE.partial/` too and becomes `FILE` and `FILE.compt.json`.
"""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from compt_megatron.checkpoint.contract import Exchange
from compt_megatron.checkpoint.journal import claim, has_journal, is_of, remove_journals
from compt_megatron.checkpoint.manifest import MANIFEST, manifest_bytes, manifest_path
from compt_megatron.checkpoint.out_file import no_room
from compt_megatron.checkpoint.party import Party
from compt_megatron.errors import UserError

SINGLE_FILES = (".pt", ".safetensors")
_PARTIAL = ".partial"
_MARGIN = 16 * 2**20  # bytes left free on the disk beyond the tensors: metadata, compt.json, a log line
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def partial_path(path: Path) -> Path:
    """Where a checkpoint lies while it is being written."""
    return path.with_name(path.name + _PARTIAL)


def is_partial(path: Path) -> bool:
    return path.name.endswith(_PARTIAL)


class Destination:
    """The place where one checkpoint is written by one or several ranks; see the module's docstring.

    `request`: what identifies this request (None: nothing is continued); `continued`: whether the files of an earlier
    run of it are there. Raises UserError, on every rank and before anything is written, if `path` cannot become a
    checkpoint or another job is writing it.
    """

    def __init__(
        self,
        path: Path,
        rank: int,
        world: int,
        exchange: Exchange | None,
        overwrite: bool,
        request: str | None = None,
    ) -> None:
        self.path = Path(path)
        if not self.path.name:
            raise UserError(f"{str(path)!r}: does not name a checkpoint; give the name of a new folder or file")
        self.party = Party(rank, world, exchange)
        self.single = self.path.suffix in SINGLE_FILES
        self.folder = partial_path(self.path)
        self._overwrite = overwrite
        self._new_parents: list[Path] = []  # folders that were made for it, inmost first
        self._claim = -1
        try:
            self.continued: bool = self.party.lead(lambda: self._prepare(request))
        except RuntimeError:  # another rank failed; what this one prepared has no use
            self.discard()
            raise

    def _prepare(self, request: str | None) -> bool:
        if is_partial(self.path):
            raise UserError(
                f"{self.path}: a name that ends in {_PARTIAL} is kept for unfinished checkpoints; rename it"
            )
        if self.path.exists() and not self._overwrite and not _is_empty_folder(self.path):
            raise UserError(f"{self.path}: exists already; choose another destination or pass --overwrite")
        if self.path.is_dir() and not _is_empty_folder(self.path) and not (self.path / MANIFEST).is_file():
            raise UserError(f"{self.path}: holds no checkpoint of ours and is not overwritten; choose another place")
        if self.path.is_dir() and self.single:
            raise UserError(
                f"{self.path}: is a folder, but the name asks for a single file; choose another destination"
            )
        if self.path.is_file() and not self.single:
            raise UserError(
                f"{self.path}: is a file; name a folder, or a file that ends in {' or '.join(SINGLE_FILES)}"
            )
        try:
            if has_journal(self.folder):
                self._claim = claim(self.folder)
            if is_of(self.folder, request):
                return True
            self.unclaim()
            _remove(self.folder)
            self._new_parents = [parent for parent in self.path.parents if not parent.exists()]
            self.folder.mkdir(parents=True)
            if request is not None:
                self._claim = claim(self.folder)
            return False
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written there ({error.strerror}); choose another place") from error

    def unclaim(self) -> None:
        """Let another job have the place."""
        if self._claim >= 0:
            os.close(self._claim)
            self._claim = -1

    def require_space(self, count: int) -> None:
        """Raise UserError if `count` bytes and a margin do not fit on the disk of the destination."""
        there = sum(path.stat().st_blocks * 512 for path in self.folder.rglob("*")) if self.continued else 0
        free = shutil.disk_usage(self.folder).free + there
        if count + _MARGIN > free:
            needs = f"needs {_gigabytes(count + _MARGIN)}, {_gigabytes(free)} free at {self.path.parent}"
            raise UserError(f"{self.path}: {needs}; free some space or choose another destination")

    def commit(self, manifest: dict[str, Any]) -> None:
        """Rank 0 only: write compt.json, make everything durable, and move it to its name."""
        manifest_file = self.folder / (manifest_path(self.path).name if self.single else MANIFEST)
        with open(manifest_file, "wb") as file:
            file.write(manifest_bytes(manifest))
            file.flush()
            os.fsync(file.fileno())
        if self.continued:
            self._remove_strangers({*manifest["files"], manifest_file.name})
        remove_journals(self.folder)
        fsync_folder(self.folder)
        if self.single:
            self._move_files(manifest_file)
        else:
            _move_folder(self.folder, self.path)
        fsync_folder(self.path.parent)
        self.unclaim()

    def _remove_strangers(self, names: set[str]) -> None:
        """Files that the earlier run made and this one did not."""
        for path in self.folder.rglob("*"):
            if path.is_file() and path.relative_to(self.folder).as_posix() not in names:
                path.unlink()

    def _move_files(self, manifest_file: Path) -> None:
        # A new file comes after its record: it is not there, or there with its record. Where a file is replaced, its
        # old record goes first: a kill in between leaves a whole file without one, never beside that of another.
        replaced = self.path.exists()
        manifest_path(self.path).unlink(missing_ok=True)
        moves = [(manifest_file, manifest_path(self.path)), (self.folder / self.path.name, self.path)]
        for source, target in reversed(moves) if replaced else moves:
            os.replace(source, target)
        shutil.rmtree(self.folder)

    def discard(self) -> None:
        """Rank 0: remove the unfinished checkpoint, and the folders that were made for it."""
        if not self.party.leads:
            return
        _remove(self.folder)
        self.unclaim()
        for parent in self._new_parents:
            if not _is_empty_folder(parent):
                break
            parent.rmdir()


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def _move_folder(source: Path, target: Path) -> None:
    """Rename a folder to `target`; one that is there changes places with it in one step and is then removed."""
    if not target.exists() or _is_empty_folder(target):
        os.rename(source, target)
        return
    if not _swap(source, target):  # a file system without exchange: the old one is aside for an instant
        aside = target.with_name(f"{target.name}.replaced{_PARTIAL}")
        _remove(aside)
        os.rename(target, aside)
        os.rename(source, target)
        _remove(aside)
    _remove(source)


def _swap(left: Path, right: Path) -> bool:
    """Exchange two names atomically (Linux renameat2). False where the system or file system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:
        return False
    status = rename(_AT_FDCWD, os.fsencode(left), _AT_FDCWD, os.fsencode(right), ctypes.c_uint(_RENAME_EXCHANGE))
    return bool(status == 0)


def fsync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_files(paths: Iterable[Path]) -> None:
    """Make many files durable: all are sent to the disk before the first is waited for."""
    paths = list(paths)
    for act in (_send, os.fsync):
        for path in paths:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                with no_room(path):
                    act(descriptor)
            finally:
                os.close(descriptor)


def _send(descriptor: int) -> None:
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def replace_file(path: Path, content: bytes) -> None:
    """Write a small file beside, make it durable and rename it to `path`: a reader sees the old one or the new one."""
    beside = partial_path(path)
    with open(beside, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
    fsync_folder(path.parent)


def remove_checkpoint(path: Path) -> None:
    """Delete a checkpoint folder so that a kill in the middle leaves only a `.partial` that nothing reads."""
    doomed = partial_path(path)
    _remove(doomed)
    os.rename(path, doomed)
    fsync_folder(path.parent)
    _remove(doomed)


def committed(folder: Path) -> list[Path]:
    """The whole checkpoints directly inside `folder`, by name; leftovers of killed runs are not among them."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if not is_partial(path) and (path / MANIFEST).is_file())


def write_pointer(folder: Path, name: str) -> None:
    """Point `folder/latest` at the checkpoint `name` in it. Call it after that checkpoint's commit."""
    assert (folder / name / MANIFEST).is_file(), f"{folder / name} is no committed checkpoint"
    replace_file(folder / "latest", f"{name}\n".encode())


def read_pointer(folder: Path) -> Path | None:
    """The checkpoint that `folder/latest` points at, or None if there is no pointer.

    Raises UserError if it points at nothing whole.
    """
    pointer = folder / "latest"
    if not pointer.is_file():
        return None
    target = folder / pointer.read_text(errors="replace").strip()
    if not (target / MANIFEST).is_file():
        raise UserError(f"{pointer}: points at '{target.name}', which is not a whole checkpoint; name one in {folder}")
    return target
