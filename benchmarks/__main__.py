"""Every benchmark of the project, in turn: `python -m benchmarks`, or some of them: `python -m benchmarks NAME ...`.

`python -m benchmarks --list` says what each measures. Each writes benchmarks/results/<name>.json; the figures of the
README are made from those files.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# name -> what it measures and about how long that takes on two cores; in the order in which they run
BENCHMARKS = {
    "open_clip_parity": "features against open_clip's, every packaged config of the paper's size; 2 min",
    "growth_exactness": "features of grown models against their source's, the paper's chains; 3 min",
    "memory_model": "the planner's memory against measured towers and DeepSpeed runs; 3 min",
    "giant_layouts": "layouts, memory and predicted time of the giant ViTs on 8 to 512 GPUs; 10 s",
    "language_memory": "the planner's memory against measured small language models; 1 min",
    "language_layouts": "cost, layouts, memory, predicted time of chains of language models on 8 to 512 GPUs; 1 min",
    "communication": "what a step of each layout sends, counted, against the planner's formulas; 5 min",
    "train_step": "a training step of both engines against a bare loop and open_clip's trainer; 15 min",
    "layouts": "losses and gradients of every layout of four processes against one process; an hour",
    "grow": "throughput and memory of grow and convert beside cp and two peers, a source of 4 GB; 10 min",
    "chain_vs_alone": "the demo's chain against its last model alone, three seeds; an hour",
    "llm_chain": "chains of small language models against each model alone, three seeds; two hours",
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="benchmarks to run (default: all)")
    parser.add_argument("--list", action="store_true", help="say what there is, and stop")
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"no benchmark {unknown[0]!r}; there are {', '.join(BENCHMARKS)}")
    if options.list:
        for name, subject in BENCHMARKS.items():
            print(f"{name:<18} {subject}")
        return 0
    failed = []
    for name in options.names or BENCHMARKS:
        print(f"== {name}: {BENCHMARKS[name]}", flush=True)
        if subprocess.run([sys.executable, str(ROOT / "benchmarks" / f"{name}.py")], cwd=ROOT).returncode:
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
        return 1
    return subprocess.run([sys.executable, "-m", "benchmarks.readme"], cwd=ROOT).returncode


if __name__ == "__main__":
    raise SystemExit(main())
