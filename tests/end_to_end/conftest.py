"""One undisturbed run of the tiny chain, which the tests of a worker compare with."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.end_to_end import tiny
from tests.end_to_end.commands import compt


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny recipe with its data, in a folder of its own."""
    return tiny.write_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="session")
def reference(recipe: Path) -> Path:
    """The run folder of the recipe, run to its end in one process. Not to be changed."""
    run_dir = recipe.parent / "reference"
    result = compt("train", recipe, "--run-dir", run_dir, folder=recipe.parent)
    assert result.codes == [0], result
    return run_dir


@pytest.fixture(scope="session")
def reference_of_two(recipe: Path) -> Path:
    """The same in two processes: sums over ranks round otherwise than sums over rows."""
    run_dir = recipe.parent / "reference-of-two"
    result = compt("train", recipe, "--run-dir", run_dir, folder=recipe.parent, world=2)
    assert result.codes == [0, 0], result
    return run_dir
