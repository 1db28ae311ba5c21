"""Loading a recipe: find the file, parse it, apply the overrides, check it, anchor the files that it names."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml as pyyaml
from pydantic import ValidationError

from compt_megatron.errors import UserError
from compt_megatron.recipe import yaml
from compt_megatron.recipe.files import find_file, find_model_config, packaged_configs
from compt_megatron.recipe.overrides import apply_overrides
from compt_megatron.recipe.problems import Place, first_problem
from compt_megatron.recipe.schema import Member, Recipe


def load_recipe(path_or_name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a file, or the packaged one of that name, with `key=value` overrides applied.

    Files named in it that lie beside it are made absolute, so that the resolved recipe can be loaded from anywhere.
    Raises UserError, in one line, for the first thing that is wrong.
    """
    path = find_recipe(str(path_or_name))
    try:
        values = yaml.parse(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path_or_name}: cannot be read ({error})") from error
    except pyyaml.YAMLError as error:
        raise UserError(f"{path_or_name}: not valid YAML: {yaml.problem(error)}") from error
    return recipe_from(values, overrides, label=str(path_or_name), folder=path.parent)


def recipe_from(
    values: Any, overrides: Sequence[str] = (), *, label: str = "recipe", folder: Path | None = None
) -> Recipe:
    """The recipe that plain data `values` says; `label` names it in messages, `folder` is where its files are."""
    if not isinstance(values, dict):
        raise UserError(f"{label}: a recipe is a mapping of keys to values, not {type(values).__name__}")
    values, written = apply_overrides(values, list(overrides))
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        place, problem = first_problem(error, values)
        raise UserError(_message(label, place, problem, written)) from error
    return _anchored(recipe, label, folder)


def _message(label: str, place: Place, problem: str, written: dict[Place, str]) -> str:
    """One line that blames the override that wrote (part of) the wrong place, else the file."""
    if place in written:
        return f"{written[place]}: {problem}"
    blamed = [text for path, text in written.items() if place[: len(path)] == path or path[: len(place)] == place]
    where = ".".join(str(part) for part in place)
    return ": ".join(part for part in ((blamed or [label])[-1] if place else label, where, problem) if part)


def resolved(recipe: Recipe) -> str:
    """The recipe as YAML with every default written out. Loading it gives an equal recipe."""
    values = recipe.model_dump()
    for member in (*values["links"], *values["controls"]):
        for key in Member.model_fields:  # what a member overrides comes after what it is
            member[key] = member.pop(key)
    return yaml.dump(values)


def find_recipe(name: str) -> Path:
    """The file of a recipe: a path, or the name of a packaged one. Raises UserError naming the nearest."""
    for spelling in (name, f"recipes/{name}", f"recipes/{name}.yaml"):
        if (path := find_file(spelling)) is not None:
            return path
    if Path(name).is_dir():
        raise UserError(f"{name}: is a folder; name the recipe file in it")
    packaged = sorted(path.stem for path in (packaged_configs() / "recipes").glob("*.yaml"))
    near = difflib.get_close_matches(Path(name).stem, packaged, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else f"; the packaged recipes are {', '.join(packaged)}"
    raise UserError(f"{name}: no such recipe file{hint}")


def _anchored(recipe: Recipe, label: str, folder: Path | None) -> Recipe:
    """The recipe with absolute paths for what lies beside it; the model configs and `init` files must exist."""
    links = []
    for index, link in enumerate(recipe.links):
        changes = _anchored_sections(link, folder)
        try:
            found = find_model_config(link.model, folder)
        except UserError as error:
            raise UserError(f"{label}: links.{index}.model: {error}") from error
        if folder is not None and (folder / link.model).exists() and not _is_packaged(found, link.model):
            changes["model"] = str(found)
        if link.init is not None:
            changes["init"] = _beside(link.init, folder)
            if not Path(changes["init"]).exists():
                raise UserError(f"{label}: links.{index}.init: {link.init}: no such file or folder")
        links.append(link.model_copy(update=changes))
    controls = [control.model_copy(update=_anchored_sections(control, folder)) for control in recipe.controls]
    data = recipe.data.model_copy(update=_anchored_data(recipe.data.model_dump(include=_SOURCES), folder))
    evaluate = recipe.evaluate
    if evaluate.harness is not None and evaluate.harness.include is not None:
        harness = evaluate.harness.model_copy(update={"include": _beside(evaluate.harness.include, folder)})
        evaluate = evaluate.model_copy(update={"harness": harness})
    return recipe.model_copy(update={"links": links, "controls": controls, "data": data, "evaluate": evaluate})


def _anchored_sections(member: Member, folder: Path | None) -> dict[str, Any]:
    """The sections of a link or control that name files."""
    evaluate, harness = member.evaluate, member.evaluate.get("harness")
    if isinstance(harness, dict) and isinstance(harness.get("include"), str):
        evaluate = {**evaluate, "harness": {**harness, "include": _beside(harness["include"], folder)}}
    return {"data": _anchored_data(member.data, folder), "evaluate": evaluate}


def _is_packaged(found: Path, name: str) -> bool:
    return found == (packaged_configs() / name).resolve()


_SOURCES = {"train", "eval", "tokenizer"}  # the fields of `data` that name files


def _anchored_data(values: dict[str, Any], folder: Path | None) -> dict[str, Any]:
    return {key: _anchored_source(value, folder) if key in _SOURCES else value for key, value in values.items()}


def _anchored_source(source: Any, folder: Path | None) -> Any:
    if isinstance(source, list):
        return [_anchored_source(each, folder) for each in source]
    if isinstance(source, dict) and isinstance(source.get("path"), str):
        return {**source, "path": _beside(source["path"], folder)}
    return _beside(source, folder) if isinstance(source, str) else source


def _beside(source: str, folder: Path | None) -> str:
    """`source` as an absolute path if it, the index of the text that it is the prefix of, or the first file of its
    brace pattern lies in `folder`; else as given."""
    if folder is None or not source.strip() or ":" in source or Path(source).is_absolute():
        return source
    first = re.sub(r"\{([^{}]*?)(?:\.\.|,)[^{}]*\}", r"\1", source)
    try:
        found = (folder / first).exists() or (folder / f"{first}.idx").exists()
    except OSError as error:  # a name too long
        raise UserError(f"data source {source[:60]!r}: {error.strerror}; correct the path") from error
    return str(folder.resolve() / source) if found else source
