"""Reading recipes from YAML and overriding their fields from the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from compt_megatron.errors import UserError
from compt_megatron.recipe import yaml
from compt_megatron.recipe.load import load_recipe

TEXT = """
name: tiny
data: {train: emoji/train, batch_size: 256}
optimizer: {lr: 1e-3, eps: 1E-6, warmup_steps: 100}
links:
  - {model: compt-ViT-T-16, epochs: 24}
  - {model: compt-ViT-S-16, name: s, epochs: 8, grow: {}}
  - {model: compt-ViT-B-16, name: b, epochs: 4, grow: {}, align: null}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "tiny.yaml"
    file.write_text(TEXT)
    return file


def test_scientific_notation_is_a_number(path: Path) -> None:
    recipe = load_recipe(path, ["optimizer.final_lr=2e-5"])
    assert (recipe.optimizer.lr, recipe.optimizer.eps, recipe.optimizer.final_lr) == (1e-3, 1e-6, 2e-5)
    assert yaml.parse("[1e3, -1.5e-3, .5e1, 12, e3, 1e]") == [1000.0, -0.0015, 5.0, 12, "e3", "1e"]


@pytest.mark.parametrize("text", ["a: 1\nb: 2\na: 3", "top: {x: 1, x: 2}", "- {y: 1, z: 2, y: 1}"])
def test_a_key_given_twice_is_an_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UserError, match=r"line \d: key '\w' is given twice"):
        load_recipe(tmp_path / "r.yaml")


def test_overrides_by_index_by_name_and_into_absent_sections(path: Path) -> None:
    recipe = load_recipe(
        path,
        [
            "links.2.epochs=6",
            "links.s.align.weight=0.5",
            "links.b.parallel.tensor=2",
            "data.eval=[x, y]",
            "data.eval.1=z",
        ],
    )
    assert recipe.links[2].epochs == 6
    assert recipe.links[1].align is not None
    assert recipe.links[1].align.weight == 0.5
    assert recipe.link_settings("b").parallel.tensor == 2
    assert recipe.data.eval == ["x", "z"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("links.2.aling=1", "links.2.aling=1: unknown key; did you mean 'align'?"),
        ("links.2.align.wieght=1", "links.2.align.wieght=1: unknown key; did you mean 'weight'?"),
        ("links.3.epochs=1", "links.3.epochs=1: links has 3 entries, numbered from 0 to 2"),
        ("links.q.epochs=1", "links has no entry 'q'; use a number from 0 or one of"),
        ("links.0.epochs.x=1", "links.0.epochs is a value, not a section"),
        ("links.0.epochs=four", "links.0.epochs=four: needs a number > 0 or null, not 'four'"),
        ("links.2.steps=5", "links.2.steps=5: links.2: give exactly one of 'epochs' and 'steps'"),
        ("links.1.name=b", "links.2.name: the name 'b' is taken"),
        ("data.augment={scal: 1}", "data.augment={scal: 1}: data.augment.scal: unknown key"),
        ("optimizer", "'optimizer': an override is written key=value"),
        ("seed=[1", "seed=[1: the value is not YAML"),
    ],
)
def test_a_wrong_override_is_one_line_that_names_it(path: Path, override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe(path, [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_mistake_of_the_file_is_not_blamed_on_an_override(path: Path) -> None:
    path.write_text(TEXT.replace("captions", "captoins").replace("batch_size", "batchsize"))
    with pytest.raises(UserError, match=r"tiny.yaml: data.batchsize: unknown key"):
        load_recipe(path, ["links.0.epochs=3"])


def test_a_missing_recipe_names_the_nearest() -> None:
    with pytest.raises(UserError, match="no such recipe file"):
        load_recipe("emojy")


@pytest.mark.parametrize("text", ["- 1", "a: [", "\t- x", "3"])
def test_what_is_no_recipe_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        load_recipe(tmp_path / "r.yaml")
    assert "r.yaml: " in str(caught.value)
    assert "\n" not in str(caught.value)
