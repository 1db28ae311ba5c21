"""A box of a tensor is the same box of the whole tensor, read from any format, written in any pieces."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compt_megatron.checkpoint import megatron_writer
from compt_megatron.checkpoint.api import check, weight_hash
from compt_megatron.checkpoint.contract import Reader, Region, TensorInfo, flat_boxes, region_shape, slabs
from compt_megatron.checkpoint.formats import open_reader, open_writer
from compt_megatron.checkpoint.megatron_keys import MegatronKeys
from compt_megatron.spec.families import spec_from_config
from tests.unit.checkpoint_samples import CLIP, Values, infos, row_share, training_state, weights, write, write_together

VALUES = training_state(CLIP)


@pytest.fixture(scope="module", params=["megatron", "folder", "file.pt", "by_columns", "columns.safetensors"])
def stored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Reader, Values]]:
    path = tmp_path_factory.mktemp("stored") / request.param
    values = weights(CLIP, torch.bfloat16)
    if request.param in ("megatron", "by_columns"):
        values = VALUES
    if "columns" in request.param:
        _write_columns(path, "open_clip" if path.suffix else "megatron", values)
    else:
        write(path, "megatron" if values is VALUES else "open_clip", CLIP, values)
    reader = open_reader(path)
    yield reader, values
    reader.close()


def _write_columns(path: Path, format: str, values: Values) -> None:
    """Every matrix in two pieces along its last dimension, in random order."""
    writer = open_writer(path, format, CLIP)
    writer.declare(infos(values))
    pieces = []
    for name, value in values.items():
        half = value.shape[-1] // 2 if value.dim() > 1 else 0
        pieces.append((name, (0,) * value.dim(), value[..., :half] if half else value))
        if half:
            pieces.append((name, (*(0,) * (value.dim() - 1), half), value[..., half:]))
    random.Random(0).shuffle(pieces)
    for name, offsets, piece in pieces:
        writer.write(name, offsets, piece)
    writer.commit({})


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_any_region_is_that_slice_of_the_whole(stored: tuple[Reader, Values], data: st.DataObject) -> None:
    reader, values = stored
    name = data.draw(st.sampled_from(sorted(values)))
    region = data.draw(_regions(tuple(values[name].shape)))
    read = reader.read(name, region)
    assert read.dtype == values[name].dtype
    assert read.is_contiguous()
    assert torch.equal(read, values[name][region])


@st.composite
def _regions(draw: st.DrawFn, shape: tuple[int, ...]) -> Region:
    parts = []
    for size in shape:
        start = draw(st.integers(0, size))
        parts.append(slice(start, draw(st.integers(start, size))))
    return tuple(parts)


def test_reading_a_slice_reads_only_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = open_reader(write(tmp_path / "run", "megatron", CLIP, VALUES))
    name = "master/visual.transformer.resblocks.1.attn.k_proj.weight"
    reader.read(name)  # checks the file and finds the tensor
    counts = []
    monkeypatch.setattr("os.preadv", _counting(counts, os.preadv))
    reader.read(name, (slice(3, 5), slice(0, 32)))
    assert sum(counts) == 2 * 32 * 4


def _counting(counts: list[int], real):  # type: ignore[no-untyped-def]
    def preadv(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        count = real(descriptor, buffers, offset)
        counts.append(count)
        return count

    return preadv


def test_any_number_of_writers_makes_the_same_checkpoint(tmp_path: Path) -> None:
    hashes = set()
    for world in (1, 2, 3):
        path = tmp_path / f"world{world}"

        def body(writer, rank: int, world: int = world) -> None:  # type: ignore[no-untyped-def]
            writer.declare(infos(VALUES))
            names = list(VALUES)
            random.Random(rank).shuffle(names)
            for name in names:
                if (share := row_share(VALUES[name], rank, world)) is not None:
                    writer.write(name, *share)
            writer.commit({"layout": {"data": world}})

        assert write_together(path, "megatron", CLIP, world, body) == [None] * world
        check(path)
        reader = open_reader(path)
        assert reader.tensors() == infos(VALUES)
        for name, value in VALUES.items():
            assert torch.equal(reader.read(name), value), name
        hashes.add(weight_hash(reader))
        assert len(list(path.glob("*.distcp"))) == world
    assert len(hashes) == 1


@pytest.mark.parametrize("name", ["folder", "file.pt"])
def test_ranks_fill_one_open_clip_file(tmp_path: Path, name: str) -> None:
    values = weights(CLIP)

    def body(writer, rank: int) -> None:  # type: ignore[no-untyped-def]
        writer.declare(infos(values))
        for key, value in values.items():
            if (share := row_share(value, rank, 2)) is not None:
                writer.write(key, *share)
        writer.commit({})

    assert write_together(tmp_path / f"two_{name}", "open_clip", CLIP, 2, body) == [None, None]
    one = write(tmp_path / f"one_{name}", "open_clip", CLIP, values)
    check(tmp_path / f"two_{name}")
    files = [one] if one.is_file() else sorted(one.iterdir())
    for file in files:
        other = tmp_path / f"two_{name}" / ("" if one.is_file() else file.name)
        assert file.read_bytes() == other.read_bytes(), file.name


def test_few_boxes_where_a_rank_has_whole_layers_and_no_more_memory_than_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = weights(CLIP)
    key = "vision.decoder.layers.self_attention.linear_qkv.weight"
    counts = {}
    for limit in (2**28, 0):
        monkeypatch.setattr(megatron_writer, "_PENDING_LIMIT", limit)
        path = write(tmp_path / f"limit{limit}", "megatron", CLIP, values)
        reader = open_reader(path)
        assert all(torch.equal(reader.read(name), value) for name, value in values.items())
        counts[limit] = len(reader._folder._chunks[key]._chunks)  # type: ignore[attr-defined]
    assert counts == {2**28: 3, 0: 3 * 3 * 4}  # one a layer; one for every head of q, k and v


@given(st.lists(st.integers(1, 5), max_size=4), st.data())
@settings(max_examples=200, deadline=None)
def test_flat_boxes_are_the_flat_range(sizes: list[int], data: st.DataObject) -> None:
    shape = tuple(sizes)
    value = torch.arange(int(torch.tensor(shape).prod()) if shape else 1).reshape(shape)
    start = data.draw(st.integers(0, value.numel()))
    stop = data.draw(st.integers(start, value.numel()))
    found = torch.full((stop - start,), -1)
    boxes = list(flat_boxes(shape, start, stop))
    for box, flat in boxes:
        assert (found[flat] == -1).all()
        found[flat] = value[box].flatten()
    assert torch.equal(found, value.flatten()[start:stop])
    assert len(boxes) <= max(1, 2 * len(shape) - 1)


def test_ranks_write_flat_partitions(tmp_path: Path) -> None:
    def body(writer, rank: int) -> None:  # type: ignore[no-untyped-def]
        writer.declare(infos(VALUES))
        for name, value in VALUES.items():
            start, stop = (edge * value.numel() // 3 for edge in (rank, rank + 1))
            part = value.flatten()[start:stop]
            for box, flat in flat_boxes(tuple(value.shape), start, stop):
                writer.write(name, tuple(s.start for s in box), part[flat].reshape(region_shape(box)))
        writer.commit({})

    assert write_together(tmp_path / "run", "megatron", CLIP, 3, body) == [None] * 3
    check(tmp_path / "run")
    reader = open_reader(tmp_path / "run")
    for name, value in VALUES.items():
        assert torch.equal(reader.read(name), value), name


def test_a_box_of_a_large_tensor_is_stored_alone(tmp_path: Path) -> None:
    """torch.save writes the whole storage that a view looks at."""
    large = torch.zeros(100_000)
    writer = open_writer(tmp_path / "run", "megatron", CLIP)
    writer.declare({"data/x": TensorInfo((10,), torch.float32)})
    for start in range(10):
        writer.write("data/x", (start,), large[start : start + 1])
    writer.commit({})
    assert (tmp_path / "run" / "__0_0.distcp").stat().st_size < 10 * 2000


def test_slabs_tile_a_tensor_within_their_limit() -> None:
    info = TensorInfo((7, 5, 3), torch.float32)
    for limit in (1, 60, 130, 10**9):
        regions = list(slabs(info, limit))
        places = torch.arange(7 * 5 * 3).reshape(info.shape)
        assert torch.cat([places[region].reshape(-1) for region in regions]).tolist() == list(range(105))
        assert all(places[region].numel() * 4 <= max(limit, 4) for region in regions)
    assert list(slabs(TensorInfo((), torch.float32), 1)) == [()]


def test_query_groups_are_interleaved() -> None:
    """Six query heads in two groups: [q0 q1 q2 k0 v0, q3 q4 q5 k1 v1], as Megatron's attention splits them."""
    vision = {"image_size": 16, "layers": 1, "width": 24, "patch_size": 8, "head_width": 4}
    spec = spec_from_config({"embed_dim": 4, "vision_cfg": vision}, "grouped")
    params = dict(spec.params)
    for name in [name for name in params if "attn.k_proj" in name or "attn.v_proj" in name]:
        first, *others = params[name].dims
        params[name] = replace(params[name], dims=(replace(first, size=8), *others))
    keys = MegatronKeys(replace(spec, params=params))
    found = torch.full((2, 5, 4), -1)  # [group, slot, row of the head]
    for part, start in (("q", 0), ("k", 100), ("v", 200)):
        name = f"visual.transformer.resblocks.0.attn.{part}_proj.weight"
        for run in keys.places[name].rows.runs(0, params[name].shape[0]):
            rows = torch.arange(run.start, run.stop) + start
            assert (found.view(-1)[run.at : run.at + len(rows)] == -1).all()
            found.view(-1)[run.at : run.at + len(rows)] = rows
    query, key, value = found.split([3, 1, 1], dim=1)
    assert query.flatten().tolist() == list(range(24))
    assert (key.flatten().tolist(), value.flatten().tolist()) == (list(range(100, 108)), list(range(200, 208)))
    name = "visual.transformer.resblocks.0.attn.q_proj.weight"
    assert [(run.start, run.stop, run.at) for run in keys.places[name].rows.runs(10, 14)] == [
        (10, 12, 10),
        (12, 14, 20),
    ]


def test_keys_are_those_that_megatron_uses() -> None:
    """Golden: what TransformerBlock.sharded_state_dict names them, and our own around it."""
    keys = MegatronKeys(CLIP)
    layer = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
    leaves = [f"{linear}.{leaf}" for linear in layer for leaf in ("weight", "bias")]
    leaves += [f"{linear}.layer_norm_{leaf}" for linear in (layer[0], layer[2]) for leaf in ("weight", "bias")]
    outer = ["vision.class_embedding", "vision.position_embedding", "vision.conv1.weight", "vision.projection"]
    outer += [f"vision.{norm}.{leaf}" for norm in ("ln_pre", "ln_post") for leaf in ("weight", "bias")]
    outer += ["text.position_embedding", "text.token_embedding.weight", "text.ln_final.weight", "text.ln_final.bias"]
    outer += ["text.projection", "logit_scale"]
    blocks = [f"{tower}.decoder.layers.{leaf}" for tower in ("vision", "text") for leaf in leaves]
    assert set(keys.members) == {*blocks, *outer}
    assert keys.key_shape("vision.decoder.layers.self_attention.linear_qkv.weight") == (3, 96, 32)
    assert keys.key_shape("text.decoder.layers.mlp.linear_fc1.bias") == (2, 96)
    assert keys.key_shape("logit_scale") == ()
    assert keys.key("master", "visual.proj") == "optimizer.state.fp32_param.vision.projection"
    assert keys.key("exp_avg_sq", "logit_scale") == "optimizer.state.exp_avg_sq.logit_scale"
    assert keys.key("step", "visual.proj") == "optimizer.state.step.visual.proj"
    assert keys.key("align", "image.weight") == "align/image.weight"
    assert keys.key("master", "align/image.weight") == "optimizer.state.fp32_param.align/image.weight"
    extra = set(keys.extra_states({f"weight/{name}" for name in CLIP.params}))
    assert len(extra) == 4 * (3 + 2)
    assert "vision.decoder.layers.self_attention.linear_qkv._extra_state/shard_2_3" in extra
