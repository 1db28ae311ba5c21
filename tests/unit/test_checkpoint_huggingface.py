"""Hugging Face folders: what transformers saves is read, what is written is loaded by transformers, nothing is lost."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compt_megatron import cli
from compt_megatron.checkpoint import huggingface_writer
from compt_megatron.checkpoint.api import check, convert, inspect, weight_hash
from compt_megatron.checkpoint.contract import Region, TensorInfo, flat_boxes
from compt_megatron.checkpoint.formats import detect, open_reader, open_writer
from compt_megatron.checkpoint.manifest import MANIFEST, read_manifest
from compt_megatron.errors import UserError
from compt_megatron.growth.api import grow, verify
from compt_megatron.spec.families import spec_from_config
from tests.unit.checkpoint_samples import CLIP, VIT, infos, weights, write, write_together
from tests.unit.hf_samples import CONFIGS, canonical, loaded, logits, saved

GPT2 = spec_from_config(CONFIGS["gpt2"], "gpt2")
LLAMA = spec_from_config(CONFIGS["llama"], "llama")
Values = dict[str, torch.Tensor]


def contents(path: Path, **options: Any) -> Values:
    reader = open_reader(path, **options)
    try:
        return {name: reader.read(name) for name in reader.tensors()}
    finally:
        reader.close()


def same(left: Values, right: Values) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def random_box(shape: tuple[int, ...], source: random.Random) -> Region:
    box = []
    for size in shape:
        start = source.randrange(size)
        box.append(slice(start, source.randint(start + 1, size)))
    return tuple(box)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_transformers_saves_is_read_and_what_is_written_is_loaded(tmp_path: Path, name: str) -> None:
    model = saved(name, tmp_path / "theirs")
    assert len(list((tmp_path / "theirs").glob("model-*.safetensors"))) > 2
    assert detect(tmp_path / "theirs") == "hf"
    want = canonical(model, CONFIGS[name])
    assert same(contents(tmp_path / "theirs"), want)

    assert convert(tmp_path / "theirs", tmp_path / "ours", "hf") == []
    check(tmp_path / "ours")
    assert same(contents(tmp_path / "ours"), want)
    assert torch.equal(logits(loaded(tmp_path / "ours")), logits(model))

    theirs, ours = (json.loads((tmp_path / where / "config.json").read_text()) for where in ("theirs", "ours"))
    added = "n_inner" if name.startswith("gpt2") else "head_dim"
    assert isinstance(ours[added], int)
    assert {key: value for key, value in ours.items() if key not in (added, "torch_dtype")} == {
        key: value for key, value in theirs.items() if key != added
    }


def test_boxes_of_fused_and_plain_tensors_are_theirs(tmp_path: Path) -> None:
    want = canonical(saved("gpt2", tmp_path / "hub"), CONFIGS["gpt2"])
    source = random.Random(0)
    reader = open_reader(tmp_path / "hub")
    for name, value in want.items():
        for _ in range(4):
            box = random_box(tuple(value.shape), source)
            assert torch.equal(reader.read(name, box), value[box]), (name, box)
    name = "weight/transformer.h.1.attn.v_proj.weight"
    assert reader.read(name, (slice(3, 3), slice(0, 5))).shape == (0, 5)
    reader.close()


def test_a_copy_takes_the_tokenizer_along_and_says_what_it_cannot_take(tmp_path: Path) -> None:
    saved("llama", tmp_path / "hub")
    convert(tmp_path / "hub", tmp_path / "copy", "hf")
    for name in ("tokenizer.json", "tokenizer.model", "generation_config.json"):
        assert (tmp_path / "copy" / name).read_bytes() == (tmp_path / "hub" / name).read_bytes()
    grow(tmp_path / "hub", tmp_path / "grown", _wider())
    assert (tmp_path / "grown" / "tokenizer.model").read_bytes() == bytes(range(256))
    for folder in ("copy", "grown"):
        record = json.loads((tmp_path / folder / MANIFEST).read_text())
        assert "attachments" not in record
        assert "tokenizer.json" in record["checksums"]
    check(tmp_path / "grown")
    assert verify(tmp_path / "grown").ok
    left_out = "left out: generation_config.json, tokenizer.json, tokenizer.model, the result has no place for them"
    assert convert(tmp_path / "copy", tmp_path / "one.safetensors", "hf") == [left_out]


@pytest.mark.parametrize("place", ["megatron", "megatron-lm", "deepspeed", "one.safetensors"])
def test_files_that_the_result_has_no_place_for_are_said(
    tmp_path: Path, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Grown or converted: on the screen and in the notes."""
    saved("llama", tmp_path / "hub")
    (tmp_path / "hub" / "tekken.json").write_text("{}")
    (tmp_path / "wider.json").write_text(json.dumps(_wider().config))
    names = "generation_config.json, tekken.json, tokenizer.json, tokenizer.model"
    line = f"left out: {names}, the result has no place for them"
    form = "hf" if place.endswith(".safetensors") else place
    for command, options in (("grow", ["--to", str(tmp_path / "wider.json")]), ("convert", [])):
        target = tmp_path / command / place
        assert cli.main([command, str(tmp_path / "hub"), str(target), "--format", form, *options]) == 0
        assert line in capsys.readouterr().out.splitlines()
        assert line in (read_manifest(target) or {})["notes"]
    assert (
        cli.main(["grow", str(tmp_path / "hub"), str(tmp_path / "folder"), "--to", str(tmp_path / "wider.json")]) == 0
    )
    assert "left out" not in capsys.readouterr().out
    assert (tmp_path / "folder" / "tekken.json").read_text() == "{}"


def _wider() -> Any:
    config = {**CONFIGS["llama"], "hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 3}
    return spec_from_config({**config, "intermediate_size": 56, "head_dim": 6, "num_hidden_layers": 3}, "wider")


def test_a_grown_folder_computes_the_same_logits_in_transformers(tmp_path: Path) -> None:
    model = saved("llama", tmp_path / "small")
    grow(tmp_path / "small", tmp_path / "large", _wider())
    a, b = logits(model).double(), logits(loaded(tmp_path / "large")).double()
    assert (b - a).norm() / a.norm() < 5e-5


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_shards_are_cut_by_size_and_indexed(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = saved(name, tmp_path / "hub")
    monkeypatch.setattr(huggingface_writer, "SHARD_BYTES", 8000)
    convert(tmp_path / "hub", tmp_path / "sharded", "hf")
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "sharded").glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == files
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert len(files) > 3
    sizes = {}
    for file in files:
        held = load_file(tmp_path / "sharded" / file)
        assert held.keys() == {key for key, where in index["weight_map"].items() if where == file}
        sizes[file] = [tensor.nbytes for tensor in held.values()]
    assert all(sum(each) <= 8000 or len(each) == 1 for each in sizes.values())
    assert index["metadata"]["total_size"] == sum(map(sum, sizes.values()))
    assert torch.equal(logits(loaded(tmp_path / "sharded")), logits(model))
    check(tmp_path / "sharded")


@pytest.mark.parametrize("limit", [2**27, 0])
def test_ranks_fill_the_files_together_with_any_boxes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr(huggingface_writer, "SHARD_BYTES", 8000)
    monkeypatch.setattr(huggingface_writer, "_PENDING_LIMIT", limit)
    values = weights(GPT2, torch.bfloat16)
    one = write(tmp_path / "one", "hf", GPT2, values)

    def body(writer: Any, rank: int) -> None:
        writer.declare(infos(values))
        for name, value in random.Random(rank).sample(sorted(values.items()), len(values)):
            share = value.numel() * rank // 3, value.numel() * (rank + 1) // 3
            for box, _ in flat_boxes(tuple(value.shape), *share):  # parts of rows, as ZeRO's partitions have them
                writer.write(name, tuple(part.start for part in box), value[box])
        writer.commit({})

    assert write_together(tmp_path / "three", "hf", GPT2, 3, body) == [None] * 3
    check(tmp_path / "three")
    for file in one.iterdir():
        assert file.read_bytes() == (tmp_path / "three" / file.name).read_bytes(), file.name


def test_the_dtype_is_said_as_both_versions_of_transformers_read_it(tmp_path: Path) -> None:
    model = saved("gpt2", tmp_path / "hub")
    assert (
        cli.main(["convert", str(tmp_path / "hub"), str(tmp_path / "half"), "--format", "hf", "--dtype", "bfloat16"])
        == 0
    )
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    assert (config["torch_dtype"], config["dtype"]) == ("bfloat16", "bfloat16")
    half = loaded(tmp_path / "half")
    assert half.dtype == torch.bfloat16
    state = model.state_dict()
    assert all(torch.equal(value, state[key].bfloat16()) for key, value in half.state_dict().items())
    older = {key: value for key, value in GPT2.config.items() if key != "dtype"}
    write(tmp_path / "older", "hf", spec_from_config(older, "gpt2"), weights(GPT2, torch.float16))
    config = json.loads((tmp_path / "older" / "config.json").read_text())
    assert config["torch_dtype"] == "float16"
    assert "dtype" not in config
    assert config["architectures"] == ["GPT2LMHeadModel"]
    # the config of the model itself is not touched: back in fp32 it is what it was
    convert(tmp_path / "half", tmp_path / "back", "hf", dtype=torch.float32)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "float32"


def test_an_export_is_what_transformers_loads(tmp_path: Path) -> None:
    model = saved("qwen3", tmp_path / "hub")
    write(tmp_path / "run", "megatron", CLIP, weights(CLIP))
    assert cli.main(["export", str(tmp_path / "hub"), str(tmp_path / "out"), "--format", "hf"]) == 0
    assert torch.equal(logits(loaded(tmp_path / "out")), logits(model))
    assert (tmp_path / "out" / "tokenizer.model").is_file()
    assert cli.main(["export", str(tmp_path / "run"), str(tmp_path / "no"), "--format", "hf"]) == 2
    assert not list(tmp_path.glob("no*"))


def test_inspect_of_a_folder_reads_its_description_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved("qwen2", tmp_path / "hub")
    seen = inspect(tmp_path / "hub")
    assert (seen["format"], seen["model"]["family"], seen["model"]["name"]) == ("hf", "llama", "hub")
    assert seen["summary"]["weight"]["bytes"] == 4 * seen["model"]["parameters"]
    json.dumps(seen)
    assert cli.main(["inspect", str(tmp_path / "hub")]) == 0
    assert "float32" in capsys.readouterr().out


def stored_as(name: str, folder: Path, change: Any, file: str = "model.safetensors") -> Values:
    """A folder with one file of weights whose state dict `change` has changed; returns the canonical tensors."""
    model = saved(name, folder, shard="1GB")
    state = change({key: value.clone() for key, value in load_file(folder / "model.safetensors").items()})
    (folder / "model.safetensors").unlink()
    if file.endswith(".safetensors"):
        save_file(state, folder / file, {"format": "pt"})
    else:
        torch.save(state, folder / file)
    return canonical(model, CONFIGS[name])


def _as_hub(state: Values) -> Values:
    """As the hub's `gpt2` is stored: without prefix, with causal masks."""
    bare = {key.removeprefix("transformer."): value for key, value in state.items()}
    masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 32, 32).tril() for layer in range(2)}
    return bare | masks | {f"h.{layer}.attn.masked_bias": torch.tensor(-1e4) for layer in range(2)}


VARIATIONS: dict[str, tuple[str, Any]] = {
    "gpt2 as on the hub": ("gpt2", _as_hub),
    "llama without prefix": ("llama", lambda state: {key.removeprefix("model."): v for key, v in state.items()}),
    "wrapped": ("llama", lambda state: {f"module.{key}": value for key, value in state.items()}),
    "rotary tables": (
        "llama",
        lambda state: state | {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(3) for n in range(2)},
    ),
    "head stored twice": (
        "qwen3",
        lambda state: state | {"lm_head.weight": state["model.embed_tokens.weight"].clone()},
    ),
    "head stored instead": (
        "llama-tied-biases",
        lambda state: {("lm_head.weight" if "embed" in key else key): value for key, value in state.items()},
    ),
}


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("variation", VARIATIONS)
def test_the_ways_in_which_people_store_models_are_read(tmp_path: Path, variation: str, file: str) -> None:
    name, change = VARIATIONS[variation]
    want = stored_as(name, tmp_path / "hub", change, file)
    assert same(contents(tmp_path / "hub"), want)
    check(tmp_path / "hub")


def test_a_tied_head_that_differs_from_the_embedding_is_refused_before_it_is_used(tmp_path: Path) -> None:
    def change(state: Values) -> Values:
        head = state["model.embed_tokens.weight"].clone()
        head[60, 23] += 1
        return state | {"lm_head.weight": head}

    stored_as("qwen3", tmp_path / "hub", change)
    assert inspect(tmp_path / "hub")["format"] == "hf"
    with pytest.raises(UserError, match=r"'lm_head.weight' differs from 'model.embed_tokens.weight'.*'tie_word_emb"):
        convert(tmp_path / "hub", tmp_path / "copy", "hf")
    assert not list(tmp_path.glob("copy*"))


def test_safetensors_are_preferred_to_the_older_files_beside_them(tmp_path: Path) -> None:
    model = saved("gpt2", tmp_path / "hub")
    other = {key: torch.zeros_like(value) for key, value in model.state_dict().items()}
    torch.save(other, tmp_path / "hub" / "pytorch_model.bin")
    assert same(contents(tmp_path / "hub"), canonical(model, CONFIGS["gpt2"]))
    for path in (tmp_path / "hub").glob("model*"):
        path.unlink()
    assert not any(value.any() for value in contents(tmp_path / "hub").values())


def test_older_files_in_shards_and_of_old_torch(tmp_path: Path) -> None:
    want = canonical(saved("llama", tmp_path / "hub"), CONFIGS["llama"])
    for path in (tmp_path / "hub").glob("model-*"):
        where = path.with_name(path.name.replace("model-", "pytorch_model-").replace(".safetensors", ".bin"))
        torch.save(load_file(path), where, _use_new_zipfile_serialization="00001" not in path.name)
        path.unlink()
    index = tmp_path / "hub" / "model.safetensors.index.json"
    text = index.read_text().replace('"model-', '"pytorch_model-').replace('.safetensors"', '.bin"')
    index.with_name("pytorch_model.bin.index.json").write_text(text)
    index.unlink()
    assert same(contents(tmp_path / "hub"), want)


def test_one_file_alone_beside_a_config_or_with_a_named_model(tmp_path: Path) -> None:
    model = saved("gpt2", tmp_path / "hub", shard="1GB")
    want = canonical(model, CONFIGS["gpt2"])
    file = tmp_path / "hub" / "model.safetensors"
    assert detect(file) == "hf"
    assert same(contents(file), want)
    for name in ("alone.safetensors", "alone.pt", "bare.safetensors"):
        alone = tmp_path / name
        state = model.transformer.state_dict() if name.startswith("bare") else load_file(file)
        save_file(state, alone) if alone.suffix == ".safetensors" else torch.save(state, alone)
        assert detect(alone) == "hf", name
        with pytest.raises(UserError, match=r"has no config.json; .*--from"):
            open_reader(alone)
        with pytest.raises(UserError, match="holds a language model, and 'clip-tiny' is none"):
            open_reader(alone, CLIP)
        assert same(contents(alone, spec=GPT2), want), name
    convert(tmp_path / "hub", tmp_path / "one.safetensors", "hf")
    (tmp_path / "one.safetensors").rename(tmp_path / "other.safetensors")
    (tmp_path / f"one.safetensors.{MANIFEST}").rename(tmp_path / f"other.safetensors.{MANIFEST}")
    check(tmp_path / "other.safetensors")
    assert same(contents(tmp_path / "other.safetensors"), want)


def test_open_clip_files_stay_open_clips(tmp_path: Path) -> None:
    for spec, name in ((CLIP, "a.pt"), (CLIP, "b.safetensors"), (VIT, "c.safetensors"), (VIT, "folder")):
        assert detect(write(tmp_path / name, "open_clip", spec, weights(spec))) == "open_clip"
    hub = tmp_path / "folder"  # as open_clip's models lie on the hub: transformers' own CLIP beside
    (hub / "config.json").write_text('{"model_type": "clip"}')
    shutil.copy(hub / "open_clip_model.safetensors", hub / "model.safetensors")
    assert detect(hub) == "open_clip"
    with pytest.raises(UserError, match="'clip-tiny' is none"):
        open_writer(tmp_path / "x", "hf", CLIP)
    with pytest.raises(UserError, match="open_clip has no language models"):
        open_writer(tmp_path / "x", "open_clip", LLAMA)
    with pytest.raises(UserError, match=r"one .safetensors file"):
        open_writer(tmp_path / "x.pt", "hf", LLAMA)
    writer = open_writer(tmp_path / "x", "hf", LLAMA)
    with pytest.raises(UserError, match="weights only, 'exp_avg/x' has no place"):
        writer.declare({"exp_avg/x": TensorInfo((1,), torch.float32)})
    writer.abort()
    assert not list(tmp_path.glob("x*"))


def test_weights_are_the_same_by_their_hash_whatever_file_holds_them(tmp_path: Path) -> None:
    saved("gpt2", tmp_path / "hub")
    convert(tmp_path / "hub", tmp_path / "one.safetensors", "hf")
    hashes = {weight_hash(open_reader(tmp_path / name)) for name in ("hub", "one.safetensors")}
    assert len(hashes) == 1


_COLUMNS = """
import resource, sys
from pathlib import Path
from compt_megatron.checkpoint.state_file import open_state_file
files = [open_state_file(Path(name)) for name in sys.argv[1:]]
for file in files:
    file.read("w", (slice(0, 1), slice(0, 1)))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for file in files:
    print(sum(file.read("w", (slice(0, 2**14), slice(at, at + 256))).sum().item() for at in range(0, 1024, 256)))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_a_box_of_columns_takes_the_memory_of_the_box(tmp_path: Path) -> None:
    state = {"w": torch.ones(2**14, 2**10)}  # 64 MiB; a box of 256 columns is 16 MiB
    save_file(state, tmp_path / "w.safetensors")
    torch.save(state, tmp_path / "w.bin")
    command = [sys.executable, "-c", _COLUMNS, str(tmp_path / "w.safetensors"), str(tmp_path / "w.bin")]
    *totals, grown = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert [float(total) for total in totals] == [2**24, 2**24]
    assert int(grown) < 16 + 4 + 12  # MiB: the box, a block, the allocator's slack


class _Note:
    """Stands for what a trainer leaves beside the weights."""


def test_an_older_file_with_objects_is_read_where_its_writer_is_trusted(tmp_path: Path) -> None:
    saved("gpt2", tmp_path / "hub", shard="1GB")
    want = contents(tmp_path / "hub")
    state = load_file(tmp_path / "hub" / "model.safetensors")
    (tmp_path / "hub" / "model.safetensors").unlink()
    torch.save({"state_dict": state, "note": _Note()}, tmp_path / "hub" / "pytorch_model.bin")
    with pytest.raises(UserError, match="--trust-pickle"):
        open_reader(tmp_path / "hub")
    assert same(contents(tmp_path / "hub", trust_pickle=True), want)
