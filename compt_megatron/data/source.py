"""Which shards a data set has, and how many samples each of them holds."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from compt_megatron.data.tar_reader import is_local, try_count
from compt_megatron.errors import UserError
from compt_megatron.recipe.files import expanded, read_json

BuiltIn = tuple[list[str], dict[str, int], list[str] | None]

_ARCHIVES = (".tar", ".tar.gz", ".tgz")
_MOST_SHARDS = 10_000_000  # so that a slip of the finger in a pattern does not fill the memory


@dataclass
class ShardSource:
    """A data set: shards in a fixed order and the number of samples in each.

    `sizes` counts every sample, broken ones too; `classes` are the names of its classes where the set comes with
    them. Make one with `ShardSource.open`.
    """

    name: str
    shards: list[str]
    sizes: list[int]
    classes: list[str] | None = None
    labels: list[str] = field(default_factory=list)  # short unique name of each shard, used in sample ids

    def __post_init__(self) -> None:
        assert len(self.shards) == len(self.sizes)
        if not self.labels:
            stems = [_basename(shard) for shard in self.shards]
            unique = len(set(stems)) == len(stems)
            self.labels = stems if unique else [f"{index:05d}-{stem}" for index, stem in enumerate(stems)]

    @property
    def samples(self) -> int:
        """Number of samples."""
        return sum(self.sizes)

    @property
    def bytes(self) -> int | None:
        """Bytes of all shards as stored, or None if some are not local files."""
        return sum(map(os.path.getsize, self.shards)) if all(map(os.path.isfile, self.shards)) else None

    @classmethod
    def open(
        cls,
        spec: str | Sequence[str],
        *,
        beside: Path | None = None,
        cache_dir: Path | None = None,
        sizes: str | Path | None = None,
        classes: str | Path | None = None,
    ) -> ShardSource:
        """The data set that `spec` names.

        `spec`: `emoji/<split>` (built in), a folder of shards, one shard, a brace pattern
        (`shards/{00000..00331}.tar`), `pipe:<command>` whose output is a shard (brace patterns too), a URL that
        webdataset opens, or a list of these. Relative paths are looked for beside `beside` (the recipe's folder),
        then in the working directory. `sizes` names a JSON file {shard file name: samples}, `classes` a text file of
        one class name a line. Sizes come from there, else from `sizes.json` or img2dataset's `<shard>_stats.json`
        beside the shards, else every shard is counted once and the counts are kept in `cache_dir`.

        Raises UserError for shards that do not exist, are damaged or empty.
        """
        specs = [spec] if isinstance(spec, str) else list(spec)
        name = spec if isinstance(spec, str) else ", ".join(specs)
        known = _read_sizes(_find(str(sizes), beside)) if sizes is not None else {}
        names = _read_classes(_find(str(classes), beside)) if classes is not None else None
        shards: list[str] = []
        for one in specs:
            if is_built_in(one):
                own, counts, own_names = built_in(one)
                shards += own
                known |= counts
                names = names or own_names
            else:
                shards += _expand(one, beside)
        if not shards:
            raise UserError(f"data {name!r}: no shards; name a folder with .tar files, a pattern or a list")
        return cls(name, shards, _sizes(name, shards, known, cache_dir), names)


def _basename(shard: str) -> str:
    if not is_local(shard):
        return hashlib.sha256(shard.encode()).hexdigest()[:8]
    stem = Path(shard).name
    for suffix in _ARCHIVES:
        stem = stem.removesuffix(suffix)
    return stem


def _find(name: str, beside: Path | None) -> Path:
    given = expanded(name)
    if beside is not None and (beside / given).exists():
        return beside / given
    return given


def _expand(spec: str, beside: Path | None) -> list[str]:
    """The shards of one entry: a folder's archives, a pattern's expansions, or the entry itself."""
    from webdataset.shardlists import expand_urls

    number = prod(abs(int(last) - int(first)) + 1 for first, last in re.findall(r"\{(\d+)\.\.(\d+)\}", spec))
    if number > _MOST_SHARDS:
        raise UserError(f"data {spec!r}: the pattern stands for {number:,} shards; {_MOST_SHARDS:,} are the most")
    try:
        urls = expand_urls(spec)
    except (AssertionError, ValueError) as error:
        raise UserError(f"data {spec!r}: not a valid shard pattern ({error})") from error
    shards: list[str] = []
    for url in urls:
        if not is_local(url):
            shards.append(url)
            continue
        path = _find(url, beside)
        if path.is_dir():
            found = sorted(str(file) for file in path.iterdir() if file.name.endswith(_ARCHIVES))
            if not found:
                raise UserError(f"data {spec!r}: the folder {path} holds no {', '.join(_ARCHIVES)} files")
            shards += found
        elif path.is_file():
            shards.append(str(path))
        else:
            among = f" (one of {len(urls)} in the pattern)" if len(urls) > 1 else ""
            raise UserError(f"data {spec!r}: {path} does not exist{among}; correct the path")
    return shards


def _emoji(split: str) -> BuiltIn:
    from compt_megatron.data.emoji import emoji_index, emoji_shards

    shards = [str(path) for path in emoji_shards(split)]
    facts = emoji_index()["splits"][split]
    return shards, {shard: facts["shards"][Path(shard).name] for shard in shards}, facts["classes"]


# name -> (split -> its shards, their sizes by path, its class names); a new set is one module and one entry here
BUILT_IN: dict[str, Callable[[str], BuiltIn]] = {"emoji": _emoji}


def is_built_in(source: str) -> bool:
    """Whether `source` is `<name>/<split>` of a built-in set."""
    name, slash, _ = source.partition("/")
    return bool(slash) and name in BUILT_IN


def built_in(source: str) -> BuiltIn:
    """Shards of a built-in source, their sizes by path and the names of its classes. UserError for no such split."""
    name, _, split = source.partition("/")
    return BUILT_IN[name](split)


def _read_sizes(path: Path) -> dict[str, int]:
    value: dict[str, Any] = read_json(path)
    for shard, count in value.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise UserError(f"{path}: the size of {shard!r} must be a number of samples, not {count!r}")
    return value


def _read_classes(path: Path) -> list[str]:
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a readable list of class names ({error})") from error
    if len(set(names)) != len(names) or not names:
        raise UserError(f"{path}: must name each class once, one a line")
    return names


def _sizes(name: str, shards: list[str], known: dict[str, int], cache_dir: Path | None) -> list[int]:
    """Samples in each shard: as known, as recorded beside it, as cached, else counted (and cached)."""
    beside: dict[Path, dict[str, int]] = {}
    sizes: list[int | None] = []
    for shard in shards:
        size = known.get(shard, known.get(Path(shard).name))
        if size is None and is_local(shard):
            folder = Path(shard).parent
            if folder not in beside:
                beside[folder] = _recorded_sizes(folder)
            size = beside[folder].get(Path(shard).name, _img2dataset_size(shard))
        sizes.append(size)
    if any(size is None for size in sizes):
        _count_missing(name, shards, sizes, cache_dir)
    complete = [size for size in sizes if size is not None]
    assert len(complete) == len(shards)
    return complete


def _recorded_sizes(folder: Path) -> dict[str, int]:
    """What webdataset's `sizes.json` or the `index.json` of `compt data emoji` says about the shards of a folder."""
    if (folder / "sizes.json").is_file():
        return _read_sizes(folder / "sizes.json")
    if (folder / "index.json").is_file():
        splits = read_json(folder / "index.json").get("splits")
        if isinstance(splits, dict):
            return {shard: size for split in splits.values() for shard, size in split.get("shards", {}).items()}
    return {}


def _img2dataset_size(shard: str) -> int | None:
    stats = Path(shard).with_name(f"{_basename(shard)}_stats.json")
    size = read_json(stats).get("successes") if stats.is_file() else None
    return size if isinstance(size, int) else None


def _count_missing(name: str, shards: list[str], sizes: list[int | None], cache_dir: Path | None) -> None:
    digest = hashlib.sha256("\n".join(shards).encode()).hexdigest()[:16]
    path = None if cache_dir is None else cache_dir / f"sizes-{digest}.json"
    cached: dict[str, list[int]] = read_json(path) if path is not None and path.is_file() else {}
    for index, shard in enumerate(shards):
        if sizes[index] is not None:
            continue
        stat = os.stat(shard) if is_local(shard) else None
        stamp = [stat.st_size, stat.st_mtime_ns] if stat else [0, 0]
        if shard not in cached or cached[shard][1:] != stamp:
            size, reason = try_count(shard)
            if size is None:
                raise UserError(f"data {name!r}: shard {shard} is damaged or cut off ({reason}); replace it")
            cached[shard] = [size, *stamp]
        sizes[index] = cached[shard][0]
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        partial.write_text(json.dumps(cached), encoding="utf-8")
        os.replace(partial, path)
