"""Finding a Megatron checkpoint: the folder of one iteration, or the --save folder of Megatron-LM with its tracker."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compt_megatron.checkpoint.guard import Guard
from compt_megatron.checkpoint.manifest import MANIFEST, read_manifest, recorded_spec
from compt_megatron.errors import UserError
from compt_megatron.recipe.files import read_json
from compt_megatron.spec.families import spec_from_config
from compt_megatron.spec.table import ModelSpec

TRACKER = "latest_checkpointed_iteration.txt"
CONFIG = "config.json"


def iteration_folder(iteration: int) -> str:
    """What Megatron-LM calls the folder of an iteration."""
    return f"iter_{iteration:07d}"


@dataclass(frozen=True)
class Home:
    """Where a checkpoint lies. `root` holds compt.json, if any (`manifest`); `inner` is the iteration's folder in it,
    or empty where that is `root` itself."""

    path: Path  # as given
    root: Path
    inner: str
    manifest: dict[str, Any] | None

    @property
    def folder(self) -> Path:
        return self.root / self.inner

    def guard(self) -> Guard:
        return Guard(self.root, self.manifest)

    def name(self, file: str) -> str:
        """The name of a file of the iteration's folder as compt.json lists it."""
        return f"{self.inner}/{file}" if self.inner else file

    def spec(self, given: ModelSpec | None) -> ModelSpec:
        """The model: as recorded in compt.json, or given, or that of a config.json beside the checkpoint.

        Raises UserError if two of them disagree, or there is none.
        """
        found = recorded_spec(self.manifest, given, self.path)
        if self.manifest is None:
            for folder in dict.fromkeys((self.folder, self.root, self.folder.parent)):
                if (folder / CONFIG).is_file():
                    found = spec_from_config(read_json(folder / CONFIG), self.path.name)
                    break
            if given is not None and found is not None and given.digest != found.digest:
                raise UserError(f"{self.path}: checkpoint of another model than '{given.name}': see {folder / CONFIG}")
        if found is None:
            raise UserError(f"{self.path}: does not record which model it holds; name its model config with --from")
        return found


def find_home(path: Path) -> Home:
    """The home of the checkpoint at `path`: a --save folder, or the folder of an iteration.

    Raises UserError if the tracker is damaged or names a folder that is not there.
    """
    if (path / TRACKER).is_file():
        inner = tracked(path)
        if not (path / inner).is_dir():
            raise UserError(
                f"{path / TRACKER}: names {inner}, which is not there; restore it, or name the folder of an iteration"
            )
        return Home(path, path, inner, read_manifest(path))
    parent = path.parent
    if not (path / MANIFEST).is_file() and (parent / TRACKER).is_file() and (parent / MANIFEST).is_file():
        return Home(path, parent, path.name, read_manifest(parent))
    return Home(path, path, "", read_manifest(path))


def tracked(root: Path) -> str:
    """The folder of the iteration that Megatron-LM's tracker names: `iter_0000100`, or `release`."""
    text = (root / TRACKER).read_text(errors="replace").strip()
    if text == "release":
        return text
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise UserError(
            f"{root / TRACKER}: holds {text[:40]!r}, which is no iteration; name the folder of an iteration"
        )
    return iteration_folder(int(text))
