"""A damaged file is found before anything of it is used: every data file is checked once, when first opened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compt_megatron.checkpoint.commit import file_hash
from compt_megatron.errors import UserError

_SMALL = 2**20  # bytes of a file that is hashed when its checkpoint is opened


class Guard:
    """The files of one checkpoint and their checksums from compt.json (None: a foreign checkpoint, unchecked)."""

    def __init__(self, folder: Path, manifest: dict[str, Any] | None) -> None:
        self.folder = folder
        self._sums: dict[str, str] | None = None if manifest is None else manifest["checksums"]
        self._sizes: dict[str, int] = {} if manifest is None else manifest["files"]
        self._checked: set[str] = set()
        self._check_cheaply()

    def _check_cheaply(self) -> None:
        """What costs next to nothing when a checkpoint is opened: that all files are there in their sizes, and the
        bytes of the small ones, which say what the large ones mean."""
        for name, size in sorted(self._sizes.items()):
            if size <= _SMALL and not name.endswith(".distcp"):
                self.file(name)
            else:
                self._compare_size(self._existing(name), name)

    def file(self, name: str) -> Path:
        """The path of a file, checked. Raises UserError if it is missing, truncated or changed."""
        path = self.folder / name
        if name in self._checked:
            return path
        self._existing(name)
        if self._sums is not None:
            self._compare(path, name)
        self._checked.add(name)
        return path

    def _existing(self, name: str) -> Path:
        path = self.folder / name
        if not path.is_file():
            raise UserError(f"{path}: this file of the checkpoint is missing; restore it or use another checkpoint")
        return path

    def _compare_size(self, path: Path, name: str) -> None:
        size = path.stat().st_size
        if size != self._sizes[name]:
            raise UserError(
                f"{path}: truncated or changed: {size} bytes where {self._sizes[name]} were written; "
                "restore it or use another checkpoint"
            )

    def _compare(self, path: Path, name: str) -> None:
        assert self._sums is not None
        if name not in self._sums:
            raise UserError(
                f"{path}: is not among the files that compt.json lists; remove it or restore the checkpoint"
            )
        self._compare_size(path, name)
        if file_hash(path) != self._sums[name]:
            raise UserError(f"{path}: its bytes do not match their checksum; restore it or use another checkpoint")

    def check_all(self) -> None:
        """Check every file that compt.json lists."""
        for name in sorted(self._sums or {}):
            self.file(name)
