"""The grow tool's memory and throughput, beside cp + sync of the same bytes, the generator alone, and two peers.

    python benchmarks/grow.py                                  # a source of 4 GB, three rounds
    python benchmarks/grow.py --gb 1 --workers 1 2             # with one worker and with two
    python benchmarks/grow.py --gb 20 --tasks "convert hf"     # needs three times that on the disk

Makes a random Llama-shaped bf16 checkpoint and runs `compt convert` and `compt grow` on it, from the start of the
interpreter to its end. After each, in the same round, the result is copied by `cp -r` followed by `sync`. What is read
was read once before, so that it is in memory where that is large enough. A worker's memory is the kernel's high-water
mark. Peers: ml-hypercloning at twice the width (--hypercloning FOLDER, a checkout of apple/ml-hypercloning) and
mergekit's passthrough that stacks the layers twice (pip install mergekit), each in an interpreter that has it (--peers
PYTHON), its imports not counted. Writes benchmarks/results/grow.json, or --out FILE.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from compt_megatron.checkpoint.contract import Region, TensorInfo, region_shape, slabs  # noqa: E402
from compt_megatron.checkpoint.formats import open_writer  # noqa: E402
from compt_megatron.checkpoint.stream import SLAB, stream, unfinished  # noqa: E402
from compt_megatron.checkpoint.workers import Place  # noqa: E402
from compt_megatron.growth.maker import meetings  # noqa: E402
from compt_megatron.growth.operators import plan  # noqa: E402
from compt_megatron.growth.plan import Random  # noqa: E402
from compt_megatron.spec.families import load_spec, spec_from_config  # noqa: E402
from compt_megatron.spec.random import initial  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "grow.json"
LIMIT = 0.7
MEMORY_LIMIT = 512 + 2 * SLAB // 2**20  # MiB: the promise
_TILE = [part for axis in ("embed", "heads", "kv_heads", "mlp") for part in ("--set", f"{axis}=tile")]

HYPERCLONING = """
import sys, time, types
sys.path[:0] = sys.argv[3:5]
from compt_megatron.torchvision_mend import ensure_torchvision
ensure_torchvision()
olmo = types.ModuleType("hf_olmo.configuration_olmo")  # it asks for OLMo's package, and does not use it here
olmo.OLMoConfig = object
sys.modules.update({"hf_olmo": types.ModuleType("hf_olmo"), "hf_olmo.configuration_olmo": olmo})
import torch, transformers
from transformers.models.llama.modeling_llama import LlamaAttention
from hypercloning import cloneModel
made = LlamaAttention.__init__
def init(self, config, layer_idx):  # attributes that transformers had when it was written
    made(self, config, layer_idx)
    self.num_heads, self.num_key_value_heads = config.num_attention_heads, config.num_key_value_heads
LlamaAttention.__init__ = init
started = time.perf_counter()
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
cloneModel(model, embedding_dim_multiplier=2, up_project_multiplier=2).save_pretrained(sys.argv[2])
print("seconds", time.perf_counter() - started)
"""
MERGEKIT = """
import sys, time
sys.path[:0] = sys.argv[3:4]
from compt_megatron.torchvision_mend import ensure_torchvision
ensure_torchvision()
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
slice = {"sources": [{"model": sys.argv[1], "layer_range": [0, int(sys.argv[4])]}]}
config = {"merge_method": "passthrough", "dtype": "bfloat16", "slices": [slice, slice]}
started = time.perf_counter()
run_merge(MergeConfiguration.model_validate(config), sys.argv[2], options=MergeOptions(lazy_unpickle=True))
print("seconds", time.perf_counter() - started)
"""


def llama_config(width: int, layers: int, mlp: int, heads: int, groups: int, head: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": width,
        "num_hidden_layers": layers,
        "intermediate_size": mlp,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": head,
        "vocab_size": 32000,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def configs(gb: float) -> dict[str, dict[str, Any]]:
    """The source of about `gb` GB in bf16, and what it grows into."""
    width, mlp, heads, head = (4096, 11008, 32, 128) if gb >= 3 else (2048, 5632, 32, 64)
    embeddings = 2 * 32000 * width
    block = width * (width * 2 + 2 * 8 * head + 3 * mlp)
    layers = max(1, round((gb * 1e9 / 2 - embeddings) / block))
    return {
        "source": llama_config(width, layers, mlp, heads, 8, head),
        "tile": llama_config(2 * width, layers, 2 * mlp, 2 * heads, 16, head),
        "deep": llama_config(width, 2 * layers, mlp, heads, 8, head),
        "wide": llama_config(width + width // 4, layers, mlp + mlp // 4, heads + heads // 4, 8, head),
    }


def make_source(config: dict[str, Any], path: Path) -> None:
    """A checkpoint of random values, none of which depends on another element that lies near."""
    spec = spec_from_config(config, "source")
    infos = {f"weight/{name}": TensorInfo(param.shape, torch.bfloat16) for name, param in spec.params.items()}
    pool = (torch.randn(2**25, generator=torch.Generator().manual_seed(0)) * 0.02).to(torch.bfloat16)
    count = 0

    def make(name: str, region: Region) -> torch.Tensor:
        nonlocal count
        count += 1
        size = torch.Size(region_shape(region)).numel()
        start = count * 1_000_003 % (len(pool) - size)
        return pool[start : start + size].reshape(region_shape(region))

    writer = open_writer(path, "hf", spec)
    with unfinished(writer):
        writer.declare(infos)
        stream(writer, infos, make, Place())
        writer.commit({})


def tasks(work: Path) -> dict[str, tuple[list[str], str]]:
    """Name -> the command without its destination, and which peer does the same."""
    source = str(work / "source")
    return {
        "convert hf": (["convert", source, "--format", "hf"], ""),
        "convert megatron": (["convert", source, "--format", "megatron"], ""),
        "tile, width x 2": (["grow", source, "--to", str(work / "tile"), *_TILE], "ml-hypercloning"),
        "depth x 2": (["grow", source, "--to", str(work / "deep")], "mergekit"),
        "exact, width x 1.25": (["grow", source, "--to", str(work / "wide")], ""),
    }


# -- measuring ---------------------------------------------------------------------------------------------------------


def measured(command: list[str], **options: Any) -> tuple[float, int, str]:
    """Wall seconds, the most memory of one process in MiB, and what was printed. Raises RuntimeError if it fails."""
    started = time.perf_counter()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        start_new_session=True,
        **options,
    )
    peak = 0
    while process.poll() is None:
        peak = max(peak, *(_high_water(pid) for pid in _family(process.pid)), 0)
        time.sleep(0.02)
    seconds = time.perf_counter() - started
    assert process.stdout is not None
    said = process.stdout.read()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command[:6])} ...: {said.strip().splitlines()[-1] if said.strip() else '?'}")
    return seconds, peak, said


def _family(pid: int) -> Iterator[int]:
    yield pid
    try:
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            yield from _family(int(child))
    except OSError:
        return


def _high_water(pid: int) -> int:
    try:
        found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0
    return int(found.group(1)) // 1024 if found else 0


def data_bytes(path: Path) -> int:
    return sum(entry.stat().st_size for entry in path.rglob("*") if entry.is_file())


def warm(path: Path) -> None:
    """Have a folder's files in memory, and nothing waiting to be written."""
    for entry in path.iterdir():
        subprocess.run(["cat", str(entry)], stdout=subprocess.DEVNULL, check=True)
    subprocess.run(["sync"], check=True)


def copy_seconds(path: Path, beside: Path) -> float:
    """`cp -r` and `sync` of a folder whose files are in memory, if they fit there."""
    warm(path)
    started = time.perf_counter()
    subprocess.run(f"cp -r '{path}' '{beside}' && sync", shell=True, check=True)
    seconds = time.perf_counter() - started
    shutil.rmtree(beside)
    return seconds


def generator_seconds(source: Path, target: Path) -> tuple[float, int]:
    """Making alone the fresh entries of an exact growth, slab by slab, and how many they are."""
    made = plan(load_spec(str(source)), load_spec(str(target)))
    torch.set_num_threads(1)
    started, count = time.perf_counter(), 0
    for name, tensor in made.tensors.items():
        for region in slabs(TensorInfo(tensor.shape, torch.bfloat16), SLAB):
            for part, inside, _ in meetings(tensor, region):
                if isinstance(part.piece, Random):
                    count += initial(made.target.params[name], 0, inside).numel()
    return time.perf_counter() - started, count


def run_task(name: str, command: list[str], workers: int, work: Path) -> dict[str, Any]:
    """One run of one task, and the copy of its result."""
    out = work / "out"
    full = [sys.executable, "-m", "compt_megatron", command[0], command[1], str(out), *command[2:]]
    warm(work / "source")
    seconds, peak, said = measured([*full, "--workers", str(workers)])
    inside = re.search(r" in ([\d.]+) s", said)
    size = data_bytes(out)
    copied = copy_seconds(out, work / "copy")
    shutil.rmtree(out)
    return {
        "bytes": size,
        "seconds": round(seconds, 3),
        "seconds_without_start": float(inside.group(1)) if inside else None,
        "cp_seconds": round(copied, 3),
        "peak_MiB": peak,
    }


def run_peer(name: str, options: argparse.Namespace, work: Path, layers: int) -> dict[str, Any]:
    """One run of a peer, or the reason why there is none."""
    out = work / "peer"
    if name == "mergekit":
        arguments = ["-c", MERGEKIT, str(work / "source"), str(out), str(ROOT), str(layers)]
    elif options.hypercloning is None:
        return {"skipped": "no --hypercloning FOLDER"}
    else:
        arguments = ["-c", HYPERCLONING, str(work / "source"), str(out), str(ROOT), str(options.hypercloning)]
    warm(work / "source")
    try:
        _, peak, said = measured([str(options.peers), *arguments], env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
        subprocess.run(["sync"], check=True)
        seconds = float(said.split("seconds ")[-1].split()[0])
        return {"bytes": data_bytes(out), "seconds": round(seconds, 3), "peak_MiB": peak}
    except (RuntimeError, ValueError) as error:
        return {"skipped": " ".join(str(error).split())[-160:]}
    finally:
        shutil.rmtree(out, ignore_errors=True)


# -- the table ---------------------------------------------------------------------------------------------------------


def summary(runs: list[dict[str, Any]], generator: float | None) -> dict[str, Any]:
    """What the rounds of one task come to: medians, and the ratios of each round."""
    ratios = [max(run["cp_seconds"], generator or 0.0) / run["seconds"] for run in runs]
    size = runs[0]["bytes"]
    inside = [run["seconds_without_start"] for run in runs if run["seconds_without_start"]]
    return {
        "bytes": size,
        "MB_per_second": round(size / 1e6 / median(run["seconds"] for run in runs)),
        "MB_per_second_without_start": round(size / 1e6 / median(inside)) if inside else None,
        "cp_MB_per_second": round(size / 1e6 / median(run["cp_seconds"] for run in runs)),
        "ratio": round(median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "peak_MiB": max(run["peak_MiB"] for run in runs),
        "runs": runs,
    }


def line(name: str, workers: int, found: dict[str, Any], generator: float | None) -> str:
    alone = f", generator alone {found['bytes'] / 1e6 / generator:.0f} MB/s" if generator else ""
    return (
        f"{name:<20} {workers} worker{'s' if workers > 1 else ' '} {found['bytes'] / 1e9:6.2f} GB "
        f"{found['MB_per_second']:>6} MB/s ({found['MB_per_second_without_start']} once started), "
        f"cp {found['cp_MB_per_second']:>5} MB/s{alone}: ratio {found['ratio']:.2f} "
        f"({min(found['ratios']):.2f} to {max(found['ratios']):.2f}), {found['peak_MiB']} MiB"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gb", type=float, default=4.0, help="size of the source (default: 4)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="+", default=[1])
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="some of the tasks, by name")
    parser.add_argument("--work-dir", type=Path, help="where the checkpoints go (default: a temporary folder)")
    parser.add_argument("--peers", default=sys.executable, metavar="PYTHON", help="an interpreter that has the peers")
    parser.add_argument("--hypercloning", type=Path, metavar="FOLDER", help="a checkout of apple/ml-hypercloning")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FILE", help="where the results go")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="compt-grow-", dir=options.work_dir) as folder:
        work = Path(folder)
        made = configs(options.gb)
        for name, config in made.items():
            if name != "source":
                (work / name).mkdir()
                (work / name / "config.json").write_text(json.dumps(config))
        make_source(made["source"], work / "source")
        chosen = {name: task for name, task in tasks(work).items() if not options.tasks or name in options.tasks}
        runs: dict[tuple[str, int], list[dict[str, Any]]] = {}
        peers: dict[str, list[dict[str, Any]]] = {}
        alone: list[tuple[float, int]] = []
        for round_ in range(options.rounds):
            for name, (command, peer) in chosen.items():
                for workers in options.workers:
                    found = run_task(name, command, workers, work)
                    runs.setdefault((name, workers), []).append(found)
                    print(f"round {round_ + 1}: {name}, {workers} workers: {found}", flush=True)
                if name.startswith("exact"):
                    alone.append(generator_seconds(work / "source", work / "wide"))
                if peer and "skipped" not in peers.setdefault(peer, [{}])[-1]:
                    peers[peer].append(run_peer(peer, options, work, made["source"]["num_hidden_layers"]))
                    print(f"round {round_ + 1}: {peer}: {peers[peer][-1]}", flush=True)
        return report(options, made, runs, {name: rows[1:] for name, rows in peers.items()}, alone)


def _command(options: argparse.Namespace) -> str:
    """What to give again; where things lie is another matter on another machine."""
    words = ["python benchmarks/grow.py", f"--gb {options.gb:g} --rounds {options.rounds} --workers"]
    words += map(str, options.workers)
    if options.tasks:
        words += ["--tasks", *(shlex.quote(task) for task in options.tasks)]
    if options.peers != sys.executable:
        words.append("--peers PYTHON")
    return " ".join([*words, *(["--hypercloning FOLDER"] if options.hypercloning else [])])


def report(
    options: argparse.Namespace,
    made: dict[str, dict[str, Any]],
    runs: dict[tuple[str, int], list[dict[str, Any]]],
    peers: dict[str, list[dict[str, Any]]],
    alone: list[tuple[float, int]],
) -> int:
    """Print the table, write the results; 1 if a promise is broken."""
    generator = median(seconds for seconds, _ in alone) if alone else None
    result: dict[str, Any] = {
        "command": _command(options),
        "machine": {"cpus": os.cpu_count(), "torch": torch.__version__},
        "gb": options.gb,
        "config": made["source"],
        "generator_seconds": generator,
        "fresh_entries": alone[0][1] if alone else 0,
        "tasks": {},
        "peers": {},
    }
    broken = []
    for (name, workers), rows in runs.items():
        own = generator if name.startswith("exact") else None
        found = summary(rows, own)
        print(line(name, workers, found, own))
        label = f"{name}, {workers} worker{'s' if workers > 1 else ''}"
        result["tasks"][label] = found
        if found["ratio"] < LIMIT or found["peak_MiB"] > MEMORY_LIMIT:
            broken.append(label)
    for name, rows in peers.items():
        if "skipped" in rows[-1]:
            print(f"{name}: skipped, {rows[-1]['skipped']}")
            result["peers"][name] = rows[-1]
            continue
        seconds = median(row["seconds"] for row in rows)
        rate, peak = rows[0]["bytes"] / 1e6 / seconds, max(row["peak_MiB"] for row in rows)
        task = next(task for task, (_, peer) in tasks(Path()).items() if peer == name)
        result["peers"][name] = {"task": task, "MB_per_second": round(rate), "peak_MiB": peak, "runs": rows}
        print(f"{name:<20} {rows[0]['bytes'] / 1e9:6.2f} GB {rate:6.0f} MB/s, {peak} MiB")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"limits: ratio {LIMIT}, {MEMORY_LIMIT} MiB: {'FAIL: ' + '; '.join(broken) if broken else 'pass'}")
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
