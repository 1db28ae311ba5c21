"""Hugging Face folders that are damaged, incomplete or of another model are refused in one line."""

from __future__ import annotations

import json
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compt_megatron.checkpoint import huggingface_writer
from compt_megatron.checkpoint.api import check, convert, inspect
from compt_megatron.checkpoint.formats import detect, open_reader
from compt_megatron.checkpoint.safetensors_file import SafetensorsFile
from compt_megatron.errors import UserError
from compt_megatron.spec.families import spec_from_config
from compt_megatron.spec.table import ModelSpec
from tests.unit.checkpoint_samples import VIT, refused, weights, write
from tests.unit.hf_samples import CONFIGS

INDEX = "model.safetensors.index.json"
GPT2 = spec_from_config(CONFIGS["gpt2"], "gpt2")
LLAMA = spec_from_config(CONFIGS["llama"], "llama")
QWEN3 = spec_from_config(CONFIGS["qwen3"], "qwen3")


def foreign(path: Path, spec: ModelSpec, shard: int = 10**9) -> Path:
    """A folder as somebody else's: weights and config, nothing of ours."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_writer, "SHARD_BYTES", shard)
        write(path, "hf", spec, weights(spec))
    (path / "compt.json").unlink()
    return path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return foreign(tmp_path / "hub", LLAMA, 8000)


@pytest.fixture
def single(tmp_path: Path) -> Path:
    return foreign(tmp_path / "hub", LLAMA)


def shard(folder: Path, index: int = 1) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[index]


def edited(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((folder / INDEX).read_text())
    change(content)
    (folder / INDEX).write_text(json.dumps(content))


def test_missing_and_truncated_shards(sharded: Path) -> None:
    path = shard(sharded)
    whole = path.read_bytes()
    for cut in (len(whole) - 1, len(whole) // 2, 100, 8, 3, 0):
        path.write_bytes(whole[:cut])
        refused(lambda: open_reader(sharded), path.name, "damaged safetensors file")
    path.write_bytes(whole + b"\0")
    refused(lambda: open_reader(sharded), path.name, "truncated or changed")
    path.unlink()
    refused(lambda: open_reader(sharded), f"{path}: this file of the checkpoint is missing")
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    refused(lambda: open_reader(sharded), path.name, "git lfs pull")


def test_an_index_that_says_something_else_than_the_shards(sharded: Path) -> None:
    good = (sharded / INDEX).read_text()
    first = shard(sharded, 0)

    def move_everything(content: dict[str, Any]) -> None:
        content["weight_map"]["model.norm.weight"] = first.name

    edited(sharded, move_everything)
    refused(lambda: open_reader(sharded), first.name, "no 'model.norm.weight', which the index says")
    for bad in ("../other.safetensors", "/etc/passwd", 3, None):
        edited(sharded, lambda content, bad=bad: content["weight_map"].update({"model.norm.weight": bad}))
        refused(lambda: open_reader(sharded), INDEX, "no file of this folder")
    for text in ("{", "[]", '{"weight_map": []}', "{}"):
        (sharded / INDEX).write_text(text)
        refused(lambda: open_reader(sharded), INDEX)
    (sharded / INDEX).unlink()
    refused(lambda: open_reader(sharded), f"has {first.name} but no {INDEX}")
    refused(lambda: open_reader(first), "one of", "give the folder")
    (sharded / INDEX).write_text(good)
    check(sharded)


def test_two_checkpoints_in_one_folder(sharded: Path, tmp_path: Path) -> None:
    single = foreign(tmp_path / "single", LLAMA)
    shutil.copy(single / "model.safetensors", sharded)
    refused(lambda: open_reader(sharded), "two sets of weights", "model.safetensors", INDEX)
    edited(
        sharded, lambda content: content["weight_map"].update(dict.fromkeys(content["weight_map"], "model.safetensors"))
    )
    check(sharded)  # an index of the one file, as some tools write
    clip = write(tmp_path / "clip", "open_clip", VIT, weights(VIT))
    shutil.copy(clip / "open_clip_model.safetensors", single)
    refused(lambda: detect(single), "holds two checkpoints", "open_clip", "hf")


def test_a_tensor_in_two_shards(sharded: Path) -> None:
    state = load_file(shard(sharded, 0))
    state["model.norm.weight"] = torch.zeros(24)
    save_file(state, shard(sharded, 0))
    check(sharded)  # the index says which one counts
    edited(sharded, lambda content: content["weight_map"].pop("model.norm.weight"))
    refused(lambda: open_reader(sharded), "'model.norm.weight'", "and so does")


MISFITS: list[tuple[ModelSpec, dict[str, Any], str, str]] = [
    (LLAMA, {"vocab_size": 60}, "vocab_size", "model.embed_tokens.weight"),
    (LLAMA, {"hidden_size": 32}, "hidden_size", "[61, 24]"),
    (LLAMA, {"intermediate_size": 44}, "intermediate_size", "mlp.gate_proj.weight"),
    (LLAMA, {"num_key_value_heads": 4}, "num_key_value_heads", "k_proj"),
    (LLAMA, {"head_dim": 8}, "num_attention_heads", "q_proj"),
    (LLAMA, {"num_hidden_layers": 3}, "num_hidden_layers", "model.layers.2."),
    (LLAMA, {"num_hidden_layers": 1}, "num_hidden_layers", "model.layers.1."),
    (LLAMA, {"attention_bias": True}, "attention_bias", "q_proj.bias"),
    (QWEN3, {"tie_word_embeddings": False}, "tie_word_embeddings", "lm_head.weight"),
    (QWEN3, {"model_type": "llama"}, "model_type", "q_norm"),
    (GPT2, {"n_embd": 28}, "n_embd", "wte.weight"),
    (GPT2, {"n_inner": 40}, "n_inner", "c_fc"),
    (GPT2, {"n_positions": 16}, "n_positions", "wpe.weight"),
    (GPT2, {"n_layer": 5}, "n_layer", "transformer.h.2."),
    (GPT2, {"tie_word_embeddings": False}, "tie_word_embeddings", "lm_head.weight"),
]


@pytest.mark.parametrize(("spec", "wrong", "field", "tensor"), MISFITS)
def test_a_config_of_another_model(
    tmp_path: Path, spec: ModelSpec, wrong: dict[str, Any], field: str, tensor: str
) -> None:
    hub = foreign(tmp_path / "hub", spec)
    config = json.loads((hub / "config.json").read_text())
    (hub / "config.json").write_text(json.dumps({**config, **wrong}))
    refused(lambda: open_reader(hub), "another model", f"'{field}'", tensor)


def test_configs_that_are_none(single: Path, tmp_path: Path) -> None:
    (single / "config.json").write_text('{"model_type": "bert"}')
    refused(lambda: open_reader(single), "model_type 'bert' is not supported")
    (single / "config.json").write_text("{")
    refused(lambda: open_reader(single), "config.json", "not a readable JSON file")
    (single / "config.json").unlink()
    refused(lambda: open_reader(single), "has no config.json", "--from")
    check(single, LLAMA)
    foreign(tmp_path / "again", LLAMA)
    refused(lambda: open_reader(tmp_path / "again", GPT2), "another model than 'gpt2'")
    (single / "model.safetensors").unlink()
    (single / "config.json").write_text(json.dumps(LLAMA.config))
    refused(lambda: open_reader(single), "not a checkpoint of a known format")


def test_tensors_of_something_else(single: Path) -> None:
    state = load_file(single / "model.safetensors")
    save_file(state | {"score.weight": torch.zeros(2, 24)}, single / "model.safetensors")
    refused(lambda: open_reader(single), "also has 'score.weight'")
    save_file({key: v for key, v in state.items() if "o_proj" not in key}, single / "model.safetensors")
    refused(lambda: open_reader(single), "has no 'model.layers.0.self_attn.o_proj.weight'")
    save_file(state | {"embed_tokens.weight": torch.zeros(61, 24)}, single / "model.safetensors")
    refused(lambda: open_reader(single), "also has", "embed_tokens.weight'")
    quantised = {key: value.to(torch.int8) if "proj" in key else value for key, value in state.items()}
    save_file(quantised, single / "model.safetensors")
    refused(lambda: open_reader(single), "is int8", "convert it first")
    mixed = {key: value.half() if "lm_head" in key else value for key, value in state.items()}
    save_file(mixed, single / "model.safetensors")
    check(single)
    save_file({**state, "lm_head.weight": state["lm_head.weight"].to(torch.float8_e5m2)}, single / "model.safetensors")
    refused(lambda: open_reader(single), "'lm_head.weight' has dtype 'F8_E5M2', which is not supported")


class _Runs:
    def __reduce__(self) -> Any:
        return (print, ("this ran",))


def test_code_in_an_older_file_is_not_run(single: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = load_file(single / "model.safetensors")
    (single / "model.safetensors").unlink()
    torch.save(state | {"extra": _Runs()}, single / "pytorch_model.bin")
    refused(lambda: open_reader(single), "pytorch_model.bin", "holds more than tensors", "print")
    (single / "pytorch_model.bin").write_bytes(pickle.dumps(_Runs()))
    refused(lambda: open_reader(single), "pytorch_model.bin")
    torch.save(state, single / "pytorch_model.bin")
    whole = (single / "pytorch_model.bin").read_bytes()
    (single / "pytorch_model.bin").write_bytes(whole[: len(whole) // 2])
    refused(lambda: open_reader(single), "pytorch_model.bin", "damaged")
    assert "this ran" not in capsys.readouterr().out


def with_header(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Rewrite a safetensors file with a changed header."""
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + length :])


def _swap(left: dict[str, Any], right: dict[str, Any]) -> None:
    left["shape"], right["shape"] = right["shape"], left["shape"]


KEY = "model.norm.weight"
HEADERS: dict[str, Callable[[dict[str, Any]], object]] = {
    "beyond the file": lambda head: head[KEY].update(data_offsets=[10**9, 10**9 + 96]),
    "enormous shape": lambda head: head[KEY].update(shape=[2**40, 2**21], data_offsets=[0, 2**63]),
    "overflowing shape": lambda head: head[KEY].update(shape=[2**62, 2**62]),
    "negative size": lambda head: head[KEY].update(shape=[-24]),
    "size is a truth": lambda head: head[KEY].update(shape=[True]),
    "backwards": lambda head: head[KEY].update(data_offsets=head[KEY]["data_offsets"][::-1]),
    "overlap": lambda head: head[KEY].update(data_offsets=head["lm_head.weight"]["data_offsets"][:1] * 2),
    "shapes changed places": lambda head: _swap(head[KEY], head["lm_head.weight"]),
    "one offset": lambda head: head[KEY].update(data_offsets=[0]),
    "many dimensions": lambda head: head[KEY].update(shape=[1] * 10**5 + [24]),
    "unknown dtype": lambda head: head[KEY].update(dtype="F31"),
    "dtype is a list": lambda head: head[KEY].update(dtype=["F32"]),
    "no dtype": lambda head: head[KEY].pop("dtype"),
    "no entry": lambda head: head.update({KEY: None}),
}


@pytest.mark.parametrize("damage", HEADERS)
def test_headers_that_cannot_be(single: Path, damage: str) -> None:
    with_header(single / "model.safetensors", HEADERS[damage])
    refused(lambda: open_reader(single), "model.safetensors", "damaged" if damage != "unknown dtype" else KEY)


def test_header_lengths_that_cannot_be(single: Path) -> None:
    path = single / "model.safetensors"
    whole = path.read_bytes()
    for length in (0, 1, len(whole), 2**32, 2**40, 2**63, 2**64 - 1):
        path.write_bytes(length.to_bytes(8, "little") + whole[8:])
        refused(lambda: open_reader(single), "model.safetensors", "damaged")
    path.write_bytes(whole[:8] + b'{"a":1,"a":2}' + b" " * (int.from_bytes(whole[:8], "little") - 13) + whole[8:])
    refused(lambda: open_reader(single), "names something twice")
    path.write_bytes((10**7).to_bytes(8, "little") + b"[" * 10**7)
    refused(lambda: open_reader(single), "model.safetensors")


def test_random_damage_of_a_header_is_refused_or_means_the_same(single: Path) -> None:
    path = single / "model.safetensors"
    whole, source = path.read_bytes(), random.Random(0)
    good = SafetensorsFile(path).tensors()
    length, refusals = int.from_bytes(whole[:8], "little") + 8, 0
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(source.randint(1, 3)):
            damaged[source.randrange(length)] = source.randrange(256)
        path.write_bytes(damaged)
        try:
            found = SafetensorsFile(path)
        except UserError:
            refusals += 1
            continue
        assert sum(info.nbytes for info in found.tensors().values()) == sum(info.nbytes for info in good.values())
        for key, info in found.tensors().items():
            assert found.read(key, tuple(slice(0, size) for size in info.shape)).shape == info.shape
        found.close()
    assert refusals > 100


def test_a_flipped_bit_of_ours_is_found_before_the_shard_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_writer, "SHARD_BYTES", 2_500_000)
    config = {**CONFIGS["llama"], "hidden_size": 384, "vocab_size": 2048, "intermediate_size": 1024}
    spec = spec_from_config({**config, "head_dim": 96}, "wide")
    run = write(tmp_path / "ours", "hf", spec, weights(spec))
    path = shard(run, 0)  # the embedding
    assert path.stat().st_size > 2**20  # small files are hashed when they are opened
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    assert inspect(run)["format"] == "hf"
    reader = open_reader(run)
    refused(lambda: reader.read("weight/model.embed_tokens.weight", (slice(0, 1), slice(0, 1))), path.name)
    assert reader.read("weight/lm_head.weight").shape == (2048, 384)
    reader.close()
    refused(lambda: convert(run, tmp_path / "copy", "hf"), path.name, "checksum")
    assert not list(tmp_path.glob("copy*"))
    (run / "config.json").write_text("{}")
    refused(lambda: open_reader(run), "config.json")
