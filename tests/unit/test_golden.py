"""Checkpoints that earlier versions wrote are read for ever: their bytes lie in tests/golden/<format version>.

`v1` was written by the first version: a tiny CLIP, fresh (`small`), with optimizer state after 3 steps (`trained`), and
grown by `exact` (`grown`, as a folder and as one safetensors file).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compt_megatron.checkpoint.api import check, inspect
from compt_megatron.checkpoint.digest import weight_hash
from compt_megatron.checkpoint.formats import open_reader
from compt_megatron.growth.api import grow
from compt_megatron.growth.verify import verify

V1 = Path(__file__).parents[1] / "golden" / "v1"
SMALL, GROWN = "bd4b02ba4171338ca9c4bbd8357dfe68", "69d8a6c1d14a79293bea1c445d74f7b4"


@pytest.mark.parametrize(
    ("name", "digest"), [("small", SMALL), ("trained", SMALL), ("grown", GROWN), ("grown.safetensors", GROWN)]
)
def test_weights_are_read_as_they_were_written(name: str, digest: str) -> None:
    check(V1 / name)
    reader = open_reader(V1 / name)
    assert weight_hash(reader) == digest
    reader.close()


def test_training_state() -> None:
    found = inspect(V1 / "trained")
    assert found["train"] == {"step": 3, "samples": 24, "epoch": 0}
    reader = open_reader(V1 / "trained")
    assert reader.read("step/visual.proj") == 3
    generator = torch.Generator().manual_seed(1)
    assert torch.equal(reader.read("exp_avg/visual.class_embedding"), torch.rand(16, generator=generator))
    reader.close()


@pytest.mark.parametrize("name", ["grown", "grown.safetensors"])
def test_certificates_still_prove_the_growth(name: str) -> None:
    """Growth makes the same bytes as the version that wrote them."""
    report = verify(V1 / name, V1 / "small")
    assert report.ok, report.describe()


def test_growing_an_old_checkpoint_again_gives_the_same_weights(tmp_path: Path) -> None:
    reader = open_reader(V1 / "grown")
    assert reader.spec is not None
    grow(V1 / "small", tmp_path / "again", to=reader.spec)
    reader.close()
    again = open_reader(tmp_path / "again")
    assert weight_hash(again) == GROWN
    again.close()
