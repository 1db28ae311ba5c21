"""`compt verify` finds everything that is wrong, says each in a line, and with --json as one document."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import compt_megatron
from compt_megatron import cli
from compt_megatron.chain.ledger import Entry, Ledger
from compt_megatron.chain.verify import LISTED, examine
from compt_megatron.checkpoint.contract import Layout
from compt_megatron.checkpoint.digest import weight_hash
from compt_megatron.checkpoint.formats import open_reader, open_writer
from compt_megatron.checkpoint.manifest import MANIFEST, manifest_bytes
from compt_megatron.errors import Defects
from compt_megatron.growth.api import grow, write_fresh
from compt_megatron.spec.families import spec_from_config
from compt_megatron.spec.table import ModelSpec
from tests.unit.checkpoint_samples import CLIP, Values, infos, refused, weights, write
from tests.unit.growth_helpers import clip_config, make_spec
from tests.unit.hf_samples import CONFIGS

Capture = pytest.CaptureFixture[str]
SMALL, LARGE = make_spec(clip_config(), "small"), make_spec(clip_config(64, 3), "large")
LLAMA = spec_from_config(CONFIGS["llama"], "llama")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def verified(capsys: Capture, *argv: object) -> tuple[list[str], list[dict[str, Any]]]:
    """What the command says of a defective checkpoint: the lines on stderr, which are the same with and without --json,
    and the document."""
    assert cli.main(["verify", *map(str, argv)]) == 2
    said = capsys.readouterr().err
    assert cli.main(["verify", *map(str, argv), "--json"]) == 2
    out, err = capsys.readouterr()
    assert err == said
    lines = said.splitlines()
    assert all(line.startswith("compt: ") for line in lines)
    return [line.removeprefix("compt: ") for line in lines], json.loads(out)


@pytest.fixture
def grown(tmp_path: Path) -> Path:
    write_fresh(SMALL, tmp_path / "small", 0)
    grow(tmp_path / "small", tmp_path / "grown", LARGE)
    return tmp_path / "grown"


def rewritten(path: Path, spec: ModelSpec, values: Values, certificate: Any, layout: Layout | None = None) -> Path:
    """A checkpoint whose files are as they were written."""
    writer = open_writer(path, "megatron", spec, layout=layout)
    writer.declare(infos(values))
    for name, value in values.items():
        writer.write(name, (0,) * value.dim(), value)
    return writer.commit({"certificate": certificate})


def contents(path: Path) -> tuple[Values, Any]:
    reader = open_reader(path)
    try:
        return {name: reader.read(name) for name in reader.tensors()}, reader.metadata()["certificate"]
    finally:
        reader.close()


def test_every_damaged_file_and_every_stranger_is_named(tmp_path: Path, capsys: Capture) -> None:
    path = write(tmp_path / "ck", "megatron", CLIP, weights(CLIP))
    flip(path / ".metadata")
    flip(path / "__0_0.distcp")
    (path / "common.pt").unlink()
    (path / "notes.txt").touch()
    lines, (record,) = verified(capsys, path)
    assert record["defects"] == lines
    assert (record["defect_count"], record["files"], record["growth"]) == (4, "damaged", None)
    assert lines[3] == f"{path}: 'notes.txt' is not part of this checkpoint; move it elsewhere"
    for line, name, what in zip(lines, (".metadata", "__0_0.distcp", "common.pt"), (*["checksum"] * 2, "missing")):
        assert line.startswith(f"{path / name}: ")
        assert what in line
    write(tmp_path / "ok", "megatron", CLIP, weights(CLIP))
    flip(tmp_path / "ok" / "__0_0.distcp")
    for name in ("notes.txt", "more.bin"):
        (tmp_path / "ok" / name).touch()
    lines, _ = verified(capsys, tmp_path / "ok")
    assert [line.partition("; ")[0] for line in lines] == [
        f"{tmp_path / 'ok' / '__0_0.distcp'}: its bytes do not match their checksum",
        f"{tmp_path / 'ok'}: 'more.bin' is not part of this checkpoint",
        f"{tmp_path / 'ok'}: 'notes.txt' is not part of this checkpoint",
    ]


def test_a_damaged_file_does_not_hide_wrong_tensors_in_another(grown: Path, tmp_path: Path, capsys: Capture) -> None:
    values, certificate = contents(grown)
    wrong = "weight/visual.transformer.resblocks.2.mlp.c_fc.weight"
    values[wrong][5, 7] += 1
    path = rewritten(tmp_path / "wrong", LARGE, values, certificate, Layout(tensor=2))
    lines, _ = verified(capsys, path)
    assert len(lines) == 1
    assert f"{path}: {wrong.removeprefix('weight/')}: 1 element differs by up to 1, the first at [5, 7]" in lines[0]
    flip(path / "__1_0.distcp")  # the second half of what is split
    lines, (record,) = verified(capsys, path)
    assert record["files"] == "damaged"
    assert [str(path / "__1_0.distcp") in line for line in lines] == [True]
    values[wrong][5, 7] -= 1
    other = "weight/visual.proj"  # not split: in the first file
    values[other][0, 0] += 1
    path = rewritten(tmp_path / "both", LARGE, values, certificate, Layout(tensor=2))
    flip(path / "__1_0.distcp")
    lines, _ = verified(capsys, path)
    assert [line.split(": ")[0] for line in lines] == [str(path / "__1_0.distcp"), str(path)]
    assert "visual.proj: 1 element differs" in lines[1]


def test_claims_and_tensors_that_do_not_hold_are_all_named(grown: Path, tmp_path: Path, capsys: Capture) -> None:
    values, certificate = contents(grown)
    for name in ("weight/visual.proj", "weight/text_projection"):
        values[name][0, 0] += 1
    path = rewritten(tmp_path / "wrong", LARGE, values, {**certificate, "exact": False, "tensors": {}})
    lines, (record,) = verified(capsys, path)
    assert record["files"] == "ok"
    assert [line.split(",")[0].split(";")[0] for line in sorted(lines)] == [
        f"{path}: its certificate's 'exact' is not what growing it gives",
        f"{path}: its certificate's 'tensors' is not what growing it gives",
        f"{path}: text_projection: 1 element differs by up to 1",
        f"{path}: visual.proj: 1 element differs by up to 1",
    ]
    path = rewritten(tmp_path / "another", LARGE, values, {**certificate, "depth": "stack"})
    (line,) = verified(capsys, path)[0]
    assert line.startswith(f"{path}: its certificate cannot be followed: small -> large: depth mode 'stack'")
    content = json.loads((grown / MANIFEST).read_text())
    del content["certificate"]["source"]["path"], content["self"]
    (grown / MANIFEST).write_bytes(manifest_bytes(content))
    assert verified(capsys, grown)[0] == [
        f"{grown}: the certificate does not say which models it is about; grow the checkpoint again"
    ]


def test_many_defects_are_counted(tmp_path: Path, capsys: Capture) -> None:
    values = {name: torch.full_like(value, torch.nan) for name, value in weights(CLIP).items()}
    path = write(tmp_path / "nan", "megatron", CLIP, values)
    lines, (record,) = verified(capsys, path)
    assert len(values) > LISTED + 1
    assert (len(record["defects"]), record["defect_count"]) == (LISTED, len(values))
    assert lines == [*record["defects"], f"{path}: and {len(values) - LISTED} defects more"]
    assert all("not finite" in line for line in lines[:-1])
    with pytest.raises(Defects, match=rf"not finite.* \(and {len(values) - 1} more") as caught:
        compt_megatron.verify(path)
    assert list(caught.value.lines) == lines


def test_all_tensors_that_a_foreign_checkpoint_lacks_are_named(tmp_path: Path, capsys: Capture) -> None:
    path = write(tmp_path / "hub", "hf", LLAMA, weights(LLAMA))
    (path / MANIFEST).unlink()
    state = load_file(path / "model.safetensors")
    del state["model.norm.weight"], state["model.layers.1.mlp.up_proj.weight"]
    save_file(state | {"score.weight": torch.zeros(2, 24)}, path / "model.safetensors")
    lines, _ = verified(capsys, path)
    assert [line.split("it ")[1].split(";")[0] for line in lines] == [
        "also has 'score.weight'",
        "has no 'model.layers.1.mlp.up_proj.weight'",
        "has no 'model.norm.weight'",
    ]
    file = write(tmp_path / "clip.pt", "open_clip", CLIP, weights(CLIP))
    Path(f"{file}.{MANIFEST}").unlink()
    state = torch.load(file, weights_only=True)
    del state["visual.proj"], state["logit_scale"]
    torch.save(state | {"visual.extra": torch.zeros(1)}, file)
    (tmp_path / "clip.json").write_text(json.dumps(CLIP.config))
    lines, _ = verified(capsys, file, "--from", tmp_path / "clip.json")
    assert sorted(line.split("it ")[1].split(";")[0] for line in lines) == [
        "also has 'visual.extra'",
        "has no 'logit_scale'",
        "has no 'visual.proj'",
    ]
    refused(lambda: grow(path, tmp_path / "out", LLAMA), "also has 'score.weight'", "(and 2 more, see compt verify)")


def test_what_is_no_checkpoint_is_a_document_too(tmp_path: Path, capsys: Capture) -> None:
    lines, (record,) = verified(capsys, tmp_path / "nowhere")
    assert lines == record["defects"]
    assert "does not exist" in lines[0]
    (tmp_path / "run").mkdir()
    Ledger("run", "recipe", "digest", links=[Entry("s", "s.json")]).save(tmp_path / "run")
    lines, (record,) = verified(capsys, tmp_path / "run")
    assert lines == record["defects"] == [f"{tmp_path / 'run'}: the run has no checkpoints yet; nothing to verify"]


def test_one_bad_checkpoint_of_a_run_does_not_hide_the_others(tmp_path: Path, capsys: Capture) -> None:
    run = tmp_path / "run"
    links = []
    for seed, name in enumerate("abc"):
        reader = open_reader(write_fresh(SMALL, run / name / "last", seed))
        links.append(Entry(name, "small", checkpoint=f"{name}/last", weight_hash=weight_hash(reader)))
        reader.close()
    links[1].weight_hash = links[0].weight_hash
    Ledger("run", "recipe", "digest", links=links).save(run)
    flip(run / "c" / "last" / ".metadata")
    lines, records = verified(capsys, run)
    assert [record["defect_count"] for record in records] == [0, 1, 1]
    assert f"{run / 'b' / 'last'}: its weights are not those that chain.json records" in lines[0]
    assert ".metadata" in lines[1]
    cli.main(["verify", str(run)])
    assert capsys.readouterr().out.splitlines() == [
        f"{run / 'a' / 'last'}: files and tensors as recorded",
        f"{run / 'b' / 'last'}: 1 defect",
        f"{run / 'c' / 'last'}: 1 defect",
        "  note: it cannot be opened, so nothing else was checked",
    ]
    assert [record["files"] for record in examine(run)] == ["ok", "ok", "damaged"]
