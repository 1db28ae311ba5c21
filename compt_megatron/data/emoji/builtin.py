"""Where the shipped `emoji` data lies and what is in it."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

from compt_megatron.errors import UserError

SPLITS = ("train", "held_out_artist", "unseen_names")


def builtin_emoji_dir() -> Path:
    """The folder of the shipped shards, in a checkout and in an installed wheel alike."""
    return Path(str(files("compt_megatron"))) / "data" / "builtin" / "emoji"


def emoji_index(folder: Path | None = None) -> dict[str, Any]:
    """The `index.json` of the shipped data, or of a folder that `build_emoji` wrote (fields: docs/emoji.md)."""
    path = (folder or builtin_emoji_dir()) / "index.json"
    try:
        index: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: missing; reinstall compt-megatron, or make it with `compt data emoji DST`") from None
    return index


def emoji_shards(split: str, folder: Path | None = None) -> list[Path]:
    """The shards of a split in order, from the shipped data or a built folder. Raises UserError for other splits."""
    if split not in SPLITS:
        raise UserError(f"emoji has no split {split!r}; choose one of {', '.join(SPLITS)}")
    folder = folder or builtin_emoji_dir()
    return [folder / name for name in emoji_index(folder)["splits"][split]["shards"]]


def emoji_facts(split: str, folder: Path | None = None) -> Iterator[dict[str, Any]]:
    """The `.json` of every sample of a split (captions, name, code, artist, category), in the shards' order."""
    for shard in emoji_shards(split, folder):
        with tarfile.open(shard) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    content = tar.extractfile(member)
                    assert content is not None, f"{shard}: {member.name} is not a file"
                    yield json.load(content)
