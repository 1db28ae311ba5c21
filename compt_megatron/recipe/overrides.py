"""`key=value` on the command line: any field of a recipe by its dotted path."""

from __future__ import annotations

import copy
from typing import Any

import yaml as pyyaml

from compt_megatron.errors import UserError
from compt_megatron.recipe import yaml
from compt_megatron.recipe.files import model_stem
from compt_megatron.recipe.problems import Place


def apply_overrides(recipe: dict[str, Any], overrides: list[str]) -> tuple[dict[str, Any], dict[Place, str]]:
    """A copy of `recipe` (plain data) with every `path=value` set, and which path each override wrote.

    Values are YAML. List entries are given by index from 0; links and controls also by their name. Whether the keys
    exist is for the schema to say. Raises UserError for what cannot be parsed or has no place.
    """
    recipe = copy.deepcopy(recipe)
    written: dict[Place, str] = {}
    for override in overrides:
        dotted, equals, text = override.partition("=")
        if not equals or not dotted:
            raise UserError(f"{override!r}: an override is written key=value, such as links.2.epochs=4")
        try:
            value = yaml.parse(text)
        except pyyaml.YAMLError as error:
            raise UserError(f"{override}: the value is not YAML ({yaml.problem(error)})") from error
        written[_set(recipe, dotted.split("."), value, override)] = override
    return recipe, written


def _set(recipe: dict[str, Any], parts: list[str], value: Any, override: str) -> Place:
    path: list[str | int] = []
    here: Any = recipe
    for position, part in enumerate(parts):
        last = position == len(parts) - 1
        if isinstance(here, list):
            index = _index(here, part, ".".join(str(part) for part in path), override)
            path.append(index)
            if last:
                here[index] = value
            elif not isinstance(here[index], dict | list):
                raise UserError(f"{override}: {'.'.join(str(part) for part in path)} is a value, not a section")
            here = here[index]
        elif isinstance(here, dict):
            path.append(part)
            if last:
                here[part] = value
            elif here.get(part) is None:
                here[part] = {}
            here = here[part]
        else:
            raise UserError(f"{override}: {'.'.join(str(part) for part in path)} is a value, not a section")
    return tuple(path)


def _index(entries: list[Any], part: str, where: str, override: str) -> int:
    if part.isascii() and part.isdigit():
        if int(part) < len(entries):
            return int(part)
        raise UserError(f"{override}: {where} has {len(entries)} entries, numbered from 0 to {len(entries) - 1}")
    names = [_name(entry) for entry in entries]
    if part in names:
        return names.index(part)
    raise UserError(
        f"{override}: {where} has no entry {part!r}; use a number from 0 or one of {[n for n in names if n]}"
    )


def _name(entry: Any) -> str | None:
    if not isinstance(entry, dict):
        return None
    if isinstance(entry.get("name"), str):
        return entry["name"]
    if isinstance(entry.get("model"), str):
        return model_stem(entry["model"])
    return f"{entry['link']}-alone" if isinstance(entry.get("link"), str) else None
