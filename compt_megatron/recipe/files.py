"""Where the files that a recipe or a command line names are looked for."""

from __future__ import annotations

import difflib
import importlib.util
import json
from pathlib import Path
from typing import Any

from compt_megatron.errors import UserError


def expanded(name: str) -> Path:
    """The path `name` with a leading ~ expanded, where there is such a home."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


def packaged_configs() -> Path:
    """The folder of packaged configs: inside the wheel, or at the top of a source checkout."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "configs", package.parent / "configs"):
        if folder.is_dir():
            return folder
    raise UserError(f"{package}: the packaged configs are missing; install compt_megatron again")


def find_file(name: str, beside: Path | None = None) -> Path | None:
    """The file called `name`: as given from `beside` (or the working directory), then among the packaged configs."""
    given = expanded(name)
    for candidate in ((beside / given) if beside else given, packaged_configs() / given):
        if candidate.is_file():
            return candidate.resolve()
    return None


def _open_clip_configs() -> dict[str, Path]:
    found = importlib.util.find_spec("open_clip")
    if found is None or not found.submodule_search_locations:
        return {}
    folder = Path(next(iter(found.submodule_search_locations))) / "model_configs"
    return {path.stem: path for path in sorted(folder.glob("*.json"))}


def find_model_config(name: str, beside: Path | None = None) -> Path:
    """The JSON file of model config `name`: a path, a folder that holds a config, a packaged name or open_clip's.

    Looked for beside the recipe, among the packaged configs (with or without `models/` and `.json`), then by
    open_clip's model names (which need open_clip_torch installed). Raises UserError naming the nearest known config.
    """
    given = expanded(name)
    folder = (beside / given) if beside else given
    if folder.is_dir():
        for filename in ("open_clip_config.json", "config.json"):
            if (folder / filename).is_file():
                return (folder / filename).resolve()
        raise UserError(f"{name}: the folder has no open_clip_config.json or config.json; name a model config")
    for spelling in (name, f"{name}.json", f"models/{name}", f"models/{name}.json"):
        if (path := find_file(spelling, beside)) is not None:
            return path
    theirs = _open_clip_configs()
    if name in theirs:
        return theirs[name]
    ours = [path.stem for path in (packaged_configs() / "models").glob("*.json")]
    near = difflib.get_close_matches(given.stem, [*ours, *theirs], n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    more = "" if theirs else " (open_clip's model names need: pip install open_clip_torch)"
    raise UserError(
        f"model config {name!r} not found beside the recipe, among the packaged ones or in open_clip{more}{hint}"
    )


def model_stem(name: str) -> str:
    """The short name of model config `name`: its file's, without folder and `.json`."""
    return Path(name).name.removesuffix(".json")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises UserError where the file cannot be read or holds something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a readable JSON file ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a {type(value).__name__}, a JSON object is needed")
    return value
