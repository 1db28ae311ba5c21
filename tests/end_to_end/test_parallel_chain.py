"""One chain whose links have different layouts, on two processes, against the same chain in one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from compt_megatron.checkpoint.formats import open_reader
from tests.end_to_end import tiny
from tests.end_to_end.commands import compt

LAYOUTS = {
    "s": {},  # two copies
    "m": {"tensor": 2, "zero": 2},
    "l": {"engine": "megatron", "pipeline": 2, "micro_batches": 4},
}

LIMITS = {"s": 1e-4, "m": 1e-4, "l": 1e-3}  # rounding adds up from link to link


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe whose second model has an even number of heads, and whose third has towers of two layers."""
    path = tiny.write_recipe(tmp_path_factory.mktemp("layouts"), controls=[])
    (path.parent / "m.json").write_text(json.dumps(tiny.model(64, 4, 2)))
    large = tiny.model(96, 6, 2, joint=32)
    large["text_cfg"]["layers"] = 2
    (path.parent / "l.json").write_text(json.dumps(large))
    recipe = yaml.safe_load(path.read_text())
    recipe["links"][1]["grow"]["moments"] = "grow"
    path.write_text(yaml.safe_dump(recipe))
    return path


def test_links_on_different_layouts_train_as_one_process(plain: Path) -> None:
    recipe = yaml.safe_load(plain.read_text())
    for link, parallel in zip(recipe["links"], LAYOUTS.values(), strict=True):
        link["parallel"] = parallel
    recipe["links"][2]["align"]["tensor"] = 2  # the teacher cut in two, its student in a pipeline
    mixed = plain.with_name("mixed.yaml")
    mixed.write_text(yaml.safe_dump(recipe))
    alone, split = plain.parent / "alone", plain.parent / "split"
    done = compt("train", plain, "--run-dir", alone, folder=plain.parent)
    assert done.codes == [0], done
    done = compt("train", mixed, "--run-dir", split, folder=plain.parent, world=2)
    assert done.codes == [0, 0], done
    for name in LAYOUTS:
        assert tiny.losses(split, name) == pytest.approx(tiny.losses(alone, name), abs=LIMITS[name])
        entry, expected = tiny.entries(split)[name], tiny.entries(alone)[name]
        assert entry["samples"] == expected["samples"]
        assert entry["align_at_step0"].keys() == expected["align_at_step0"].keys()
        assert max(entry["align_at_step0"].values(), default=0) < 1e-9
        found, wanted = (next(iter(each["evaluation"].values())) for each in (entry, expected))
        assert found["top1"] == pytest.approx(wanted["top1"], abs=0.03)  # 96 samples: a near tie may fall otherwise
    for run in (alone, split):
        reader = open_reader(run / tiny.entries(run)["m"]["initial"])
        assert reader.read("step/visual.proj") == tiny.STEPS["s"], "the second link goes on with the first's moments"
        assert reader.read("exp_avg/visual.proj").abs().max() > 0
        reader.close()
    verified = compt("verify", split, folder=plain.parent)
    assert verified.codes == [0], verified
