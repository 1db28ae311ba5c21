"""docs/recipe.md, written from the schema: `python -m compt_megatron.recipe.document > docs/recipe.md`."""

from __future__ import annotations

import inspect
import json
from typing import Any, Required, get_args, get_origin, get_type_hints

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from compt_megatron.recipe.data_section import Augmentation, DataSettings, TextData
from compt_megatron.recipe.link_sections import AlignSettings, DistillSettings, GrowSettings
from compt_megatron.recipe.parallel_section import ParallelSettings
from compt_megatron.recipe.problems import annotated, describe
from compt_megatron.recipe.schema import Control, Link, Member, Recipe
from compt_megatron.recipe.sections import (
    CheckpointSettings,
    EvaluateSettings,
    HarnessSettings,
    ObjectiveSettings,
    OptimizerSettings,
    ReportSettings,
)

_INTRO = """# Recipes

<!-- written by `python -m compt_megatron.recipe.document`: change compt_megatron/recipe, not this page -->

A recipe is one YAML file that says everything about a chain run. `compt train RECIPE` takes the path of one, or the
name of a packaged one (`emoji`, `cc3m`, `cc3m-seven`, `merged15m`, `stdlib-lm`, `gpt3-6.7b`, `llama-8b`,
`vit-h`, `vit-g`, `vit-bigg`, `vit-e`, `vit-22b`). This is the packaged demo, shortened:

```yaml
name: emoji-clip
data: {train: emoji/train, eval: [emoji/held_out_artist], batch_size: 256}
optimizer: {lr: 1.0e-3, warmup_steps: 50}
links:
  - {model: models/clip-emoji-s.json, name: s, epochs: 24}
  - {model: models/clip-emoji-m.json, name: m, epochs: 8, grow: {operator: exact}, align: {weight: 0.3}}
controls:
  - {link: m}
```

- **Strict**: an unknown key, a key given twice or a value of the wrong type is an error before anything starts. The
  message names the file, the path in it, and the nearest valid key.
- **Overrides**: `compt train RECIPE links.2.epochs=4 parallel.zero=2` sets any field by its dotted path. Values are
  YAML; entries of lists are numbered from 0, links and controls may be named (`links.m.epochs=4`). A section that is
  not there is made.
- **Per link**: a link may set any field of `objective`, `data`, `optimizer`, `parallel` and `evaluate`, and
  `precision` and `seed`, for itself alone. A control takes its link's settings, then its own.
- **Files** that a recipe names are looked for beside it, then in the working directory (data) or among the packaged
  configs and open_clip's model names (models).
- `compt train RECIPE --print-recipe` prints the recipe with every default; the result is a recipe that means the same.
"""

_SECTIONS: list[tuple[str, type[BaseModel], str]] = [
    ("objective", ObjectiveSettings, ""),
    ("data", DataSettings, ""),
    ("optimizer", OptimizerSettings, ""),
    ("parallel", ParallelSettings, ""),
    ("evaluate", EvaluateSettings, ""),
    ("evaluate.harness", HarnessSettings, ""),
    ("checkpoint", CheckpointSettings, ""),
    ("report", ReportSettings, ""),
    (
        "links",
        Link,
        "A list, smallest model first. The fields from `objective` on that `controls` has, links have too.",
    ),
    ("links.*.grow", GrowSettings, ""),
    ("links.*.align", AlignSettings, ""),
    ("links.*.distill", DistillSettings, ""),
    ("controls", Control, "A list; may be left out."),
]


def markdown() -> str:
    """The whole page."""
    parts = [_INTRO, "## Top level\n", _table(Recipe)]
    for path, model, more in _SECTIONS:
        lines = [line for line in (inspect.getdoc(model), more) if line]
        parts += [f"## `{path}`\n", "\n".join(lines) + "\n", _table(model, own=model is Link)]
        if model is DataSettings:
            parts += ["## `data.augment`\n", (inspect.getdoc(Augmentation) or "") + "\n"]
            parts += [_dictionary_table(Augmentation, "open_clip's")]
            parts += ["## `data.train.*`\n", (inspect.getdoc(TextData) or "") + "\n", _dictionary_table(TextData, "")]
    return "\n".join(parts)


def _table(model: type[BaseModel], own: bool = False) -> str:
    fields = dict(model.model_fields)
    shared = {name: fields.pop(name) for name in Member.model_fields if name in fields}
    rows = fields if own else fields | shared
    return _rows(
        [(name, describe(annotated(field)), _default(field), field.description or "") for name, field in rows.items()]
    )


def _dictionary_table(kind: Any, default: str) -> str:
    """The table of a TypedDict whose fields have `default`, those that are required none."""
    rows = []
    for name, hint in get_type_hints(kind, include_extras=True).items():
        required = get_origin(hint) is Required
        hint = get_args(hint)[0] if required else hint
        text = next(item.description for item in get_args(hint) if isinstance(item, FieldInfo) and item.description)
        rows.append((name, describe(hint), "required" if required else default, text))
    return _rows(rows)


def _rows(rows: list[tuple[str, str, str, str]]) -> str:
    lines = ["| field | value | default | meaning |", "| --- | --- | --- | --- |"]
    lines += [f"| `{name}` | {kind} | {default} | {text} |" for name, kind, default, text in rows]
    return "\n".join(lines) + "\n"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "see meaning" if "default:" in (field.description or "") else "required"
    value: Any = field.get_default(call_default_factory=True, validated_data={})
    if isinstance(value, BaseModel):
        return "its defaults"
    return "" if value is PydanticUndefined else f"`{json.dumps(value)}`"


if __name__ == "__main__":
    print(markdown(), end="")
