"""grow() and verify() on real checkpoints: certificate, lineage, formats, and every kind of damage found."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from compt_megatron.checkpoint.contract import TensorInfo
from compt_megatron.checkpoint.digest import weight_hash
from compt_megatron.checkpoint.formats import detect, open_reader, open_writer
from compt_megatron.errors import UserError
from compt_megatron.growth import execute as execution
from compt_megatron.growth.api import Certificate, GrowthPlan, grow, plan, verify, write_fresh
from compt_megatron.growth.certificate import certify
from compt_megatron.growth.verify import compare, shown_apart
from compt_megatron.spec.random import initial
from compt_megatron.spec.table import ModelSpec
from tests.unit.growth_helpers import (
    MemoryCheckpoint,
    State,
    carried_out,
    clip_config,
    features,
    fuse_state,
    make_spec,
    open_clip_model,
    perturbed,
    relative_error,
)

SMALL, LARGE = clip_config(), clip_config(80, 3, 48, 2)
V1 = Path(__file__).parents[1] / "golden" / "v1"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_fresh(make_spec(SMALL, "small"), tmp_path / "base", 7)


def weights(path: Path) -> State:
    reader = open_reader(path)
    try:
        return {name.removeprefix("weight/"): reader.read(name) for name in reader.tensors()}
    finally:
        reader.close()


def written(path: Path, spec: ModelSpec, tensors: State, metadata: dict) -> Path:
    """A checkpoint with any tensors and any metadata."""
    writer = open_writer(path, "megatron", spec)
    writer.declare({f"weight/{name}": TensorInfo(tuple(value.shape), value.dtype) for name, value in tensors.items()})
    for name, value in tensors.items():
        writer.write(f"weight/{name}", (0,) * value.dim(), value)
    return writer.commit(metadata)


@pytest.mark.parametrize(("value", "dtype"), [(float("nan"), None), (float("-inf"), None), (1e5, "float16")])
def test_values_that_are_not_finite_are_not_grown(base: Path, tmp_path: Path, value: float, dtype: str | None) -> None:
    tensors = weights(base)
    name = next(name for name in tensors if name.endswith("c_fc.weight"))
    tensors[name][-1, -1] = value
    damaged = written(tmp_path / "damaged", make_spec(SMALL), tensors, {})
    with pytest.raises(UserError, match=f"{re.escape(name)}: has values that are not finite in {dtype or 'float32'};"):
        grow(damaged, tmp_path / "grown", make_spec(LARGE), dtype=dtype)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["base", "damaged"]


def test_fresh_weights(base: Path) -> None:
    spec = make_spec(SMALL)
    found = weights(base)
    assert found.keys() == spec.params.keys()
    assert all(torch.equal(found[name], initial(param, 7)) for name, param in spec.params.items())


def test_grow_writes_a_certificate_and_the_lineage(base: Path, tmp_path: Path) -> None:
    middle = make_spec(LARGE, "middle")
    certificate = grow(base, tmp_path / "middle", middle, seed=1)
    assert isinstance(certificate, Certificate)
    grow(tmp_path / "middle", tmp_path / "large", make_spec(clip_config(96, 4, 64, 2), "large"), operator="corner")
    reader = open_reader(tmp_path / "large")
    metadata = reader.metadata()
    reader.close()
    assert [parent["name"] for parent in metadata["lineage"]] == ["small", "middle"]
    assert [parent["operator"] for parent in metadata["lineage"]] == [None, "exact"]
    found = Certificate.from_dict(metadata["certificate"])
    assert (found.operator, found.depth, found.exact) == ("corner", "interleave", False)
    source = open_reader(tmp_path / "middle")
    assert found.source["hash"] == weight_hash(source) == metadata["lineage"][1]["hash"]
    assert Certificate.from_dict(json.loads(json.dumps(source.metadata()["certificate"]))) == certificate
    source.close()


@pytest.mark.parametrize("operator", ["exact", "corner", "reference"])
def test_what_was_grown_verifies(base: Path, tmp_path: Path, operator: str) -> None:
    target = make_spec(clip_config(96, 4, 64, 2), "large")
    depth = "interleave" if operator == "reference" else None
    grow(base, tmp_path / "grown", target, operator=operator, depth=depth, seed=3, dtype="bfloat16")
    report = verify(tmp_path / "grown")
    assert report.ok, report.describe()
    assert (report.tensors, report.elements) == (len(target.params), target.numel)


def test_one_wrong_element_is_found(base: Path, tmp_path: Path) -> None:
    target = make_spec(LARGE, "large")
    certificate = grow(base, tmp_path / "grown", target)
    tensors, metadata = weights(tmp_path / "grown"), {"certificate": certificate.to_dict()}
    name = "visual.transformer.resblocks.2.mlp.c_fc.weight"
    value = tensors[name].clone()
    value[100, 79] = torch.nextafter(value[100, 79], torch.tensor(torch.inf))
    report = verify(written(tmp_path / "element", target, {**tensors, name: value}, metadata))
    assert not report.ok
    assert [(found.name, found.elements, found.first) for found in report.mismatches] == [(name, 1, (100, 79))]
    assert name in report.describe()
    name = "transformer.resblocks.0.attn.k_proj.weight"
    heads = tensors[name].reshape(3, 16, 48)[[1, 0, 2]].reshape(48, 48)
    report = verify(written(tmp_path / "heads", target, {**tensors, name: heads}, metadata))
    assert report.worst is not None
    assert report.worst.name == name
    assert report.worst.elements > 1000


def test_missing_and_extra_tensors_are_found() -> None:
    source, target = make_spec(SMALL, "small"), make_spec(LARGE, "large")
    old = MemoryCheckpoint(source, {name: initial(param, 0) for name, param in source.params.items()})
    made = plan(source, target)
    grown = MemoryCheckpoint(target, carried_out(made, old.state()))
    certificate = certify(made, weight_hash(old), "memory", None)
    assert compare(grown, old, certificate).ok
    grown.values["weight/visual.extra"] = grown.values.pop("weight/visual.proj")
    report = compare(grown, old, certificate)
    assert not report.ok
    assert (report.missing, report.extra, report.mismatches) == (["visual.proj"], ["visual.extra"], [])
    del old.values["weight/visual.proj"]
    with pytest.raises(UserError, match=r"no visual\.proj"):
        compare(grown, old, certify(made, weight_hash(old), "memory", None))


def test_the_wrong_source_and_ungrown_checkpoints(base: Path, tmp_path: Path) -> None:
    certificate = grow(base, tmp_path / "grown", make_spec(LARGE, "large"))
    other = write_fresh(make_spec(SMALL, "small"), tmp_path / "other", 8)
    with pytest.raises(UserError, match="not the weights that"):
        verify(tmp_path / "grown", other)
    with pytest.raises(UserError, match="no growth certificate"):
        verify(base)
    trained = {"certificate": certificate.to_dict(), "train": {"step": 10}}
    path = written(tmp_path / "trained", make_spec(LARGE, "large"), weights(tmp_path / "grown"), trained)
    with pytest.raises(UserError, match="trained for 10 steps"):
        verify(path, base)


def test_a_dry_run_and_a_refusal_write_nothing(base: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    made = grow(base, tmp_path / "grown", make_spec(LARGE, "large"), dry_run=True)
    assert isinstance(made, GrowthPlan)
    for options in ({"operator": "best"}, {"dtype": "int8"}, {"format": "onnx"}):
        with pytest.raises(UserError):
            grow(base, tmp_path / "grown", make_spec(LARGE, "large"), **options)
    with pytest.raises(UserError, match="shrink"):
        grow(base, tmp_path / "grown", make_spec(clip_config(32, text=16), "tiny"))
    assert sorted(tmp_path.iterdir()) == before


def test_open_clip_files_in_and_out(tmp_path: Path) -> None:
    """A bare state dict of open_clip's needs its model named; the grown file loads strictly and keeps the features."""
    model = perturbed(SMALL)
    torch.save(model.state_dict(), tmp_path / "small.pt")
    with pytest.raises(UserError, match="--from"):
        grow(tmp_path / "small.pt", tmp_path / "large.pt", make_spec(LARGE))
    grow(tmp_path / "small.pt", tmp_path / "large.pt", make_spec(LARGE, "large"), source_spec=make_spec(SMALL, "small"))
    assert detect(tmp_path / "large.pt") == "open_clip"
    grown = open_clip_model(LARGE)
    grown.load_state_dict(torch.load(tmp_path / "large.pt", weights_only=True), strict=True)
    for tower, wanted in features(model).items():
        assert relative_error(features(grown)[tower], wanted) < 1e-5
    assert verify(tmp_path / "large.pt").ok
    grow(tmp_path / "large.pt", tmp_path / "larger", make_spec(clip_config(96, 3, 64, 2)), format="megatron")
    assert verify(tmp_path / "larger").ok


def test_formats_hold_the_same_bytes(base: Path, tmp_path: Path) -> None:
    target = make_spec(LARGE, "large")
    grow(base, tmp_path / "a", target, format="megatron")
    grow(base, tmp_path / "b.safetensors", target)
    first, second = weights(tmp_path / "a"), weights(tmp_path / "b.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert fuse_state(target, first).keys() == open_clip_model(LARGE).state_dict().keys() - {"attn_mask"}


def test_a_certificate_that_claims_something_else(tmp_path: Path) -> None:
    """What it says of the result is compared with what growing again gives; nonsense is one line."""
    grow(V1 / "small", tmp_path / "grown", to=_golden_target())
    grown, source = open_reader(tmp_path / "grown"), open_reader(V1 / "small")
    certificate = grown.metadata()["certificate"]
    report = compare(grown, source, Certificate.from_dict({**certificate, "exact": False, "tensors": {}}))
    assert (report.ok, report.claims, report.mismatches) == (False, ["exact", "tensors"], [])
    assert [line.partition("; ")[0] for line in report.defects()] == [
        f"{tmp_path / 'grown'}: its certificate's '{name}' is not what growing it gives" for name in report.claims
    ]
    for entry, value, match in (
        ("operator", ["exact"], "'operator' is"),
        ("source", {}, "does not say which models"),
        ("noise", "much", "'noise' is"),
    ):
        with pytest.raises(UserError, match=match):
            Certificate.from_dict({**certificate, entry: value})


def test_bits_that_differ_in_equal_values_are_shown() -> None:
    """-0.0 equals 0.0, and a NaN looks like any other."""
    source, target = make_spec(SMALL, "small"), make_spec(LARGE, "large")
    old = MemoryCheckpoint(source, {name: initial(param, 0) for name, param in source.params.items()})
    made = plan(source, target)
    grown = MemoryCheckpoint(target, carried_out(made, old.state()))
    certificate = certify(made, weight_hash(old), "memory", None)
    bias = next(value for value in grown.values.values() if value.dim() == 1 and not value.any())
    bias[3] = -0.0
    (found,) = compare(grown, old, certificate).mismatches
    assert (found.elements, found.first, found.largest) == (1, (3,), 0)
    assert str(found).endswith("1 element differs by up to 0, the first at [3]: -0.0 where growth makes 0.0")
    bias[2:4] = 0.1
    (found,) = compare(grown, old, certificate).mismatches
    assert str(found).endswith("2 elements differ by up to 0.1, the first at [2]: 0.100000001 where growth makes 0.0")
    quiet, other = (torch.tensor([bits], dtype=torch.int32).view(torch.float32)[0] for bits in (0x7FC00000, -0x3FFFFF))
    assert shown_apart(other, quiet) == ("nan (bits ffc00001)", "nan (bits 7fc00000)")
    one = torch.tensor(1.0, dtype=torch.float64)
    here, there = shown_apart(torch.nextafter(one, 2 * one), one)
    assert (here, there) == ("1 (bits 3ff0000000000001)", "1 (bits 3ff0000000000000)")
    assert shown_apart(-one.bfloat16(), one.bfloat16()) == ("-1", "1")


def test_a_source_that_changes_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(V1 / "small", tmp_path / "small")
    written = execution.Maker.make

    def touched(*args: Any, **kwargs: Any) -> torch.Tensor:
        os.utime(tmp_path / "small" / "common.pt")
        return written(*args, **kwargs)

    monkeypatch.setattr(execution.Maker, "make", touched)
    with pytest.raises(UserError, match=r"common\.pt: was changed while it was read"):
        grow(tmp_path / "small", tmp_path / "grown", to=_golden_target())
    assert not (tmp_path / "grown").exists()


def _golden_target() -> ModelSpec:
    reader = open_reader(V1 / "grown")
    assert reader.spec is not None
    reader.close()
    return reader.spec
