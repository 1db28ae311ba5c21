"""Language models in Megatron's formats: megatron-core reads what is written here, and what it writes is read here."""

from __future__ import annotations

import argparse
import json
import pickle
import random
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from compt_megatron.checkpoint.api import check, convert, inspect, weight_hash
from compt_megatron.checkpoint.contract import Layout, TensorInfo, Writer, slabs
from compt_megatron.checkpoint.dcp_metadata import dcp_metadata_bytes, read_dcp_metadata
from compt_megatron.checkpoint.formats import detect, open_reader, open_writer
from compt_megatron.checkpoint.torch_dist import ChunkFiles
from compt_megatron.errors import UserError
from compt_megatron.spec.table import ModelSpec
from tests.unit.checkpoint_samples import CLIP, Values, infos, row_share, training_state, weights, write, write_together
from tests.unit.lm_helpers import gpt2, llama, logits, make_spec, perturbed, probe, split_state

CONFIGS = {
    "llama": llama(),
    "llama-biases": llama(attention_bias=True, mlp_bias=True, groups=4),
    "qwen2-tied": llama(model_type="qwen2", tie_word_embeddings=True, groups=1),
    "qwen3": llama(model_type="qwen3", head=8),
    "gpt2": gpt2(),
    "gpt2-untied": gpt2(tie_word_embeddings=False, width=32),
}
SPECS = {name: make_spec(config, name) for name, config in CONFIGS.items()}


@cache
def model(name: str) -> tuple[Any, Values]:
    """transformers' model and its canonical tensors."""
    found = perturbed(CONFIGS[name])
    state = split_state(SPECS[name], dict(found.state_dict()))
    return found, {f"weight/{key}": value for key, value in state.items()}


def written(path: Path, name: str, format: str = "megatron", layout: Layout | None = None, piece: int = 2048) -> Path:
    """A model's weights in pieces of so many bytes, in random order."""
    values = model(name)[1]
    writer = open_writer(path, format, SPECS[name], layout=layout)
    writer.declare(infos(values))
    pieces = [(key, region) for key, value in values.items() for region in slabs(infos(values)[key], piece)]
    random.Random(0).shuffle(pieces)
    for key, region in pieces:
        writer.write(key, tuple(part.start for part in region), values[key][region])
    return writer.commit({})


def assert_holds(path: Path, values: Values, spec: ModelSpec | None = None) -> dict[str, Any]:
    """Every tensor is there, whole and in slices; returns the metadata."""
    reader = open_reader(path, spec)
    try:
        assert {key for key in reader.tensors() if key.startswith("weight/")} == values.keys()
        for key, value in values.items():
            assert reader.tensors()[key] == TensorInfo(tuple(value.shape), value.dtype)
            assert torch.equal(reader.read(key), value), key
            region = tuple(slice(size // 3, size - size // 4) for size in value.shape)
            assert torch.equal(reader.read(key, region), value[region]), key
        return reader.metadata()
    finally:
        reader.close()


# -- layouts


@pytest.mark.parametrize("name", SPECS)
def test_every_layout_holds_the_same_tensors(tmp_path: Path, name: str) -> None:
    hashes = set()
    groups = SPECS[name].towers["text"].groups
    for layout in (Layout(), Layout(pipeline=2), *(Layout(n, n) for n in (2,) if groups % n == 0)):
        path = written(tmp_path / f"{layout.tensor}x{layout.pipeline}", name, layout=layout)
        files = {f"__{rank}_0.distcp" for rank in range(layout.tensor * layout.pipeline)}
        assert {file.name for file in path.glob("*.distcp")} == files
        known = assert_holds(path, model(name)[1])
        expected = {"tensor": layout.tensor, "pipeline": layout.pipeline}
        assert known["layout"] == (None if layout == Layout() else expected)
        reader = open_reader(path)
        hashes.add(weight_hash(reader))
        reader.close()
    check(path)
    assert len(hashes) == 1


def test_a_rank_has_its_own_layers_and_its_own_part(tmp_path: Path) -> None:
    """Rank 1 of tensor 2 x pipeline 2: the second half of what the first layer splits."""
    path = written(tmp_path / "run", "llama", layout=Layout(2, 2), piece=2**20)
    found = read_dcp_metadata(path / ".metadata", False)
    boxes: dict[str, list[tuple[list[int], list[int]]]] = {}
    for index, place in found.storage_data.items():
        if place.relative_path == "__1_0.distcp" and "_extra_state" not in index.fqn:
            chunks = found.state_dict_metadata[index.fqn].chunks
            sizes = next(list(chunk.sizes) for chunk in chunks if chunk.offsets == index.offset)
            boxes.setdefault(index.fqn, []).append((list(index.offset), sizes))
    layers = "decoder.layers."
    assert {key: sorted(found) for key, found in boxes.items()} == {
        "embedding.word_embeddings.weight": [([31, 0], [30, 24])],
        f"{layers}self_attention.linear_qkv.weight": [([0, 24, 0], [1, 24, 24])],
        f"{layers}self_attention.linear_proj.weight": [([0, 0, 12], [1, 24, 12])],
        f"{layers}mlp.linear_fc1.weight": [([0, 20, 0], [1, 20, 24]), ([0, 60, 0], [1, 20, 24])],
        f"{layers}mlp.linear_fc2.weight": [([0, 0, 20], [1, 24, 20])],
    }


def test_workers_share_a_layout(tmp_path: Path) -> None:
    """Three workers, each with rows of every tensor: more files, the same checkpoint; CLIP's optimizer state too."""
    for spec, layout in ((CLIP, Layout()), (SPECS["gpt2"], Layout(2, 2))):
        path, values = tmp_path / spec.name, training_state(spec)

        def body(writer: Writer, rank: int, values: Values = values) -> None:
            writer.declare(infos(values))
            for key, value in values.items():
                if (share := row_share(value, rank, 3)) is not None:
                    writer.write(key, *share)
            writer.commit({})

        assert write_together(path, "megatron", spec, 3, body, layout) == [None] * 3
        check(path)
        reader = open_reader(path)
        assert reader.tensors() == infos(values)
        assert all(torch.equal(reader.read(key), value) for key, value in values.items())
        assert len(list(path.glob("*.distcp"))) == 3 * layout.tensor * layout.pipeline
        reader.close()


@pytest.mark.parametrize(
    ("spec", "layout", "reason", "nearest"),
    [
        (SPECS["llama"], Layout(tensor=4), "2 query groups", "tensor 2, pipeline 1"),
        (SPECS["llama"], Layout(pipeline=3), "2 layers", "tensor 1, pipeline 2"),
        (SPECS["gpt2"], Layout(tensor=3, pipeline=2), "4 heads", "tensor 2, pipeline 2"),
        (CLIP, Layout(pipeline=3), "text tower has 2 layers", "tensor 1, pipeline 1"),
        (CLIP, Layout(tensor=2), "text tower has 3 heads", "tensor 1, pipeline 1"),
        (SPECS["llama"], Layout(tensor=0), "at least 1", "tensor 1, pipeline 1"),
        (make_spec(llama(mlp=41)), Layout(tensor=2), "41 MLP units", "tensor 1, pipeline 1"),
    ],
)
def test_an_impossible_layout_is_refused(
    tmp_path: Path, spec: ModelSpec, layout: Layout, reason: str, nearest: str
) -> None:
    with pytest.raises(UserError, match=rf"{reason}.*the nearest layout that works is {nearest}"):
        open_writer(tmp_path / "run", "megatron", spec, layout=layout)
    assert list(tmp_path.iterdir()) == []


# -- what megatron-core reads and writes


@pytest.fixture
def gpt() -> Any:
    pytest.importorskip("megatron.core")
    from tests.unit import megatron_gpt

    megatron_gpt.ready()
    return megatron_gpt


@pytest.mark.parametrize("name", SPECS)
def test_megatron_core_computes_what_transformers_does(tmp_path: Path, gpt: Any, name: str) -> None:
    """It loads the model from a folder of another layout, and what it saves comes back bit for bit."""
    theirs, values = model(name)
    layout = Layout(2, 2) if SPECS[name].towers["text"].groups % 2 == 0 else Layout(1, 2)
    made = gpt.build(SPECS[name])
    assert gpt.load(made, written(tmp_path / "run", name, layout=layout))["iteration"] == 0
    assert (gpt.logits(made, probe()) - logits(theirs)).abs().max() < 1e-5
    saved = gpt.save(tmp_path / "saved", {"model": gpt.sharded(made), "iteration": 5})
    known = assert_holds(saved, values, SPECS[name])
    assert known["train"]["step"] == 5
    assert known["notes"] == []


@pytest.mark.parametrize("options", [{"non_homogeneous_layers": True}, {"singleton_local_shards": True}])
def test_keys_layer_by_layer(tmp_path: Path, gpt: Any, options: dict[str, bool]) -> None:
    made = gpt.build(SPECS["llama"])
    gpt.load(made, written(tmp_path / "run", "llama"))
    saved = gpt.save(tmp_path / "saved", {"model": gpt.sharded(made, **options)})
    keys = read_dcp_metadata(saved / ".metadata", False).state_dict_metadata
    assert "decoder.layers.1.self_attention.linear_qkv.weight" in keys
    assert ("decoder.layers.1.mlp.linear_fc1.weight_w" in keys) == ("singleton_local_shards" in options)
    assert_holds(saved, model("llama")[1], SPECS["llama"])


@pytest.mark.parametrize("kind", [None, "fully_reshardable", "dp_reshardable"])
def test_optimizer_state(tmp_path: Path, gpt: Any, kind: str | None) -> None:
    """Without and with the distributed optimizer; flat buckets are left out, and that is said."""
    from compt_megatron.models.state import split_fused

    spec, made = SPECS["llama"], gpt.build(SPECS["llama"])
    gpt.load(made, written(tmp_path / "run", "llama"))
    optimizer, state = gpt.train_step(made, kind)
    saved = gpt.save(tmp_path / "saved", state, **({"distrib_optim_sharding_type": kind} if kind else {}))
    reader = open_reader(saved, spec)
    found = {key.split("/")[0] for key in reader.tensors()}
    if kind == "dp_reshardable":
        assert found == {"weight"}
        assert any("dp_reshardable" in note for note in reader.metadata()["notes"])
        return
    assert found == {"weight", "exp_avg", "exp_avg_sq", "step"} | ({"master"} if kind else set())
    moments = gpt.moments(made, optimizer)
    assert moments
    for module_name, states in moments.items():
        for prefix, value in states.items():
            for name, part in split_fused(spec, module_name, value).items():
                assert torch.equal(reader.read(f"{prefix}/{name}"), part), (prefix, name)
    assert all(reader.read(f"step/{name}") == 1 for name in spec.params)
    reader.close()
    convert(saved, tmp_path / "run2", "megatron", spec=spec)
    check(tmp_path / "run2")


def test_the_layout_of_version_0_19(tmp_path: Path, gpt: Any) -> None:
    """Common state as an object among the tensors, as megatron-core 0.19.2 was seen to write it."""
    made = gpt.build(SPECS["gpt2"])
    gpt.load(made, written(tmp_path / "run", "gpt2"))
    args = argparse.Namespace(tensor_model_parallel_size=1, consumed_train_samples=90, num_layers=2)
    saved = gpt.save(tmp_path / "saved", {"model": gpt.sharded(made), "iteration": 5, "args": args})
    if (saved / "common.pt").exists():  # else that is the version here
        _as_version_0_19(saved)
    known = assert_holds(saved, model("gpt2")[1], SPECS["gpt2"])
    assert known["train"] == {"step": 5, "samples": 90}
    assert known["layout"] == {"tensor": 1}


def _as_version_0_19(folder: Path) -> None:
    common = torch.load(folder / "common.pt", weights_only=False)
    files = ChunkFiles(folder, 9)
    files.write_object(0, "common_state/shard_0_1", [common])
    files.finish()
    found = pickle.loads((folder / ".metadata").read_bytes())
    added = pickle.loads(dcp_metadata_bytes({}, [], files.blobs))
    found.state_dict_metadata.update(added.state_dict_metadata)
    found.storage_data.update(added.storage_data)
    found.planner_data = found.all_local_plans = None
    (folder / ".metadata").write_bytes(pickle.dumps(found))
    (folder / "common.pt").unlink()
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))


def test_what_else_a_job_saves_is_left_out(tmp_path: Path, gpt: Any) -> None:
    """Random states and a padded vocabulary; the model comes from a config.json beside, the folder from the tracker."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

    made = gpt.build(SPECS["llama"], vocab=128)
    root = tmp_path / "job"
    loaded = gpt.load(made, written(tmp_path / "lm", "llama", "megatron-lm") / "iter_0000000")
    state = {
        "model": gpt.sharded(made),
        "iteration": 100,
        "args": argparse.Namespace(**{**vars(loaded["args"]), "tensor_model_parallel_size": 1, "rotary_base": 5}),
        "rng_state": ShardedObject("rng_state", [{"torch_rng_state": torch.get_rng_state()}], (1,), (0,)),
        "other": ShardedTensor.from_rank_offsets("rerun_state.x", torch.ones(3)),
    }
    gpt.save(root / "iter_0000100", state)
    (root / "latest_checkpointed_iteration.txt").write_text("100\n")
    (root / "config.json").write_text(json.dumps(CONFIGS["llama"]))
    assert detect(root) == "megatron-lm"
    notes = assert_holds(root, model("llama")[1])["notes"]
    assert any("67 rows of padding" in note for note in notes)
    assert any("rerun_state.x" in note for note in notes)
    assert any("rotary_base 5" in note for note in notes)
    assert_holds(root / "iter_0000100", model("llama")[1])
    shown = inspect(root)
    assert shown["notes"] == notes
    assert shown["layout"] == {"tensor": 1, "pipeline": 1, "data": 1}


# -- Megatron-LM's --load


def test_megatron_lm_loads_the_result(tmp_path: Path, gpt: Any) -> None:
    """The arguments build the model, the vocabulary is padded, the padding is no likelier than a real token."""
    for name in ("llama", "gpt2"):
        theirs, values = model(name)
        path = written(tmp_path / name, name, "megatron-lm", Layout(2, 1))
        assert (path / "latest_checkpointed_iteration.txt").read_text().strip() == "0"
        made = gpt.build(SPECS[name], vocab=256)
        common = gpt.load(made, path / "iter_0000000")
        args = common["args"]
        assert (args.padded_vocab_size, args.tensor_model_parallel_size, common["checkpoint_version"]) == (256, 2, 3.0)
        assert (args.num_layers, args.hidden_size, args.num_attention_heads, args.swiglu) == (2, 24, 4, name == "llama")
        found = gpt.logits(made, probe())
        assert (found[..., :61] - logits(theirs)).abs().max() < 1e-5
        assert torch.equal(found[..., 61:], found[..., 60:61].expand(*found.shape[:2], 195))
        check(path)
        assert detect(path) == "megatron-lm"
        for place in (path, path / "iter_0000000"):
            assert assert_holds(place, values)["layout"] == {"tensor": 2, "pipeline": 1}
        check(path / "iter_0000000")
    data = next(path.glob("*/__*.distcp"))
    content = data.read_bytes()
    data.write_bytes(content[:-1])
    with pytest.raises(UserError, match="truncated"):
        check(path)
    data.write_bytes(content)
    (path / "iter_0000000" / "more").touch()
    with pytest.raises(UserError, match="'iter_0000000/more' is not part of this checkpoint"):
        check(path)


def test_megatron_lm_is_told_what_its_arguments_do_not_carry(tmp_path: Path) -> None:
    values = model("qwen3")[1]
    path = write(tmp_path / "lm", "megatron-lm", SPECS["qwen3"], values)
    reader = open_reader(path)
    assert any("--qk-layernorm" in note for note in reader.metadata()["notes"])
    reader.close()


@pytest.mark.parametrize(
    ("spec", "message"),
    [(CLIP, "no language model"), (make_spec(llama(attention_bias=True)), "biases in some of its linears only")],
)
def test_models_that_megatron_lm_cannot_be(tmp_path: Path, spec: ModelSpec, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_writer(tmp_path / "run", "megatron-lm", spec)
    assert list(tmp_path.iterdir()) == []


# -- bad input


def _foreign(path: Path, name: str, args: dict[str, Any]) -> Path:
    """A folder as Megatron would leave it: no compt.json, arguments in common.pt."""
    written(path, name)
    (path / "compt.json").unlink()
    torch.save({"iteration": 1, "args": argparse.Namespace(**args)}, path / "common.pt")
    return path


@pytest.mark.parametrize(
    ("args", "config", "message"),
    [
        ({"num_attention_heads": 8}, llama(), "saved with num_attention_heads 8, the model config says 4"),
        ({"swiglu": False}, llama(), "saved with swiglu False"),
        ({}, llama(groups=4), "linear_qkv.weight' has shape"),
        ({}, llama(vocab_size=9000), "has shape"),
        ({}, llama(tie_word_embeddings=True), "also has 'output_layer.weight'"),
        ({}, llama(model_type="qwen3", head=6), "has no 'model.layers.0.self_attn.q_norm.weight'"),
    ],
)
def test_another_models_checkpoint(tmp_path: Path, args: dict[str, Any], config: dict[str, Any], message: str) -> None:
    path = _foreign(tmp_path / "run", "llama", args)
    with pytest.raises(UserError, match=message):
        open_reader(path, make_spec(config))


def test_a_vocabulary_far_too_large_is_no_padding(tmp_path: Path) -> None:
    spec = make_spec(llama(vocab_size=9000, hidden_size=4, heads=1, groups=1, width=4, mlp=4))
    path = write(tmp_path / "run", "megatron", spec, weights(spec))
    (path / "compt.json").unlink()
    with pytest.raises(UserError, match=r"word_embeddings\.weight' has shape"):
        open_reader(path, make_spec(llama(heads=1, groups=1, width=4, mlp=4)))


def test_trackers_that_lead_nowhere(tmp_path: Path) -> None:
    path = _foreign(tmp_path / "job" / "iter_0000003", "llama", {})
    tracker = tmp_path / "job" / "latest_checkpointed_iteration.txt"
    for text, message in (("7", "names iter_0000007, which is not there"), ("seven", "is no iteration")):
        tracker.write_text(text)
        with pytest.raises(UserError, match=message):
            open_reader(tmp_path / "job", SPECS["llama"])
    tracker.write_text("release\n")
    shutil.move(path, tmp_path / "job" / "release")
    assert_holds(tmp_path / "job", model("llama")[1], SPECS["llama"])
    with pytest.raises(UserError, match="does not record which model it holds; name its model config with --from"):
        open_reader(tmp_path / "job")


def test_a_pickle_of_anything_is_data(tmp_path: Path) -> None:
    """Nothing in common.pt runs, whatever classes it names."""
    path = _foreign(tmp_path / "run", "llama", {})
    marker = tmp_path / "ran"
    endless: dict[str, Any] = {}
    endless["state"] = endless
    torch.save({"iteration": 3, "args": _Harmful(str(marker)), "optimizer": endless}, path / "common.pt")
    assert_holds(path, model("llama")[1], SPECS["llama"])
    assert not marker.exists()


class _Harmful:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (Path(self.path),)
