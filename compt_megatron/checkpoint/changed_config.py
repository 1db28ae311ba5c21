"""What a changed model config beside the weights says that compt.json does not: checksums see only that it changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from compt_megatron.errors import UserError
from compt_megatron.recipe.files import read_json
from compt_megatron.spec.families import spec_from_config

_CONFIGS = ("config.json", "open_clip_config.json")
_LONGEST = 60  # letters of a value that are shown

Leaf = tuple[str, ...]  # the keys that lead to a value of a config


def changed_config(path: Path, manifest: dict[str, Any]) -> str:
    """What is wrong with config file `path` where it has not the bytes that were written; `manifest`: the content of
    compt.json. "" for another file, and for one that is no JSON object."""
    if path.name not in _CONFIGS:
        return ""
    try:
        found = read_json(path)
    except UserError:
        return ""
    recorded = manifest["spec"]["config"]
    here, there = _leaves(_model(found)), _leaves(_model(recorded))
    fields = [leaf for leaf in sorted(here.keys() | there.keys()) if here.get(leaf, ...) != there.get(leaf, ...)]
    changing = [leaf for leaf in fields if not _same_model(recorded, leaf, here)]
    if not changing and _same(found, recorded):
        return "changed since it was written, though still a config of the same model"
    first, *others = changing or fields
    said = f"is {_shown(here, first, 'missing')} where compt.json has {_shown(there, first, 'none')}"
    more = f" (and {len(others)} more)" if others else ""
    return f"changed since it was written, the config of another model: '{'.'.join(first)}' {said}{more}"


def _model(config: dict[str, Any]) -> dict[str, Any]:
    inner = config.get("model_cfg")  # as open_clip wraps it
    return inner if isinstance(inner, dict) else config


def _leaves(config: dict[str, Any], above: Leaf = ()) -> dict[Leaf, Any]:
    leaves: dict[Leaf, Any] = {}
    for key, value in config.items():
        leaf = (*above, key)
        leaves |= _leaves(value, leaf) if isinstance(value, dict) and value else {leaf: value}
    return leaves


def _shown(leaves: dict[Leaf, Any], leaf: Leaf, absent: str) -> str:
    if leaf not in leaves:
        return absent
    text = json.dumps(leaves[leaf])
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _same_model(recorded: dict[str, Any], leaf: Leaf, here: dict[Leaf, Any]) -> bool:
    """Whether the recorded config, with this one field as the file has it, is one of the same model."""
    changed = json.loads(json.dumps(_model(recorded)))
    inner = changed
    for key in leaf[:-1]:
        if not isinstance(inner.get(key), dict):
            inner[key] = {}
        inner = inner[key]
    if leaf in here:
        inner[leaf[-1]] = here[leaf]
    else:
        inner.pop(leaf[-1], None)
    return _same(changed, recorded)


def _same(config: dict[str, Any], recorded: dict[str, Any]) -> bool:
    try:
        return spec_from_config(config, "changed").digest == spec_from_config(recorded, "recorded").digest
    except UserError:
        return False
