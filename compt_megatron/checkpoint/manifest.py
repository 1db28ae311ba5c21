"""compt.json: what a checkpoint of ours says about itself. The schema is in docs/checkpoint.md."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import xxhash

from compt_megatron.checkpoint.contract import TensorInfo, dtype_name, dtype_of
from compt_megatron.errors import UserError
from compt_megatron.spec.families import spec_from_config
from compt_megatron.spec.table import ModelSpec

MANIFEST = "compt.json"
FORMAT_VERSION = 2  # since 2, checksums are those of sums.py; in version 1 a file has one for all its bytes
_READABLE = (1, FORMAT_VERSION)

_WRITTEN_BY_US = ("format_version", "created_by", "format", "spec", "tensors", "files", "checksums", "self")
_NOT_KEPT = ("attachments",)  # where the files lie that go beside the weights: no matter of the checkpoint
_ALWAYS: dict[str, Any] = {"layout": None, "certificate": None, "lineage": [], "train": None, "notes": []}


def manifest_path(path: Path) -> Path:
    """compt.json of a checkpoint: inside a folder, or `<file>.compt.json` beside a file."""
    return path / MANIFEST if path.is_dir() else path.with_name(f"{path.name}.{MANIFEST}")


def make_manifest(
    format_name: str,
    spec: ModelSpec,
    tensors: dict[str, TensorInfo],
    files: list[tuple[str, str, int]],
    metadata: dict[str, Any],
) -> dict[str, Any]:
    """The content of compt.json: what the caller gives in `metadata`, and what only the writer knows.

    `files`: (name, checksum, bytes) of every other file. Entries of `metadata` that belong to the writer are replaced,
    so that the metadata of a source can be handed to the writer of its copy.
    """
    given = {key: value for key, value in metadata.items() if key not in (*_WRITTEN_BY_US, *_NOT_KEPT)}
    return {
        "format_version": FORMAT_VERSION,
        "created_by": f"compt_megatron {_version()}",
        "format": format_name,
        "spec": {"name": spec.name, "family": spec.family, "config": spec.config, "digest": spec.digest},
        **_ALWAYS,
        **given,
        "tensors": {name: [dtype_name(info.dtype), list(info.shape)] for name, info in sorted(tensors.items())},
        "files": {name: size for name, _, size in sorted(files)},
        "checksums": {name: digest for name, digest, _ in sorted(files)},
    }


def _version() -> str:
    try:
        return version("compt_megatron")
    except PackageNotFoundError:  # a source tree that was not installed
        return "source"


def _own_hash(content: dict[str, Any]) -> str:
    rest = {key: value for key, value in content.items() if key != "self"}
    return xxhash.xxh3_64(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def manifest_bytes(content: dict[str, Any]) -> bytes:
    """compt.json as it lies on disk; its entry `self` is the hash of all others."""
    plain = json.loads(json.dumps(content))  # what JSON makes of tuples and keys is what the hash must cover
    return (json.dumps({**plain, "self": _own_hash(plain)}, indent=1) + "\n").encode()


def read_manifest(path: Path) -> dict[str, Any] | None:
    """The checked compt.json of checkpoint `path`, or None if there is none.

    Raises UserError if it is damaged or was written by a newer version.
    """
    file = manifest_path(path)
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_bytes())
        found = content["format_version"]
        if not isinstance(found, int) or isinstance(found, bool):
            raise TypeError
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{file}: damaged, not a compt.json; restore the checkpoint from a copy") from error
    if found not in _READABLE:
        raise UserError(
            f"{file}: format_version {found} is not supported (here: {FORMAT_VERSION}); update compt_megatron"
        )
    if content.get("self") != _own_hash(content):
        raise UserError(f"{file}: its content does not match its own checksum; restore the checkpoint from a copy")
    if not _well_formed(content):
        raise UserError(f"{file}: lacks entries that compt.json must have; restore the checkpoint from a copy")
    return content


def _well_formed(content: dict[str, Any]) -> bool:
    """Whether the entries that readers rely on are there in their types; the checksum shows damage, not forgery."""
    if not all(isinstance(content.get(key), dict) for key in ("spec", "files", "checksums", "tensors")):
        return False
    spec, files, sums = content["spec"], content["files"], content["checksums"]
    if files.keys() != sums.keys() or not all(type(size) is int for size in files.values()):
        return False
    try:
        recorded_tensors(content)
    except (ValueError, TypeError):
        return False
    return isinstance(spec.get("config"), dict) and isinstance(spec.get("name"), str)


def recorded_spec(content: dict[str, Any] | None, given: ModelSpec | None, path: Path) -> ModelSpec | None:
    """The model of a checkpoint: as recorded in compt.json, which must agree with a `given` one.

    Raises UserError if it is the checkpoint of another model.
    """
    if content is None:
        return given
    recorded = spec_from_config(content["spec"]["config"], content["spec"]["name"])
    if given is not None and given.digest != recorded.digest:
        raise UserError(
            f"{path}: checkpoint of another model: it holds '{recorded.name}' ({recorded.digest}), "
            f"not '{given.name}' ({given.digest}); name the right checkpoint or model config"
        )
    return recorded


def under_name(manifest: dict[str, Any] | None, name: str) -> dict[str, Any] | None:
    """The record of a single file under the name that the file has now: it may have been renamed with its record."""
    if manifest is None or len(manifest["files"]) != 1:
        return manifest
    (size,), (digest,) = manifest["files"].values(), manifest["checksums"].values()
    return {**manifest, "files": {name: size}, "checksums": {name: digest}}


def recorded_tensors(content: dict[str, Any]) -> dict[str, TensorInfo]:
    """The tensors that compt.json says were written."""
    return {name: TensorInfo(tuple(shape), dtype_of(dtype)) for name, (dtype, shape) in content["tensors"].items()}
