"""Universal checkpoints keep every bit, are the same bytes whoever writes them, and say what they cannot hold."""

from __future__ import annotations

import hashlib
import os
import pickle
import random
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from compt_megatron.checkpoint import writing
from compt_megatron.checkpoint.api import check, convert, inspect, weight_hash
from compt_megatron.checkpoint.contract import Writer
from compt_megatron.checkpoint.filled_archive import ArchiveLayout, FilledArchive, Hole
from compt_megatron.checkpoint.flat_pieces import Shares, Tensors
from compt_megatron.checkpoint.formats import detect, open_reader, open_writer
from compt_megatron.checkpoint.module_names import trainer_names
from compt_megatron.checkpoint.open_files import OpenFiles
from compt_megatron.checkpoint.saved_archive import SavedArchive
from compt_megatron.checkpoint.sums import file_hash
from compt_megatron.models.state import fuse, module_to_canonical
from compt_megatron.spec.families import spec_from_config
from compt_megatron.spec.table import ModelSpec
from tests.unit.checkpoint_samples import (
    SIGLIP,
    VIT,
    Values,
    infos,
    refused,
    row_share,
    training_state,
    weights,
    write,
    write_together,
)

CLIP = spec_from_config(
    {
        "embed_dim": 12,
        "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8},
        "text_cfg": {"context_length": 6, "vocab_size": 31, "width": 16, "heads": 2, "layers": 1},
    },
    "clip-small",
)
GPT2 = spec_from_config(
    {"model_type": "gpt2", "n_embd": 12, "n_head": 3, "n_layer": 1, "n_positions": 9, "vocab_size": 31}, "gpt2-tiny"
)
LLAMA = spec_from_config(
    {
        "model_type": "llama",
        "hidden_size": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "intermediate_size": 20,
        "vocab_size": 31,
    },
    "llama-tiny",
)
TRAIN = {"step": 7, "samples": 1792}


def _state(spec: ModelSpec, dtype: torch.dtype = torch.bfloat16) -> Values:
    """What a universal checkpoint can hold of a training state."""
    found = {name: value for name, value in training_state(spec).items() if not name.startswith(("rng/", "data/"))}
    if dtype == torch.float32:
        found = {name: value for name, value in found.items() if not name.startswith("master/")}
        found |= weights(spec) | {"align/image.weight": torch.randn(4, 6)}
    return found


def _digests(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize(
    ("spec", "values"),
    [
        (CLIP, _state(CLIP)),
        (GPT2, _state(GPT2, torch.float32)),
        (LLAMA, _state(LLAMA)),
        (VIT, weights(VIT, torch.bfloat16)),
        (SIGLIP, weights(SIGLIP, torch.float16)),
        (GPT2, weights(GPT2, torch.float64)),
    ],
    ids=["clip", "gpt2", "llama", "vit_weights", "siglip_weights", "gpt2_fp64"],
)
def test_megatron_to_universal_and_back_keeps_every_bit(tmp_path: Path, spec: ModelSpec, values: Values) -> None:
    write(tmp_path / "run", "megatron", spec, values, train=TRAIN)
    assert convert(tmp_path / "run", tmp_path / "universal", "deepspeed") == []
    assert convert(tmp_path / "universal", tmp_path / "again", "megatron") == []
    tag = tmp_path / "universal" / "global_step7"
    for path in (tmp_path / "universal", tag, tmp_path / "again"):
        assert detect(path) == ("megatron" if path.name == "again" else "deepspeed")
        check(path)
        reader = open_reader(path)
        assert reader.tensors() == infos(values)
        for name, value in values.items():
            assert torch.equal(reader.read(name), value), name
            if value.dim() > 1:
                box = tuple(slice(1, size) for size in value.shape)
                assert torch.equal(reader.read(name, box), value[box]), name
        reader.close()
    assert weight_hash(open_reader(tag)) == weight_hash(open_reader(tmp_path / "run"))
    assert inspect(tmp_path / "universal")["train"] == TRAIN


def _pieces(values: Values) -> Iterator[tuple[str, tuple[int, ...], torch.Tensor]]:
    """Every matrix in halves along its last dimension, in random order."""
    found = []
    for name, value in values.items():
        half = value.shape[-1] // 2 if value.dim() > 1 else 0
        found.append((name, (0,) * value.dim(), value[..., :half] if half else value))
        if half:
            found.append((name, (*(0,) * (value.dim() - 1), half), value[..., half:]))
    random.Random(0).shuffle(found)
    yield from found


@pytest.mark.parametrize("spec", [CLIP, GPT2], ids=lambda spec: spec.name)
def test_the_bytes_depend_neither_on_the_order_nor_on_the_ranks(tmp_path: Path, spec: ModelSpec) -> None:
    values = _state(spec)
    write(tmp_path / "one", "deepspeed", spec, values, train=TRAIN)
    writer = open_writer(tmp_path / "shuffled", "deepspeed", spec)
    writer.declare(infos(values))
    for piece in _pieces(values):
        writer.write(*piece)
    writer.commit({"train": TRAIN})

    def body(writer: Writer, rank: int) -> None:
        writer.declare(infos(values))
        for name, value in values.items():
            if (mine := row_share(value, rank, 3)) is not None:
                writer.write(name, *mine)
        writer.commit({"train": TRAIN})

    assert write_together(tmp_path / "three", "deepspeed", spec, 3, body) == [None] * 3
    one = _digests(tmp_path / "one")
    assert len(one) > 4 * 10
    assert _digests(tmp_path / "shuffled") == one
    assert _digests(tmp_path / "three") == one


def test_a_killed_run_is_continued_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "KEEP", 1)  # keep after every unit
    values = dict(sorted(_state(GPT2).items(), key=lambda item: not item[0].startswith("step/")))
    write(tmp_path / "whole", "deepspeed", GPT2, values)
    path, written = tmp_path / "killed", 0
    for stop in (30, 60, None):
        writer = open_writer(path, "deepspeed", GPT2, request="the same")
        writer.declare(infos(values))
        kept = writer.recover()
        assert len(kept) == written
        for name, value in list(values.items())[:stop]:
            if (name, ((0,) * value.dim(), tuple(value.shape))) not in kept:
                writer.write(name, (0,) * value.dim(), value)
                writer.keep()
        if stop is None:
            writer.commit({})
        else:
            writer.leave()
            written = stop
            if stop == 60:  # what was kept and changed since is written again
                (file,) = (tmp_path / "killed.partial").rglob("transformer.wte.weight/fp32.pt")
                data = bytearray(file.read_bytes())
                data[len(data) // 2] ^= 1
                file.write_bytes(data)
                written = list(values).index("master/transformer.wte.weight")
                assert written < 60
    assert _digests(path) == _digests(tmp_path / "whole")


def test_the_files_are_torchs_own_and_as_documented(tmp_path: Path) -> None:
    values = _state(GPT2)
    write(tmp_path / "universal", "deepspeed", GPT2, values, train=TRAIN)
    root = tmp_path / "universal"
    assert (root / "latest").read_text() == (root / "latest_universal").read_text() == "global_step7"
    folder = root / "global_step7"
    for file in folder.rglob("*.pt"):
        assert zipfile.ZipFile(file).testzip() is None
        for options in ({}, {"mmap": True}, {"weights_only": False}):
            torch.load(file, **options)
    fused = torch.cat([values[f"exp_avg/transformer.h.0.attn.{part}_proj.weight"] for part in "qkv"], dim=1)
    zero = folder / "zero" / "transformer.h.0.attn.c_attn.weight"
    found = torch.load(zero / "exp_avg.pt")
    assert found.keys() == {"param", "cat_dim"}
    assert found["cat_dim"] == 0
    assert torch.equal(found["param"], fused)
    assert torch.equal(torch.load(zero / "step.pt"), torch.tensor(7.0))
    state = torch.load(folder / "mp_rank_00_model_states.pt")
    assert torch.equal(state["module"]["transformer.ln_f.bias"], values["weight/transformer.ln_f.bias"])
    assert (state["global_steps"], state["global_samples"]) == (7, 1792)
    assert not any("lm_head" in path.name for path in (folder / "zero").iterdir())  # tied


def test_what_deepspeed_cannot_hold_is_said(tmp_path: Path) -> None:
    write(tmp_path / "run", "megatron", CLIP, training_state(CLIP))
    left_out = convert(tmp_path / "run", tmp_path / "universal", "deepspeed")
    assert [line.split()[3] for line in left_out] == ["rng/", "data/"]
    state = _state(GPT2)
    apart = state | {f"step/{name}": torch.tensor(float(i < 3)) for i, name in enumerate(GPT2.params)}
    without = {name: value for name, value in state.items() if not name.startswith("step/")}
    refused(lambda: write(tmp_path / "a", "deepspeed", GPT2, apart), "taken 0 to 7 optimizer steps", "counts one")
    refused(lambda: write(tmp_path / "a", "deepspeed", GPT2, without), "not the steps it has taken")
    refused(lambda: write(tmp_path / "a.pt", "deepspeed", GPT2, state), "a folder")
    extra = weights(VIT) | {"master/other": torch.ones(2)}
    refused(lambda: write(tmp_path / "a", "deepspeed", VIT, extra), "no place for 'master/other'")
    assert {path.name for path in tmp_path.iterdir()} == {"run", "universal"}
    write(tmp_path / "a", "deepspeed", GPT2, without | {"step/optimizer": torch.tensor(5)})
    assert open_reader(tmp_path / "a").read("step/optimizer") == 5


@pytest.mark.parametrize(
    "file", ["zero/visual.proj/exp_avg.pt", "mp_rank_00_model_states.pt", "zero/optimizer_state.pt"]
)
def test_damage_is_found(tmp_path: Path, file: str) -> None:
    write(tmp_path / "universal", "deepspeed", VIT, _state(VIT), train=TRAIN)
    path = tmp_path / "universal" / "global_step7" / file
    good = path.read_bytes()
    for bad in (good[:-1], bytes([good[0] ^ 1]) + good[1:]):
        path.write_bytes(bad)
        refused(lambda: check(tmp_path / "universal"), path.name)
    path.unlink()
    refused(lambda: check(tmp_path / "universal"), path.name, "missing")
    path.write_bytes(good)
    (path.parent / "more").touch()
    refused(lambda: check(tmp_path / "universal"), "not part of this checkpoint")


class _Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def _plain_checkpoint(folder: Path, spec: ModelSpec = VIT, own: bool = False, **more: Any) -> Path:
    """A checkpoint as DeepSpeed saves it without ZeRO. `own`: of this project's module, not of a user's."""
    values = weights(spec)
    module: dict[str, torch.Tensor] = OrderedDict()
    for key, names in module_to_canonical(spec).items() if own else ():
        parts = {name: values[f"weight/{name}"] for name in names}
        module[f"module.model.{key}"] = fuse(spec, key, parts)
    for key in () if own else trainer_names(spec).shapes:
        whole = [values[f"weight/{name}"] for name in spec.params if trainer_names(spec).places[name].key == key]
        module[key] = whole[0] if len(whole) == 1 else torch.cat(whole, -1 if spec is GPT2 else 0)
    if spec is GPT2 and not own:  # as its state dict has it: the tied head, and a buffer
        module["lm_head.weight"] = module["transformer.wte.weight"]
        module["transformer.h.0.attn.bias"] = torch.ones(1, 1, 9, 9)
    (folder / "global_step2").mkdir(parents=True)
    (folder / "latest").write_text("global_step2")
    states = {"module": module, "buffer_names": ["transformer.h.0.attn.bias"], "param_shapes": None, "dp_world_size": 2}
    torch.save({**states, "optimizer": None, **more}, folder / "global_step2" / "mp_rank_00_model_states.pt")
    return folder


@pytest.mark.parametrize("own", [False, True], ids=["users", "own"])
@pytest.mark.parametrize("spec", [CLIP, GPT2, LLAMA], ids=lambda spec: spec.name)
def test_the_names_of_modules_are_found_out(tmp_path: Path, spec: ModelSpec, own: bool) -> None:
    reader = open_reader(_plain_checkpoint(tmp_path / "x", spec, own), spec)
    for name, value in weights(spec).items():
        assert torch.equal(reader.read(name), value), name
        box = tuple(slice(size // 3, size - size // 4) for size in value.shape)
        assert torch.equal(reader.read(name, box), value[box]), name


def test_tied_heads_and_buffers_are_no_parameters(tmp_path: Path) -> None:
    numbers = list(range(len(trainer_names(GPT2).shapes)))
    shapes = trainer_names(GPT2).shapes.values()
    state = {number: {"exp_avg": torch.full(shape, float(number))} for number, shape in zip(numbers, shapes)}
    path = _plain_checkpoint(tmp_path / "x", GPT2, optimizer={"state": state, "param_groups": [{"params": numbers}]})
    reader = open_reader(path, GPT2)
    for name, value in weights(GPT2).items():
        assert torch.equal(reader.read(name), value), name
    assert (reader.read("exp_avg/transformer.ln_f.bias") == numbers[-1]).all()


def test_a_pickle_runs_nothing(tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    path = _plain_checkpoint(tmp_path / "evil", client=_Evil(touched))
    for name in (path, path / "global_step2"):
        refused(lambda name=name: open_reader(name, VIT), "builtins.getattr", "--trust-pickle")
    assert not touched.exists()
    open_reader(path, VIT, trust_pickle=True)
    assert touched.exists()
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path / "global_step2" / "mp_rank_00_model_states.pt")


def test_optimizer_state_without_zero_goes_by_the_order_of_the_groups(tmp_path: Path) -> None:
    shapes = {name: torch.Size(shape) for name, shape in trainer_names(VIT).shapes.items()}
    size = sum(shape.numel() for shape in shapes.values())
    flat = {kind: torch.randn(size) for kind in ("exp_avg", "exp_avg_sq", "master")}
    base = {
        "state": {0: {"step": 4, "exp_avg": flat["exp_avg"], "exp_avg_sq": flat["exp_avg_sq"]}},
        "param_groups": [{"params": [0]}],
    }
    fused = _plain_checkpoint(
        tmp_path / "fused", optimizer={"optimizer_state_dict": base, "fp32_groups_flat": [flat["master"] * 1.0]}
    )
    reader = open_reader(fused, VIT)
    at = 0
    for name, shape in shapes.items():
        if name in VIT.params:
            value = flat["exp_avg_sq"][at : at + shape.numel()].view(shape)
            assert torch.equal(reader.read(f"exp_avg_sq/{name}"), value), name
            assert reader.read(f"step/{name}") == 4
        at += shape.numel()
    names = list(shapes)
    groups = [names[::2], names[1::2]]  # nothing in the file tells these apart
    state = {i: {"exp_avg": torch.zeros(shapes[n])} for i, n in enumerate(names[::2] + names[1::2])}
    numbers = [{"params": list(range(len(groups[0])))}, {"params": list(range(len(groups[0]), len(names)))}]
    unclear = _plain_checkpoint(tmp_path / "unclear", optimizer={"state": state, "param_groups": numbers})
    reader = open_reader(unclear, VIT)
    assert {name.split("/")[0] for name in reader.tensors()} == {"weight"}
    assert "do not say which of several groups" in reader.metadata()["notes"][0]


def test_an_archive_that_was_written_twice_has_the_right_checksums(tmp_path: Path) -> None:
    value = torch.randn(6, 5)
    (tmp_path / "a.pt").write_bytes(bytes(10000))  # what a killed run may have left
    archive = FilledArchive(tmp_path / "a.pt", ArchiveLayout(infos({"x": value})))
    archive.write("x", (0, 0), value * 2)
    archive.write("x", (0, 0), value)
    archive.close()
    digest, size = archive.seal([archive.progress()], {"x": Hole("x")})
    assert (file_hash(tmp_path / "a.pt"), (tmp_path / "a.pt").stat().st_size) == (digest, size)
    assert zipfile.ZipFile(tmp_path / "a.pt").testzip() is None
    assert torch.equal(torch.load(tmp_path / "a.pt")["x"], value)


def test_shares_of_a_parameter_are_told_from_a_tensor_of_its_shape(tmp_path: Path) -> None:
    files = OpenFiles(os.O_RDONLY)
    stored, state = [], Tensors()
    for rank in range(2):
        torch.save(torch.arange(24.0) + 100 * rank, tmp_path / f"{rank}.pt")
        archive = SavedArchive(tmp_path / f"{rank}.pt", files)
        stored.append((archive, archive.content))
    for index, name in enumerate(("first", "second")):  # of 24 elements, like the tensor that holds half of each
        state.add(name, Shares(stored, 12 * index, 24))
        want = torch.cat([torch.arange(12.0) + 12 * index, torch.arange(12.0) + 12 * index + 100])
        assert torch.equal(state.read(name, (24,), (slice(0, 24),)), want)
        assert torch.equal(state.read(name, (4, 6), (slice(1, 4), slice(2, 5))), want.view(4, 6)[1:4, 2:5])
    files.close()
