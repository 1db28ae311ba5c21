"""How exactly `exact` growth keeps the features of the named models, measured through open_clip.

    python benchmarks/growth_exactness.py                                  # every pair of the paper's chains
    python benchmarks/growth_exactness.py compt-ViT-B-16:compt-ViT-L-16    # these pairs

Each source has open_clip's initialisation plus noise on every tensor (norms 0.3, biases and embeddings 0.05), so that
nothing is trivially zero; a probe batch of random images and texts goes through source and grown model in fp32. The
noise floor is the source's own fp32 features against its fp64 ones. Prints the relative errors and adds them to
benchmarks/results/growth_exactness.json. Models, batch and measure are those of the unit tests.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the tests' helpers are not installed

from compt_megatron.growth.operators import plan  # noqa: E402
from compt_megatron.spec.families import load_spec  # noqa: E402
from tests.unit.growth_helpers import features, grown_model, perturbed, relative_error  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "growth_exactness.json"
CHAIN = ("T-16-text256", "C-16", "S-16", "M-16", "B-16", "BL-16", "L-16")
PAIRS = [*pairwise(CHAIN), ("T-16-text256", "S-16"), ("T-16", "S-16"), ("S-16", "B-16"), ("B-16", "L-16")]
LIMIT = 1e-5


def measure(small: str, large: str, batch: int) -> dict[str, Any]:
    """Relative errors of image and text features after growing `small` into `large`, with what it took."""
    source, target = load_spec(small), load_spec(large)
    model = perturbed(source.config)
    wanted = features(model, batch=batch)
    started = time.perf_counter()
    made = plan(source, target)
    grown = grown_model(made, model)
    seconds = time.perf_counter() - started
    found = features(grown, batch=batch)
    del grown
    gc.collect()
    corner = features(grown_model(plan(source, target, "corner"), model), batch=batch)
    floor = features(model.double(), batch=batch)
    return {
        "source": small,
        "target": large,
        "width_ratio": round(target.towers["vision"].width / source.towers["vision"].width, 4),
        "depth_ratio": target.towers["vision"].layers / source.towers["vision"].layers,
        "exact": {tower: relative_error(found[tower], wanted[tower]) for tower in wanted},
        "corner": {tower: relative_error(corner[tower], wanted[tower]) for tower in wanted},
        "noise_floor": {tower: relative_error(wanted[tower], floor[tower].float()) for tower in wanted},
        "seconds_to_grow": round(seconds, 2),
        "batch": batch,
    }


def line(row: dict[str, Any]) -> str:
    cells = [f"{row['source']} -> {row['target']}".replace("compt-ViT-", ""), f"{row['width_ratio']:.2f}"]
    cells += [f"{row['depth_ratio']:.1f}"]
    cells += [f"{row[kind][tower]:.1e}" for kind in ("exact", "noise_floor", "corner") for tower in ("image", "text")]
    return "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, (24, 5, 5, 11, 10, 11, 10, 12, 11)))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("pairs", nargs="*", help="SOURCE:TARGET model configs; without any, all of the paper's chains")
    parser.add_argument("--batch", type=int, default=4, help="images and texts in the probe batch")
    options = parser.parse_args()
    pairs = [tuple(pair.split(":")) for pair in options.pairs]
    pairs = pairs or [(f"compt-ViT-{small}", f"compt-ViT-{large}") for small, large in PAIRS]
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"pairs": {}}
    results["command"] = "python benchmarks/growth_exactness.py"
    results["machine"] = {"cpus": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    print(f"{'models':>24}  width depth  exact image       text  floor image       text  corner image        text")
    worst = 0.0
    for small, large in dict.fromkeys(pairs):
        row = measure(small, large, options.batch)
        worst = max(worst, *row["exact"].values())
        print(line(row), flush=True)
        results["pairs"][f"{small} -> {large}"] = row
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        gc.collect()
    print(f"worst {worst:.1e}, limit {LIMIT:.0e}: {'pass' if worst < LIMIT else 'FAIL'}")
    return 0 if worst < LIMIT else 1


if __name__ == "__main__":
    raise SystemExit(main())
