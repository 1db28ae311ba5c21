"""What is written is what is read, in every format, and open_clip and plain torch read it too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from compt_megatron.checkpoint.api import check, convert, inspect, weight_hash
from compt_megatron.checkpoint.contract import TensorInfo
from compt_megatron.checkpoint.formats import FORMATS, detect, open_reader, open_writer
from compt_megatron.errors import UserError
from compt_megatron.spec.table import ModelSpec
from compt_megatron.torchvision_mend import ensure_torchvision
from tests.unit.checkpoint_samples import CLIP, SIGLIP, VISION, VIT, infos, training_state, weights, write


@pytest.mark.parametrize(
    ("spec", "dtype", "name"),
    [
        (CLIP, torch.float32, "folder"),
        (CLIP, torch.bfloat16, "folder"),
        (CLIP, torch.bfloat16, "file.pt"),
        (VIT, torch.float32, "file.safetensors"),
        (VIT, torch.float16, "file.pt"),
        (SIGLIP, torch.float32, "file.pt"),
        (SIGLIP, torch.bfloat16, "file.safetensors"),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_open_clip_to_megatron_and_back_keeps_every_bit(
    tmp_path: Path, spec: ModelSpec, dtype: torch.dtype, name: str
) -> None:
    values = weights(spec, dtype)
    first = write(tmp_path / f"first_{name}", "open_clip", spec, values)
    convert(first, tmp_path / "run", "megatron")
    convert(tmp_path / "run", tmp_path / f"second_{name}", "open_clip")
    second = tmp_path / f"second_{name}"
    assert (detect(first), detect(tmp_path / "run")) == ("open_clip", "megatron")
    hashes = set()
    for path in (first, tmp_path / "run", second):
        check(path)
        reader = open_reader(path)
        assert reader.tensors() == infos(values)
        for key, value in values.items():
            assert torch.equal(reader.read(key), value), key
        hashes.add(weight_hash(reader))
        reader.close()
    assert len(hashes) == 1
    if first.is_file():
        assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("spec", [CLIP, VIT], ids=lambda spec: spec.name)
def test_run_checkpoint_keeps_the_whole_training_state(tmp_path: Path, spec: ModelSpec) -> None:
    values = training_state(spec)
    train = {"step": 7, "samples": 1792}
    path = write(tmp_path / "run", "megatron", spec, values, train=train, lineage=["a", "b"], layout={"tensor": 2})
    check(path)
    reader = open_reader(path)
    assert reader.tensors() == infos(values)
    for name, value in values.items():
        read = reader.read(name)
        assert read.dtype == value.dtype, name
        assert torch.equal(read, value), name
    assert reader.spec is not None
    assert reader.spec.digest == spec.digest
    assert reader.metadata()["train"] == train
    reader.close()
    seen = inspect(path)
    assert seen["model"]["parameters"] == spec.numel
    assert seen["summary"]["weight"]["bytes"] == 2 * spec.numel
    assert seen["summary"]["step"]["tensors"] == len(spec.params) + 1
    assert (seen["lineage"], seen["layout"], seen["train"]) == (["a", "b"], {"tensor": 2}, train)
    json.dumps(seen)


def test_what_open_clip_cannot_hold_is_said(tmp_path: Path) -> None:
    write(tmp_path / "run", "megatron", CLIP, training_state(CLIP))
    left_out = convert(tmp_path / "run", tmp_path / "export", "open_clip", dtype=torch.float32)
    assert len(left_out) == 7
    assert any("exp_avg_sq/" in line for line in left_out)
    seen = inspect(tmp_path / "export")
    assert seen["notes"] == [*left_out, "weights cast to float32"]
    assert seen["summary"]["weight"]["dtypes"] == ["float32"]
    writer = open_writer(tmp_path / "more", "open_clip", CLIP)
    with pytest.raises(UserError, match="weights only, 'exp_avg/x' has no place"):
        writer.declare({"exp_avg/x": TensorInfo((1,), torch.float32)})
    writer.abort()
    assert not list(tmp_path.glob("more*"))


def test_open_clip_loads_the_export_strictly(tmp_path: Path) -> None:
    ensure_torchvision()
    import open_clip

    values = weights(CLIP)
    for name in ("folder", "file.pt"):
        path = write(tmp_path / name, "open_clip", CLIP, values)
        model = open_clip.CLIP(**CLIP.config)
        if path.is_dir():
            state = load_file(path / "open_clip_model.safetensors")
        else:
            state = torch.load(path, weights_only=True)
        model.load_state_dict(state, strict=True)
        block = model.visual.transformer.resblocks[1]
        prefix = "weight/visual.transformer.resblocks.1."
        fused = torch.cat([values[f"{prefix}attn.{part}_proj.weight"] for part in "qkv"])
        assert torch.equal(block.attn.in_proj_weight, fused)
        assert torch.equal(block.mlp.c_fc.weight, values[f"{prefix}mlp.c_fc.weight"])
        assert torch.equal(model.token_embedding.weight, values["weight/token_embedding.weight"])
    loaded, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'folder'}")
    assert torch.equal(loaded.visual.proj, values["weight/visual.proj"])


def test_open_clip_state_dicts_of_other_people_are_read(tmp_path: Path) -> None:
    ensure_torchvision()
    import open_clip

    state = open_clip.CLIP(**CLIP.config).state_dict()
    torch.save(state, tmp_path / "bare.pt")
    torch.save({"epoch": 3, "state_dict": {f"module.{key}": v for key, v in state.items()}}, tmp_path / "trainer.pt")
    torch.save(state, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    hashes = set()
    for name in ("bare.pt", "trainer.pt", "legacy.pt"):
        with pytest.raises(UserError, match=r"does not record which model it holds; .*--from"):
            open_reader(tmp_path / name)
        check(tmp_path / name, CLIP)
        hashes.add(weight_hash(open_reader(tmp_path / name, CLIP)))
    assert len(hashes) == 1
    convert(tmp_path / "bare.pt", tmp_path / "run", "megatron", spec=CLIP)
    assert weight_hash(open_reader(tmp_path / "run")) in hashes


def test_plain_torch_loads_a_run_checkpoint(tmp_path: Path) -> None:
    values = training_state(CLIP)
    write(tmp_path / "run", "megatron", CLIP, values)
    layers, width = VISION["layers"], VISION["width"]
    state = {
        "vision.decoder.layers.mlp.linear_fc2.weight": torch.empty(layers, width, 4 * width, dtype=torch.bfloat16),
        "optimizer.state.exp_avg.vision.decoder.layers.self_attention.linear_qkv.weight": torch.empty(
            layers, 3 * width, width
        ),
        "data/step": torch.tensor(0),
    }
    dcp.load(state, checkpoint_id=str(tmp_path / "run"), no_dist=True)
    fc2, qkv, step = state.values()
    for layer in range(layers):
        prefix = f"visual.transformer.resblocks.{layer}"
        assert torch.equal(fc2[layer], values[f"weight/{prefix}.mlp.c_proj.weight"])
        # [head, (q, k, v), head size, width]: one query head a group
        heads = qkv[layer].view(-1, 3, 8, width)
        for index, part in enumerate("qkv"):
            want = values[f"exp_avg/{prefix}.attn.{part}_proj.weight"]
            assert torch.equal(heads[:, index].reshape(width, width), want)
    assert step == 7
    common = torch.load(tmp_path / "run" / "common.pt", weights_only=True)
    assert common["iteration"] == 0


def test_weight_hash_sees_values_names_and_dtype() -> None:
    class Memory:
        def __init__(self, values: dict[str, torch.Tensor]) -> None:
            self.values = values

        def tensors(self) -> dict[str, TensorInfo]:
            return infos(self.values)

        def read(self, name: str, region: tuple[slice, ...] | None = None) -> torch.Tensor:
            return self.values[name] if region is None else self.values[name][region]

    values = weights(VIT)
    base = weight_hash(Memory(values))  # type: ignore[arg-type]
    changed = {name: value.clone() for name, value in values.items()}
    changed["weight/visual.proj"].view(torch.int32)[3, 2] ^= 1
    swapped = dict(values)
    first, second = "weight/visual.ln_post.weight", "weight/visual.ln_post.bias"
    swapped[first], swapped[second] = values[second], values[first]
    others = [changed, swapped, weights(VIT, torch.bfloat16), values | {"exp_avg/x": torch.ones(1)}]
    found = [weight_hash(Memory(other)) for other in others]  # type: ignore[arg-type]
    assert base not in found[:3]
    assert found[3] == base
    assert weight_hash(Memory(dict(reversed(values.items())))) == base  # type: ignore[arg-type]


def test_every_format_is_registered_under_its_name() -> None:
    assert FORMATS.keys() >= {"megatron", "open_clip", "hf"}
    assert all(entry.name == name for name, entry in FORMATS.items())
    with pytest.raises(UserError, match="did you mean 'megatron'"):
        open_writer("nowhere", "megatorn", CLIP)
