"""The demo's chain against its last model trained alone with the chain's total compute, over several seeds.

    python benchmarks/chain_vs_alone.py [--seeds 0 1 2] [--out DIR] [key=value ...]

Runs the packaged recipe `emoji` (chain and control) once a seed, and writes benchmarks/results/chain_vs_alone.json.
Runs that are there already (RUNS/seed<N>) are not repeated: an interrupted benchmark goes on. The control's learning
rate and warm-up are its own (see the recipe). The rates of both were chosen on seed 0 (docs/decisions.md).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
SET = "emoji/held_out_artist"


def run_seed(seed: int, run_dir: Path, overrides: list[str]) -> dict[str, Any]:
    command = [
        sys.executable,
        "-m",
        "compt_megatron",
        "train",
        "emoji",
        "--run-dir",
        str(run_dir),
        f"seed={seed}",
        *overrides,
    ]
    subprocess.run(command, check=True, cwd=ROOT)
    return json.loads((run_dir / "chain.json").read_text())


def gather(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """One model over the seeds."""
    first = entries[0]
    return {
        "name": first["name"],
        "model": first["model"],
        "parameters": first["parameters"],
        "samples": first["samples"],
        "macs": first["macs"]["total"],
        "top1": [entry["evaluation"][SET]["top1"] for entry in entries],
        "top5": [entry["evaluation"][SET]["top5"] for entry in entries],
        "align_at_step0": [sum(entry["align_at_step0"].values()) for entry in entries if entry["align_at_step0"]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "chain_vs_alone", help="where the runs go")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe overrides, for trials")
    options = parser.parse_args()
    ledgers = [run_seed(seed, options.out / f"seed{seed}", options.overrides) for seed in options.seeds]
    control = ledgers[0]["controls"][0]
    recipe = _recipe(options.overrides)
    tuned = recipe.control_settings(0).optimizer
    results = {
        "machine": {
            "cpus": os.cpu_count(),
            "threads": ledgers[0]["machine"]["cpus"],
            "python": platform.python_version(),
        },
        "versions": {"torch": torch.__version__, **ledgers[0]["versions"]},
        "command": _command(options),
        "eval_set": SET,
        "seeds": options.seeds,
        "links": [
            gather([next(e for e in ledger["links"] if e["name"] == link["name"]) for ledger in ledgers])
            for link in ledgers[0]["links"]
        ],
        "control": {
            **gather([ledger["controls"][0] for ledger in ledgers]),
            "lr": tuned.lr,
            "warmup_steps": tuned.warmup_steps,
        },
    }
    target = ROOT / "benchmarks" / "results" / "chain_vs_alone.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(results, indent=1) + "\n")
    for row in (*results["links"], results["control"]):
        print(
            f"{row['name']:<10} top-1 {[f'{100 * value:.1f}' for value in row['top1']]} %,",
            f"{row['macs'] / 1e12:.2f} T MACs",
        )
    print(f"control {control['name']}: lr {tuned.lr}, warm-up {tuned.warmup_steps} steps; written to {target}")


def _command(options: argparse.Namespace) -> str:
    seeds = [str(seed) for seed in options.seeds]
    return " ".join(["python benchmarks/chain_vs_alone.py", *options.overrides, "--seeds", *seeds])


def _recipe(overrides: list[str]) -> Any:
    from compt_megatron.recipe.load import load_recipe

    return load_recipe("emoji", overrides)


if __name__ == "__main__":
    main()
