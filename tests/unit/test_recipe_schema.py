"""What a recipe may say, what its links inherit, and that printing one loses nothing."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from compt_megatron.errors import UserError
from compt_megatron.recipe.load import load_recipe, recipe_from, resolved
from compt_megatron.recipe.schema import Recipe

BASE: dict[str, Any] = {
    "name": "tiny",
    "data": {"train": "emoji/train", "batch_size": 256},
    "optimizer": {"lr": 0.001, "warmup_steps": 100},
    "links": [
        {"model": "compt-ViT-T-16", "epochs": 24},
        {"model": "models/compt-ViT-S-16.json", "name": "s", "epochs": 8, "grow": {}, "align": {"weight": 1}},
        {
            "model": "compt-ViT-B-16",
            "name": "b",
            "steps": 60,
            "grow": {"operator": "corner"},
            "parallel": {"tensor": 2},
        },
    ],
    "controls": [{"link": "b"}],
}


def changed(**paths: Any) -> dict[str, Any]:
    """BASE with values set at dotted paths (written with two underscores)."""
    values = copy.deepcopy(BASE)
    for dotted, value in paths.items():
        *parents, last = [int(part) if part.isdigit() else part for part in dotted.split("__")]
        here: Any = values
        for part in parents:
            here = here[part]
        here[last] = value
    return values


def test_defaults_are_filled_in() -> None:
    recipe = recipe_from(BASE)
    assert [link.name for link in recipe.links] == ["compt-ViT-T-16", "s", "b"]
    assert recipe.controls[0].name == "b-alone"
    assert recipe.controls[0].compute == "chain"
    assert recipe.optimizer.betas == [0.9, 0.98]
    assert recipe.links[1].align is not None
    assert recipe.links[1].align.weight == 1.0


def test_link_settings_are_the_recipes_with_the_links_over_them() -> None:
    values = changed(
        data__augment={"scale": [0.5, 1.0]},
        links__1__data={"captions": 3, "augment": {"ratio": [0.9, 1.1]}},
        links__2__optimizer={"lr": 0.0005},
        links__2__precision="bf16",
        links__2__seed=7,
        controls__0__optimizer={"warmup_steps": 9},
    )
    recipe = recipe_from(values)
    assert recipe.link_settings("s").data.captions == 3
    assert recipe.link_settings(1).data.augment == {"scale": [0.5, 1.0], "ratio": [0.9, 1.1]}
    assert recipe.link_settings(0).data == recipe.data
    assert recipe.link_settings(2).parallel.tensor == 2
    assert recipe.link_settings(2).precision == "bf16"
    assert recipe.link_settings(2).seed == 7
    control = recipe.control_settings(0)
    assert (control.optimizer.lr, control.optimizer.warmup_steps, control.parallel.tensor) == (0.0005, 9, 2)


def test_a_printed_recipe_loads_to_an_equal_one(tmp_path: Path) -> None:
    values = changed(
        data__augment={"scale": [0.5, 1.0], "color_jitter": 0.4},
        data__train=["a.tar", "b.tar"],
        optimizer__eps=1e-8,
        links__1__grow={"axes": {"mlp": "append"}, "depth": "stack"},
        links__2__evaluate={"every_epochs": 0.5},
    )
    recipe = recipe_from(values)
    (tmp_path / "printed.yaml").write_text(resolved(recipe))
    again = load_recipe(tmp_path / "printed.yaml")
    assert again == recipe
    assert again.digest == recipe.digest
    assert resolved(again) == resolved(recipe)
    printed = yaml.safe_load(resolved(recipe))
    assert set(printed) == set(Recipe.model_fields)
    assert all(set(link) == set(type(recipe.links[0]).model_fields) for link in printed["links"])


def test_digest_follows_every_value() -> None:
    assert recipe_from(BASE).digest == recipe_from(changed(data__captions=1)).digest
    assert recipe_from(BASE).digest != recipe_from(changed(data__captions=2)).digest


def test_files_beside_the_recipe_become_absolute_and_packaged_names_stay(tmp_path: Path) -> None:
    model = (Path(__file__).parents[2] / "configs/models/compt-ViT-T-16.json").read_text()
    (tmp_path / "mine.json").write_text(model)
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/000.tar").write_bytes(b"")
    (tmp_path / "start.pt").write_bytes(b"")
    values = changed(
        links__0__model="mine.json",
        links__0__init="start.pt",
        data__train="shards/{000..003}.tar",
        data__eval=["emoji/held_out_artist", "shards/000.tar"],
    )
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(values))
    recipe = load_recipe(tmp_path / "r.yaml")
    assert recipe.links[0].model == str(tmp_path / "mine.json")
    assert recipe.links[0].init == str(tmp_path / "start.pt")
    assert recipe.links[1].model == "models/compt-ViT-S-16.json"
    assert recipe.data.train == str(tmp_path / "shards/{000..003}.tar")
    assert recipe.data.eval == ["emoji/held_out_artist", str(tmp_path / "shards/000.tar")]


def test_tasks_beside_the_recipe_become_absolute(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    harness = {"tasks": ["arc_easy"], "include": "mine"}
    values = changed(
        objective={"name": "causal_lm"},
        evaluate={"harness": harness},
        links__2__evaluate={"harness": {"include": "other"}},
        controls__0__evaluate={"harness": {"include": "mine", "limit": 3}},
    )
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(values))
    recipe = load_recipe(tmp_path / "r.yaml")
    found = [recipe.link_settings(link).evaluate.harness for link in range(3)]
    found.append(recipe.control_settings(0).evaluate.harness)
    mine = str(tmp_path / "mine")
    assert [one and one.include for one in found] == [mine, mine, "other", mine]
    assert [one and one.limit for one in found] == [None, None, None, 3]


def test_a_recipe_does_not_change_after_loading() -> None:
    recipe = recipe_from(BASE)
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 3


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ({"links__1__aling": {}}, "r: links.1.aling: unknown key; did you mean 'align'?"),
        ({"data__batchsize": 3}, "r: data.batchsize: unknown key; did you mean 'batch_size'?"),
        ({"lr": 3}, "r: lr: unknown key; it belongs to 'optimizer'"),
        ({"data__augment": {"scal": [1, 1]}}, "r: data.augment.scal: unknown key; did you mean 'scale'?"),
        ({"links__2__data": {"batchsize": 3}}, "r: links.2.data.batchsize: unknown key; did you mean 'batch_size'?"),
        ({"links__2__data": {"captions": 0}}, "r: links.2.data.captions: needs an integer >= 1 and <= 1024, not 0"),
        ({"data__train": 3}, "r: data.train: needs text or a list (each text or a section), not 3"),
        ({"data__batch_size": "256"}, "r: data.batch_size: needs an integer >= 1, not '256'"),
        ({"data__batch_size": 256.0}, "r: data.batch_size: needs an integer >= 1, not 256.0"),
        ({"data__workers": True}, "r: data.workers: needs an integer >= 0, not true"),
        ({"optimizer__lr": float("nan")}, "r: optimizer.lr: needs a number > 0, not nan"),
        ({"optimizer__betas": [0.9]}, "of exactly 2, not [0.9]"),
        ({"parallel": {"zero": 4}}, "r: parallel.zero: needs one of 0, 1, 2, 3, not 4"),
        ({"parallel": {"recompute": 1}}, "r: parallel.recompute: needs one of none, selective, full, not 1"),
        ({"parallel": {"pipeline": 2}}, "r: parallel: pipeline 2 does not go with engine 'deepspeed'"),
        ({"parallel": {"pipeline": 2, "zero": 3}}, "use engine: megatron with zero: 1"),
        ({"parallel": {"engine": "megatron", "zero": 2}}, "r: parallel: zero 2 does not go with engine 'megatron'"),
        ({"parallel": {"engine": "megatron", "offload": "optimizer"}}, "remove it or use engine: deepspeed"),
        ({"parallel": {"virtual": 2}}, "r: parallel: virtual 2 needs a pipeline"),
        (
            {"parallel": {"engine": "megatron", "pipeline": 4, "virtual": 2, "micro_batches": 6}},
            "r: parallel: micro_batches 6 is not a multiple of pipeline 4, as virtual 2 needs; use micro_batches: 8",
        ),
        ({"parallel": {"sequence": True}}, "r: parallel: 'sequence' splits tokens over tensor-parallel ranks"),
        ({"links__1__parallel": {"sequence": True}}, "r: links.1.parallel: 'sequence' splits tokens"),
        ({"parallel": {"zero": 0, "offload": "optimizer"}}, "'offload' needs a sharded optimizer; use zero: 1"),
        (
            {"parallel": {"zero": 2, "offload": "parameters"}},
            "'offload: parameters' needs sharded weights; use zero: 3",
        ),
        ({"parallel": {"zero": 3, "offload_path": "/nvme"}}, "'offload_path' is where something is offloaded to"),
        (
            {"parallel": {"zero": 2, "offload": "optimizer", "offload_path": "/nvme"}},
            "'offload_path' needs zero: 3; use that, or remove it",
        ),
        ({"links__0__epochs": "four"}, "r: links.0.epochs: needs a number > 0 or null, not 'four'"),
        ({"links__0__steps": 5}, "r: links.0: give exactly one of 'epochs' and 'steps'"),
        ({"links__0__grow": {}}, "r: links.0.grow: the first link has no predecessor"),
        ({"links__1": {"model": "ViT-B-16", "epochs": 1}}, "r: links.1: a later link must say where it starts from"),
        ({"links__1__name": "b"}, "r: links.2.name: the name 'b' is taken"),
        ({"links__1__name": "../b"}, "r: links.1.name: '../b' cannot name a folder"),
        ({"links__1__init": "x.pt"}, "r: links.1: 'init' and 'grow' both set the first weights"),
        ({"links__0__model": "compt-ViT-X-16"}, "r: links.0.model: model config 'compt-ViT-X-16' not found"),
        ({"controls__0__link": "q"}, "r: controls.0.link: no link is called 'q'"),
        ({"controls__0__steps": 4, "controls__0__compute": 1e9}, "r: controls.0: give one of"),
        ({"optimizer__trust_clamp": 10}, "r: optimizer: 'trust_clamp' is not an option of optimizer 'adamw'"),
        (
            {"optimizer": {"name": "lamb", "lr": 0.01, "trust_clamp": 10, "implementation": "apex"}},
            "r: optimizer: 'trust_clamp' is not an option of apex's LAMB; use implementation: torch",
        ),
        (
            {"links__1__optimizer": {"name": "lamb"}},
            "r: links.1: optimizer.name 'lamb' needs the norms of whole parameters, which parallel.zero 1 cuts; use "
            "parallel.zero: 0, or optimizer.name: adamw",
        ),
        (
            {"optimizer__name": "lamb", "parallel": {"zero": 0}, "controls__0__parallel": {"zero": 3}},
            "r: controls.0: optimizer.name 'lamb' needs the norms of whole parameters, which parallel.zero 3",
        ),
        (
            {"optimizer__name": "lamb", "parallel": {"zero": 0}, "optimizer__implementation": "apex"},
            "r: links.2: optimizer.implementation 'apex' has no LAMB for parallel.tensor 2",
        ),
        (
            {"optimizer__implementation": "apex", "links__0__parallel": {"offload": "optimizer"}},
            "r: links.0: optimizer.implementation 'apex' works on CUDA, parallel.offload on the CPU; use torch",
        ),
        (
            {"objective": {"name": "classify", "same_caption": "shared"}},
            "r: objective: 'same_caption' is not an option",
        ),
        ({"evaluate": {"templates": ["a photo"]}}, "r: evaluate: template 'a photo' has no '{}'"),
        (
            {"evaluate": {"harness": {"tasks": ["arc_easy"]}}},
            "r: links.0: evaluate.harness does not go with objective 'clip'; remove it",
        ),
        ({"evaluate": {"harness": {"tasks": []}}}, "r: evaluate.harness.tasks: needs a list (each text) of at least 1"),
        (
            {"evaluate": {"harness": {"tasks": ["a"], "task": 1}}},
            "r: evaluate.harness.task: unknown key; did you mean 'ta",
        ),
        (
            {"evaluate": {"at_end": False, "harness": {"tasks": ["arc_easy"]}}},
            "r: evaluate: 'harness' would never run; give it every_steps, or use at_end: true",
        ),
        ({"data": {"batch_size": 1}}, "r: data.train: is missing"),
        ({"links": []}, "r: links: needs a list of at least 1, not []"),
    ],
)
def test_a_mistake_is_one_line_with_its_place(paths: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        recipe_from(changed(**paths), label="r")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_later_link_may_start_from_scratch_when_it_says_so() -> None:
    assert recipe_from(changed(links__1__grow=None)).links[1].grow is None


@pytest.mark.parametrize(("given", "meant"), [(True, "full"), (False, "none"), ("selective", "selective")])
def test_recompute_may_be_said_with_true_and_false(given: bool | str, meant: str) -> None:
    assert recipe_from(changed(parallel={"recompute": given})).parallel.recompute == meant


def test_lamb_is_for_layouts_that_keep_parameters_whole() -> None:
    recipe = recipe_from(changed(optimizer__name="lamb", optimizer__trust_clamp=10, parallel={"zero": 0}))
    assert [recipe.link_settings(link).optimizer.name for link in range(3)] == ["lamb"] * 3
    assert recipe.link_settings(2).parallel.tensor == 2
