"""What is wrong with a recipe, in one line that names the place, the mistake and the nearest valid key."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Required, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from typing_extensions import is_typeddict

from compt_megatron.recipe.schema import SECTIONS, Member, Misfit, Recipe

Place = tuple[str | int, ...]  # from the top of the recipe to one value
_PLAIN = {int: "an integer", float: "a number", str: "text", bool: "true or false", type(None): "null"}
_SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def first_problem(error: ValidationError, given: Any) -> tuple[Place, str]:
    """The first mistake that `error` holds: its path in the recipe `given` (plain data) and what is wrong there."""
    problems = list(_unfold(error, given, ()))
    # An unknown key first: it is usually the misspelling of one that is then reported as missing.
    path, kind, text = min(problems, key=lambda item: item[1] != "extra_forbidden")
    if kind == "extra_forbidden":
        return path, "unknown key" + _hint(path)
    if kind == "missing":
        return path, f"is missing; give {describe(annotation_at(path))}"
    if kind in ("value_error", "misfit"):
        return path, text
    expected = describe(annotation_at(path))
    value = _value_at(given, path)
    return path, f"needs {expected}, not {_shown(value)}"


def _unfold(error: ValidationError, given: Any, prefix: Place) -> Iterator[tuple[Place, str, str]]:
    """(path, kind, message) of every mistake, those of merged sections put back where their override stands."""
    for item in error.errors(include_url=False):
        path = prefix + _plain_path(item["loc"], _value_at(given, prefix))
        cause = item.get("ctx", {}).get("error")
        if isinstance(cause, Misfit):
            if isinstance(cause.cause, ValidationError):
                yield from _unfold(cause.cause, given, path + cause.path)
            else:
                yield path + cause.path, "misfit", cause.cause
        else:
            yield path, item["type"], str(cause or item["msg"])


def _plain_path(loc: Place, given: Any) -> Place:
    """`loc` without the parts that name a branch of a union instead of a place in the data."""
    path: list[str | int] = []
    for position, part in enumerate(loc):
        if isinstance(given, dict) and (part in given or position == len(loc) - 1):
            path.append(part)
            given = given.get(part)
        elif isinstance(given, list) and isinstance(part, int) and part < len(given):
            path.append(part)
            given = given[part]
    return tuple(path)


def _value_at(given: Any, path: Place) -> Any:
    for part in path:
        if isinstance(given, dict):
            given = given.get(part)  # type: ignore[arg-type]
        elif isinstance(given, list) and isinstance(part, int) and part < len(given):
            given = given[part]
        else:
            return None
    return given


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, dict):
        return "a section"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _hint(path: Place) -> str:
    valid = sorted(keys_at(path[:-1]))
    near = difflib.get_close_matches(str(path[-1]), valid, n=1, cutoff=0.5)
    if near:
        return f"; did you mean {near[0]!r}?"
    elsewhere = [dotted for dotted in _all_paths() if dotted.split(".")[-1] == path[-1]]
    if elsewhere:
        return (
            f"; it belongs to {elsewhere[0].rpartition('.')[0]!r}" if "." in elsewhere[0] else "; it belongs to the top"
        )
    return f"; valid here: {', '.join(valid)}" if valid else ""


def _all_paths() -> list[str]:
    paths: list[str] = []
    for key, field in Recipe.model_fields.items():
        paths.append(key)
        inner = _model_of(field.annotation)
        if inner is not None:
            paths += [f"{key}.{name}" for name in _fields(inner)]
    return paths


def keys_at(path: Place) -> set[str]:
    """The keys that are valid at `path` of a recipe; empty where no section is there."""
    inner = _model_of(annotation_at(path)) if path else Recipe
    return set(_fields(inner)) if inner is not None else set()


def annotation_at(path: Place) -> Any:
    """The declared type of the field at `path`; None where the schema has no such place."""
    here: Any = Recipe
    for part in path:
        model = _model_of(here, lists=False)
        if isinstance(part, int):
            here = _element(here)
        elif model is not None and part in _fields(model):
            is_override = isinstance(model, type) and issubclass(model, Member) and part in SECTIONS
            here = SECTIONS[part] if is_override else _fields(model)[part]
        else:
            return None
    return here


def _fields(model: Any) -> dict[str, Any]:
    if is_typeddict(model):
        return get_type_hints(model, include_extras=True)
    return {name: annotated(field) for name, field in model.model_fields.items()}


def annotated(field: FieldInfo) -> Any:
    return Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation


def _members(annotation: Any) -> list[Any]:
    """The branches of a union, or the annotation alone."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _members(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [branch for member in get_args(annotation) for branch in _members(member)]
    return [annotation]


def _element(annotation: Any) -> Any:
    for branch in _members(annotation):
        if get_origin(branch) is list:
            return get_args(branch)[0]
    return None


def _model_of(annotation: Any, lists: bool = True) -> Any:
    for branch in _members(annotation):
        if is_typeddict(branch) or (isinstance(branch, type) and issubclass(branch, BaseModel)):
            return branch
        if lists and get_origin(branch) is list:
            return _model_of(get_args(branch)[0])
    return None


def describe(annotation: Any) -> str:
    """A declared type in words, limits included: "an integer >= 1 or null"."""
    origin = get_origin(annotation)
    if origin is Required:
        return describe(get_args(annotation)[0])
    if origin is Annotated:
        base, *metadata = get_args(annotation)
        return describe(base) + _limits(metadata, get_origin(base) is list)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(branch) for branch in get_args(annotation))
    if origin is Literal:
        values = [str(value) for value in get_args(annotation)]
        return f"one of {', '.join(values)}" if len(values) > 1 else values[0]
    if origin is list:
        (element,) = get_args(annotation)
        plain = _model_of(element) is None or len(_members(element)) > 1
        return "a list" + (f" (each {describe(element)})" if plain else "")
    if _model_of(annotation) is not None or annotation is dict or origin is dict:
        return "a section"
    return _PLAIN.get(annotation, "a value")


def _limits(metadata: list[Any], is_list: bool) -> str:
    limits = [limit for item in metadata for limit in (getattr(item, "metadata", None) or [item])]
    found = {
        name: bound
        for limit in limits
        for name in ("ge", "gt", "le", "lt", "min_length", "max_length", "pattern")
        if (bound := getattr(limit, name, None)) is not None
    }
    words = [f"{sign} {found[name]}" for name, sign in _SIGNS.items() if name in found]
    if is_list and "min_length" in found:
        exact = found["min_length"] == found.get("max_length")
        words.append(f"of {'exactly' if exact else 'at least'} {found['min_length']}")
    if "pattern" in found:
        words.append(f"like {found['pattern']}")
    return " " + " and ".join(words) if words else ""
