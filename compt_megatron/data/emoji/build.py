"""Renders the artists' drawings and writes them as the splits of the `emoji` data, the same bytes each time."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compt_megatron.data.emoji.builtin import SPLITS, builtin_emoji_dir
from compt_megatron.data.emoji.names import EmojiName
from compt_megatron.data.emoji.sources import ARTISTS, PACKAGES, Log, load_drawings, load_names
from compt_megatron.data.tar_writer import Sample, write_shard
from compt_megatron.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

HELD_OUT_ARTIST = "twemoji"
UNSEEN_PERCENT = 10
SHARDS = {"train": 16, "held_out_artist": 2, "unseen_names": 2}
SHUFFLE_SEED = 0
SIZES = range(8, 1025)


@dataclass(frozen=True)
class Drawing:
    """One drawing of one emoji: `svg` is its source text."""

    artist: str
    name: EmojiName
    svg: str

    @property
    def key(self) -> str:
        """The sample's key in its shard, unique in the data set."""
        return f"{self.artist}_{self.name.code}"


@dataclass(frozen=True)
class EmojiBuild:
    """What `build_emoji` wrote: the folder, samples by split, and bytes of all shards."""

    path: Path
    samples: dict[str, int]
    bytes: int


def build_emoji(dst: Path, size: int = 32, work_dir: Path | None = None, log: Log = print) -> EmojiBuild:
    """Make the `emoji` data with pictures of `size` x `size` pixels from the artists' own packages, in `dst`.

    `work_dir` keeps the downloaded packages (about 70 MB) and is looked into first; by default a temporary folder. The
    result appears at `dst` whole or not at all. The same packages, Pillow and zlib give the same bytes. Raises
    UserError: `dst` not empty, a size outside 8..1024, a missing client or renderer, a package that cannot be had.
    """
    if size not in SIZES:
        raise UserError(f"emoji size {size}: choose {SIZES.start} to {SIZES.stop - 1} pixels")
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise UserError(f"{dst}: exists and is not an empty folder; name another or delete it")
    dst = Path(os.path.abspath(dst))
    above = next(folder for folder in dst.parents if folder.exists())
    if not os.access(above, os.W_OK):
        raise UserError(f"{dst}: cannot be written there; choose another place")
    _require_renderer()
    with _folder(work_dir) as packages:
        names = load_names(packages, log)
        drawings = [
            Drawing(artist, names[key], svg)
            for artist in ARTISTS
            for key, svg in load_drawings(artist, packages, log).items()
            if key in names
        ]
    partial = dst.with_name(dst.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        index = _write_splits(split_drawings(drawings), partial, size, log)
        _copy_licences(partial)
        (partial / "index.json").write_text(json.dumps(index, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        if dst.exists():
            dst.rmdir()
        os.replace(partial, dst)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    samples = {split: sum(part["shards"].values()) for split, part in index["splits"].items()}
    return EmojiBuild(dst, samples, sum(path.stat().st_size for path in dst.glob("*.tar.gz")))


def is_unseen(code: str) -> bool:
    """Whether no artist's drawing of this emoji may be trained on: one name in ten, by a hash of its code alone."""
    return int(hashlib.sha256(code.encode()).hexdigest(), 16) % 100 < UNSEEN_PERCENT


def split_drawings(drawings: list[Drawing]) -> dict[str, list[Drawing]]:
    """Drawings by split, each split in a shuffled order that depends on nothing but the samples' keys."""
    trained = {drawing.name.code for drawing in drawings if drawing.artist != HELD_OUT_ARTIST}
    splits: dict[str, list[Drawing]] = {split: [] for split in SPLITS}
    for drawing in drawings:
        unseen, held_out = is_unseen(drawing.name.code), drawing.artist == HELD_OUT_ARTIST
        if not unseen and not held_out:
            splits["train"].append(drawing)
        elif held_out and unseen:
            splits["unseen_names"].append(drawing)
        elif held_out and drawing.name.code in trained:
            splits["held_out_artist"].append(drawing)
    for part in splits.values():
        part.sort(key=lambda drawing: hashlib.sha256(f"{SHUFFLE_SEED}/{drawing.key}".encode()).digest())
    return splits


def render(svg: str, size: int) -> Image:
    """An SVG text -> RGB picture [size, size] on white; a drawing that is not square is fitted and centred."""
    import resvg_py
    from PIL import Image, ImageOps

    encoded = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True)
    picture = Image.open(io.BytesIO(bytes(encoded))).convert("RGBA")
    if picture.size != (size, size):
        picture = ImageOps.pad(picture, (size, size), Image.Resampling.LANCZOS, color=(0, 0, 0, 0))
    white = Image.new("RGBA", (size, size), (255, 255, 255, 255))
    white.alpha_composite(picture)
    return white.convert("RGB")


def _sample(drawing: Drawing, size: int) -> Sample:
    """A drawing -> its shard members. Lossless WebP takes about two thirds of PNG's bytes for these pictures."""
    picture = io.BytesIO()
    render(drawing.svg, size).save(picture, "WEBP", lossless=True, quality=100, method=6)
    name = drawing.name
    facts = {
        "captions": name.captions,
        "name": name.name,
        "code": name.code,
        "artist": drawing.artist,
        "category": name.category,
    }
    text = json.dumps(facts, ensure_ascii=False).encode()
    return drawing.key, {"webp": picture.getvalue(), "json": text, "txt": name.name.encode()}


def _write_splits(splits: dict[str, list[Drawing]], folder: Path, size: int, log: Log) -> dict[str, Any]:
    """Write all shards into `folder`; return the index."""
    index: dict[str, Any] = {
        "format_version": 1,
        "size": size,
        "artists": list(ARTISTS),
        "held_out_artist": HELD_OUT_ARTIST,
        "sources": {package.name: {"version": package.version, "sha256": package.sha256} for package in PACKAGES},
        "splits": {},
    }
    for split, drawings in splits.items():
        counts: dict[str, int] = {}
        hashes: dict[str, str] = {}
        for number in range(SHARDS[split]):
            first, end = (len(drawings) * edge // SHARDS[split] for edge in (number, number + 1))
            path = folder / f"{split}-{number:05d}.tar.gz"
            counts[path.name] = write_shard(path, (_sample(drawing, size) for drawing in drawings[first:end]))
            hashes[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
            log(f"{path.name}: {counts[path.name]} samples, {path.stat().st_size} bytes")
        classes = sorted({drawing.name.name for drawing in drawings})
        index["splits"][split] = {"shards": counts, "sha256": hashes, "classes": classes}
    return index


def _copy_licences(folder: Path) -> None:
    """The pictures may be passed on only with these beside them."""
    shutil.copyfile(builtin_emoji_dir() / "LICENSES.md", folder / "LICENSES.md")
    shutil.copytree(builtin_emoji_dir() / "licenses", folder / "licenses", copy_function=shutil.copyfile)


def _require_renderer() -> None:
    for module, package in (("PIL", "pillow"), ("resvg_py", "resvg-py")):
        if find_spec(module) is None:
            raise UserError(f"rendering emoji needs {package}, which is not installed; run `pip install {package}`")


@contextmanager
def _folder(path: Path | None) -> Iterator[Path]:
    if path is None:
        with tempfile.TemporaryDirectory(prefix="compt-emoji-") as temporary:
            yield Path(temporary)
    else:
        path.mkdir(parents=True, exist_ok=True)
        yield path.resolve()
