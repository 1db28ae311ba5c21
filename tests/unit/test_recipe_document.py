"""docs/recipe.md is what the schema says now, and docs/commands.md names every command and option."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import BaseModel

from compt_megatron import cli
from compt_megatron.recipe import sections
from compt_megatron.recipe.document import markdown
from compt_megatron.recipe.schema import Control, Link, Recipe

DOCS = Path(__file__).parents[2] / "docs"
SECTIONS = [
    value for value in vars(sections).values() if isinstance(value, type) and issubclass(value, sections.Section)
]


def test_the_recipe_page_is_current() -> None:
    written = (DOCS / "recipe.md").read_text(encoding="utf-8")
    assert written == markdown(), "run: python -m compt_megatron.recipe.document > docs/recipe.md"


@pytest.mark.parametrize("model", [Recipe, Link, Control, *SECTIONS], ids=lambda model: model.__name__)
def test_every_field_is_described(model: type[BaseModel]) -> None:
    for name, field in model.model_fields.items():
        assert field.description, f"{model.__name__}.{name} has no description"
        assert f"| `{name}` |" in markdown()


def test_every_command_and_option_is_documented() -> None:
    page = (DOCS / "commands.md").read_text(encoding="utf-8")
    commands = cli.build_parser().commands
    assert commands is not None
    for name, parser in commands.parsers.items():
        start = page.index(f"## compt {name}\n")
        section = page[start : page.find("\n## ", start + 1)]
        inner = parser.commands.parsers if parser.commands else {}
        for action in [action for one in (parser, *inner.values()) for action in one._actions]:
            if action.option_strings and not {"-h", "--debug"} & set(action.option_strings):
                assert f"`{action.option_strings[0]}" in section, f"{name} {action.option_strings[0]}"
        for command in inner.values():
            assert f"\n`{command.prog} " in section
