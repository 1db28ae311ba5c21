"""Reading and writing the YAML of recipes: a key given twice is an error, and 1e-3 is a number."""

from __future__ import annotations

import re
from typing import Any

import yaml


class RepeatedKey(yaml.YAMLError):
    """A mapping gives the same key twice."""

    def __init__(self, key: Any, line: int):
        super().__init__(f"line {line}: key {key!r} is given twice; remove one")


class _Loader(yaml.SafeLoader):
    pass


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":
            continue
        key = loader.construct_object(key_node, deep=True)  # type: ignore[no-untyped-call]
        if isinstance(key, str | int | float | bool | None) and key in seen:
            raise RepeatedKey(key, key_node.start_mark.line + 1)
        seen.add(key if isinstance(key, str | int | float | bool | None) else repr(key))
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


# PyYAML follows YAML 1.1, where 1e-3 is a string for want of a point; scientists write it as a number.
_Loader.yaml_implicit_resolvers = {key: list(value) for key, value in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(  # type: ignore[no-untyped-call]
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)
_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def parse(text: str) -> Any:
    """The value that YAML `text` holds. Raises yaml.YAMLError, also for a key that is given twice."""
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except ValueError as error:  # a date that does not exist, a number of thousands of digits
        raise yaml.YAMLError(f"a value cannot be understood ({error})") from error
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None


def dump(value: Any) -> str:
    """`value` as YAML, keys in the given order, short lists on one line."""
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=110, default_flow_style=None)


def problem(error: yaml.YAMLError) -> str:
    """What is wrong with a YAML text, in one line."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    return " ".join(str(error).split())
