"""Growth and conversion by streams: bounded memory, bounded reads, the same bytes for any number of workers, checks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from compt_megatron import cli
from compt_megatron.checkpoint import guard, out_file, stream, sums
from compt_megatron.checkpoint.api import check, convert
from compt_megatron.checkpoint.contract import Layout, Region, TensorInfo, region_shape, whole
from compt_megatron.checkpoint.digest import weight_hash
from compt_megatron.checkpoint.formats import open_reader
from compt_megatron.checkpoint.hashed_file import HashedFile
from compt_megatron.checkpoint.workers import together
from compt_megatron.errors import UserError
from compt_megatron.growth import maker, means
from compt_megatron.growth.api import grow, plan, write_fresh
from compt_megatron.growth.dry_run import DryRun
from compt_megatron.growth.maker import Maker
from compt_megatron.spec.random import initial
from tests.unit.checkpoint_samples import Exchange
from tests.unit.growth_helpers import MemoryCheckpoint, carried_out
from tests.unit.lm_helpers import gpt2, llama, make_spec

SMALL, LARGE = llama(64, 4, 2, 2, 96), llama(96, 6, 2, 3, 160)
TILED = llama(128, 8, 4, 2, 192)
GPT, LARGE_GPT = gpt2(64, 4, 2), gpt2(96, 6, 3)

# Of a worker: what is promised is 512 MB, without twice the largest slice, of which importing torch for CPUs takes 277.
LIMIT_MB, IMPORTS_MB = 512, 277


# -- memory and bytes --------------------------------------------------------------------------------------------------

_MEASURED = """
import sys
import torch
from compt_megatron import cli
status = cli.main(sys.argv[1:]) if sys.argv[1:] else 0
print("peak", next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
sys.exit(status)
"""


def peak_mb(*command: str) -> int:
    """The most memory that a command had, or importing where there is none, in MiB; not getrusage's, which counts what
    the forked process had before."""
    done = subprocess.run([sys.executable, "-c", _MEASURED, *command], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split("peak ")[-1]) // 1024


def limit_mb() -> int:
    """The limit on this machine: torch for CUDA takes more."""
    return LIMIT_MB + max(0, peak_mb() - IMPORTS_MB)


def write_llama(path: Path, config: dict[str, Any]) -> None:
    """A Hugging Face folder whose tensors are all slices of one: quick to make, no two rows alike."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    spec = make_spec(config)
    base = torch.randn(max(param.numel for param in spec.params.values()) + 1000).to(torch.bfloat16)
    tensors = {
        name: base[index : index + param.numel].view(param.shape).clone()
        for index, (name, param) in enumerate(spec.params.items())
    }
    save_file(tensors, path / "model.safetensors")


def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path) -> None:
    """Single tensors of 98 MB (197 MB in the result), which nobody may hold whole; fp64 would be eight times that."""
    small = llama(1024, 8, 4, 1, 3072, vocab_size=48_000, head=128)
    large = llama(2048, 16, 8, 1, 6144, vocab_size=48_000, head=128)
    write_llama(tmp_path / "source", small)
    (tmp_path / "large").mkdir()
    (tmp_path / "large" / "config.json").write_text(json.dumps(large))
    tile = [part for axis in ("embed", "heads", "kv_heads", "mlp") for part in ("--set", f"{axis}=tile")]
    command = ["grow", str(tmp_path / "source"), str(tmp_path / "grown"), "--to", str(tmp_path / "large"), *tile]
    limit = limit_mb()
    assert peak_mb(*command) < limit
    grown = open_reader(tmp_path / "grown")
    name = "weight/lm_head.weight"
    rows, old = grown.read(name, (slice(47_000, 47_010), slice(0, 2048))), open_reader(tmp_path / "source")
    assert torch.equal(rows[:, :1024] * 2, old.read(name, (slice(47_000, 47_010), slice(0, 1024))))
    assert peak_mb("convert", str(tmp_path / "grown"), str(tmp_path / "run"), "--format", "megatron") < limit
    made = grow(tmp_path / "source", tmp_path / "x", tmp_path / "large", axes={"embed": "tile"}, dry_run=True)
    assert isinstance(made, DryRun)
    assert made.forecast is not None
    data = (tmp_path / "grown" / "model.safetensors").stat().st_size
    assert 0 < data - sum(made.forecast.written.values()) < 10_000
    assert list(made.forecast.files) == ["model.safetensors"]


@pytest.mark.parametrize(
    ("small", "large", "axes"),
    [
        (SMALL, LARGE, None),
        (SMALL, TILED, dict.fromkeys(("embed", "heads", "kv_heads", "mlp"), "tile")),
        (GPT, LARGE_GPT, None),
    ],
)
def test_no_read_is_larger_than_a_slab(
    small: dict[str, Any], large: dict[str, Any], axes: dict[str, str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "SLAB", 2000)
    monkeypatch.setattr(means, "_WHOLE", 500)
    monkeypatch.setattr(means, "_BLOCK", 100)
    monkeypatch.setattr(maker, "_BLOCK", 100)
    made = plan(make_spec(small), make_spec(large), axes=axes)
    tensors = {name: initial(param, 1) for name, param in made.source.params.items()}
    reader, writer = MemoryCheckpoint(made.source, tensors), MemoryCheckpoint(made.target)
    from compt_megatron.growth.execute import execute

    execute(made, reader, writer)
    assert max(value.numel() for value in tensors.values()) > 3000
    assert reader.largest_read <= 500
    expected = carried_out(made, tensors)
    assert all(torch.equal(value, expected[name]) for name, value in writer.state().items())


def test_rows_that_several_heads_need_are_read_once() -> None:
    """Columns of an output projection go head by head; their rows are read for all of them together."""
    made = plan(make_spec(llama(64, 8, 2, 1, 96)), make_spec(llama(64, 16, 2, 1, 96, head=8)))
    tensors = {name: initial(param, 1) for name, param in made.source.params.items()}
    reader, reads = MemoryCheckpoint(made.source, tensors), []

    def read(name: str, region: Region) -> torch.Tensor:
        reads.append((name, region_shape(region)))
        return reader.read(name, region)

    name = "weight/model.layers.0.self_attn.o_proj.weight"
    assert len(made.tensors[name.removeprefix("weight/")].parts) > 3
    Maker(made, read).make(name)
    assert reads == [(name, (64, 64))]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_sums_by_streams_are_those_of_the_tree(data: st.DataObject) -> None:
    shape = (data.draw(st.integers(1, 40)), data.draw(st.integers(1, 12)), data.draw(st.integers(1, 3)))
    dim = data.draw(st.integers(0, 2))
    values = torch.randn(shape).double()
    weights = torch.randn(shape[dim]).double()
    starts = [data.draw(st.integers(0, size - 1)) if at != dim else 0 for at, size in enumerate(shape)]
    region = tuple(slice(start, size) for start, size in zip(starts, shape, strict=True))
    reads = torch.zeros(shape)

    def read(box: Region) -> torch.Tensor:
        reads[box] += 1
        return values[box]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(means, "_WHOLE", data.draw(st.integers(1, 200)))
        patch.setattr(means, "_BLOCK", data.draw(st.integers(1, 50)))
        found = means.sums(read, region, dim, weights)
    inside = values[region]
    along = [1] * 3
    along[dim] = -1
    assert torch.equal(found[0], means.tree_sum(inside, dim))
    assert torch.equal(found[1], means.tree_sum(inside * weights.reshape(along), dim))
    assert (reads[region] == 1).all()
    assert reads.sum() == inside.numel()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_product_in_fp32_has_the_bytes_of_that_in_fp64(dtype: torch.dtype) -> None:
    if dtype == torch.float32:
        values = torch.randint(-(2**31), 2**31, (2**16,)).to(torch.int32).view(dtype)
    else:
        values = torch.arange(2**16).to(torch.int32).to(torch.int16).view(dtype)
    values = values[~values.isnan()]
    exact = [0.5, 1 / 64, 3.0, 2.0**-40, *torch.rand(20).tolist()]
    for scale in exact:
        assert maker._is_single(scale, dtype)
        assert torch.equal(torch.mul(values, scale), (values.double() * scale).to(dtype)), scale
    assert not maker._is_single(1 / 3, dtype)
    assert not maker._is_single(0.5, torch.float64)


# -- workers -----------------------------------------------------------------------------------------------------------


def content(path: Path) -> dict[str, bytes]:
    return {entry.name: entry.read_bytes() for entry in path.iterdir()}


def in_threads(world: int, **arguments: Any) -> None:
    """`grow` by `world` workers, threads here; in the end all are done or all have failed."""
    exchange, failed = Exchange(world), []

    def work(rank: int) -> None:
        try:
            grow(**arguments, shard=(rank, world), exchange=exchange.of(rank))
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise min(failed, key=lambda error: not isinstance(error, UserError))


@pytest.mark.parametrize(("format", "layout"), [("hf", Layout()), ("megatron", Layout()), ("megatron", Layout(2, 1))])
def test_any_number_of_workers_makes_the_same_bytes(
    tmp_path: Path, format: str, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "SLAB", 4000)
    monkeypatch.setattr(sums, "PIECE", 7000)
    source = write_fresh(make_spec(SMALL), tmp_path / "source", 1, layout_format(format), dtype=torch.bfloat16)
    results, shares = {}, []
    for world in (1, 2, 4):
        path = tmp_path / f"of{world}"
        in_threads(world, src=source, dst=path, to=make_spec(LARGE, "large"), format=format, layout=layout)
        check(path)
        results[world] = path
        shares.append(len(list(path.glob("*.distcp"))))
    if format == "megatron":  # a file for each worker: compared in another format
        assert shares == [world * layout.tensor for world in (1, 2, 4)]
        for world, path in list(results.items()):
            convert(path, tmp_path / f"hf{world}", "hf")
            results[world] = tmp_path / f"hf{world}"
    for one, other in pairwise(results.values()):
        assert content(one) == content(other)


def layout_format(format: str) -> str:
    """A source of the other kind."""
    return "hf" if format == "megatron" else "megatron"


def _told(place: Any, number: int) -> list[tuple[int, int]]:
    """What every worker says to the others."""
    rows = [place.exchange((place.rank, number * place.rank)) for _ in range(3)]
    assert rows[0] == rows[2]
    if number == 7 and place.rank == 1:
        raise UserError("one line")
    if number == 8 and place.rank == 1:
        os._exit(3)
    return place.exchange((place.rank, number * place.rank))


def test_workers_exchange_and_fail_together() -> None:
    assert together(_told, 2, None, number=5) == [(0, 0), (1, 5)]
    with pytest.raises(UserError, match="one line"):
        together(_told, 2, None, number=7)
    with pytest.raises(RuntimeError, match=r"worker 1 of 2 ended with status 3; the same command goes on"):
        together(_told, 2, None, number=8)


# -- files and checks --------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_files_filled_at_any_place(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Whatever is put where, in whichever order: the bytes and the sums are those of the file."""
    size = data.draw(st.integers(1, 60_000))
    wanted = os.urandom(size)
    cuts = sorted({0, size, *data.draw(st.lists(st.integers(0, size), max_size=8))})
    runs = data.draw(st.permutations(list(pairwise(cuts))))
    path = tmp_path_factory.mktemp("filled") / "file"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(out_file, "_this", threading.local())  # blocks of that size
        patch.setattr(out_file, "_BLOCK", 8192)
        patch.setattr(out_file, "_WORTH", data.draw(st.sampled_from([1, 5000, 10**9])))
        patch.setattr(sums, "PIECE", data.draw(st.sampled_from([1000, 4096, 16384])))
        if data.draw(st.booleans()):
            patch.delattr(os, "O_DIRECT", raising=False)
        file, other = out_file.OutFile(path), out_file.OutFile(path.with_name("other"))
        for start, stop in runs:
            file.put(start, wanted[start:stop])
            other.put(0, b"x")
        other.close()
        name, digest, count = file.finish()
        assert (name, count, path.read_bytes()) == ("file", size, wanted)
        assert digest == sums.file_hash(path)
        assert len(digest) == 16 * -(-size // sums.PIECE)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_stream_goes_on_where_a_killed_one_was_durable(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Short and long writes, of several types, with what a killed run left behind the part that it knows of."""
    path = tmp_path_factory.mktemp("stream") / "stream"
    counts = data.draw(st.lists(st.one_of(st.integers(0, 9000), st.just(70_000), st.just(200_000)), max_size=12))
    pieces = [np.random.default_rng(number).bytes(count) for number, count in enumerate(counts)]
    durable = data.draw(st.integers(0, len(pieces)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sums, "PIECE", data.draw(st.sampled_from([1000, 65536, 2**24])))
        file = HashedFile(path)
        for piece in pieces[:durable]:
            assert file.write(np.frombuffer(piece, np.uint8)) == len(piece)
        known = file.progress()
        assert known[0] == file.tell() == path.stat().st_size == sum(counts[:durable])
        for piece in pieces[durable:]:
            file.write(piece[::-1])  # never told of
        file.close() if data.draw(st.booleans()) else file.drain()

        again = HashedFile(path)
        assert again.resume(known)
        for piece in pieces[durable:]:
            again.write(memoryview(piece))
            assert again.tell() == again.size
        name, digest, size = again.finish()
        assert (name, size, path.read_bytes()) == ("stream", sum(counts), b"".join(pieces))
        assert digest == sums.file_hash(path)
        if known[0]:
            path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
            assert not HashedFile(path).resume(known)


@pytest.mark.parametrize("world", [1, 2])
def test_a_flipped_bit_of_the_source_never_reaches_a_result(
    tmp_path: Path, world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large files are checked beside the work: before the commit at the latest, wherever the bit is."""
    monkeypatch.setattr(guard, "_LARGE", 1000)
    monkeypatch.setattr(guard, "_SMALL", 1000)
    monkeypatch.setattr(sums, "PIECE", 5000)
    source = write_fresh(make_spec(SMALL), tmp_path / "source", 1, "hf")
    path = source / "model.safetensors"
    whole_bytes = path.read_bytes()
    for at in (3000, len(whole_bytes) // 2, len(whole_bytes) - 1):
        path.write_bytes(whole_bytes[:at] + bytes([whole_bytes[at] ^ 1]) + whole_bytes[at + 1 :])
        with pytest.raises(UserError, match="do not match their checksum"):
            in_threads(world, src=source, dst=tmp_path / "copy", to=make_spec(LARGE), format="megatron")
        with pytest.raises(UserError, match="do not match their checksum"):
            convert(source, tmp_path / "copy", "megatron")
        assert {entry.name for entry in tmp_path.iterdir()} == {"source"}
    compare = guard.Guard._compare

    def slow(self: guard.Guard, name: str, first: int, last: int) -> None:
        time.sleep(0.3)  # the work is done by then, and waits
        compare(self, name, first, last)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(guard.Guard, "_compare", slow)
        with pytest.raises(UserError, match="do not match their checksum"):
            convert(source, tmp_path / "copy", "megatron")
    assert not (tmp_path / "copy").exists()
    path.write_bytes(whole_bytes)
    convert(source, tmp_path / "copy", "megatron")
    assert weight_hash(open_reader(tmp_path / "copy")) == weight_hash(open_reader(source))


def test_old_checksums_are_of_whole_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sums, "PIECE", 5000)
    path = tmp_path / "file"
    path.write_bytes(os.urandom(12_345))
    assert len(sums.file_hash(path)) == 48
    manifest = {"format_version": 1, "files": {"file": 12_345}, "checksums": {"file": sums.whole_hash(path)}}
    guard.Guard(tmp_path, manifest).file("file")
    manifest["format_version"] = 2
    with pytest.raises(UserError, match="checksum"):
        guard.Guard(tmp_path, manifest).file("file")


def test_the_dry_run_says_what_it_would_take(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_fresh(make_spec(SMALL), tmp_path / "source", 1, "hf", dtype=torch.bfloat16)
    (tmp_path / "large").mkdir()
    (tmp_path / "large" / "config.json").write_text(json.dumps(LARGE))
    before = sorted(tmp_path.rglob("*"))
    command = ["grow", str(source), str(tmp_path / "new" / "grown"), "--to", str(tmp_path / "large"), "--dry-run"]
    assert cli.main(command) == 0
    shown = capsys.readouterr().out
    assert "files: model.safetensors" in shown
    assert "lm_head.weight [61, 96] exact: " in shown
    assert "reads 7.81 kB, writes 11.7 kB" in shown
    assert cli.main([*command, "--json", "--workers", "3", "--format", "megatron", "--tensor", "2"]) == 0
    forecast = json.loads(capsys.readouterr().out)["forecast"]
    assert sorted(tmp_path.rglob("*")) == before
    assert forecast["workers"] == 3
    assert sum(forecast["written"].values()) == 2 * make_spec(LARGE).numel
    assert len(forecast["files"]) == 2
    assert forecast["peak_memory"] > 2**27
    assert min(forecast[key] for key in ("seconds", "write_bytes_per_second", "read_bytes_per_second")) > 0


def test_what_a_tensor_reads_is_forecast(monkeypatch: pytest.MonkeyPatch) -> None:
    made = plan(make_spec(SMALL), make_spec(TILED), axes=dict.fromkeys(("embed", "heads", "kv_heads", "mlp"), "tile"))
    tensors = {name: initial(param, 1) for name, param in made.source.params.items()}
    reader = MemoryCheckpoint(made.source, tensors)
    for name, tensor in made.tensors.items():
        reads: list[tuple[str, tuple[int, ...]]] = []

        def read(key: str, region: Region, reads: list[Any] = reads) -> torch.Tensor:
            reads.append((key.removeprefix("weight/"), region_shape(region)))
            return reader.read(key, region)

        Maker(made, read).make(f"weight/{name}")
        assert reads == [(key, region_shape(box)) for key, box in maker.needs(tensor, whole(tensor.shape))]


def test_metadata_is_written_without_torchs_classes_as_with_them() -> None:
    """A process that has not imported torch.distributed.checkpoint writes the same `.metadata`."""
    code = "\n".join(
        [
            "import sys, torch",
            "from compt_megatron.checkpoint.dcp_metadata import dcp_metadata_bytes",
            "chunks = [('a', (at, 0), (2, 5), '__0_0.distcp', 10 * at, 10) for at in (0, 2)]",
            "given = {'a': ((4, 5), torch.bfloat16)}, chunks, [('x/e', '__0_0.distcp', 64, 9)]",
            "ours = dcp_metadata_bytes(*given)",
            "assert 'torch.distributed.checkpoint' not in ' '.join(sys.modules)",
            "import torch.distributed.checkpoint",
            "assert dcp_metadata_bytes(*given) == ours",
        ]
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)


def test_slabs_of_wide_rows() -> None:
    """A row that alone is larger than a slab is cut, too."""
    from compt_megatron.checkpoint.contract import slabs

    found = list(slabs(TensorInfo((2, 1000), torch.float32), 1200))
    assert len(found) == 8
    assert {region_shape(region) for region in found} == {(1, 300), (1, 100)}


def test_a_layout_is_refused_where_files_are_not_cut(tmp_path: Path) -> None:
    source = write_fresh(make_spec(SMALL), tmp_path / "source", 1, "hf", dtype=torch.bfloat16)
    with pytest.raises(UserError, match="hf files are not cut for model-parallel ranks"):
        grow(source, tmp_path / "grown", to=make_spec(LARGE, "large"), layout=Layout(2, 1))
    assert not (tmp_path / "grown").exists()


def test_processes_share_growth_and_agree_with_one(tmp_path: Path) -> None:
    """Real processes, their messages and the certificate that comes back."""
    source = write_fresh(make_spec(SMALL), tmp_path / "source", 1, "hf", dtype=torch.bfloat16)
    options: dict[str, Any] = {"to": make_spec(LARGE, "large"), "axes": {"mlp": "append"}}
    alone = grow(source, tmp_path / "one", **options)
    assert grow(source, tmp_path / "two", **options, workers=2) == alone
    assert content(tmp_path / "two") == content(tmp_path / "one")
