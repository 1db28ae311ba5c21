"""Every layout of four processes against one process: losses of twenty steps, gradients of the first.

    python benchmarks/layouts.py                          # all, about an hour on two cores
    python benchmarks/layouts.py --engine deepspeed       # a part; --model, --tensor, --pipeline likewise

Tensor x pipeline x virtual pipeline x data parallel over four processes, both engines, each ZeRO stage that an engine
has, sequence parallelism, one and four micro-batches, with and without a teacher (and projections), a small CLIP and a
small plain ViT, fp32 on CPU. Limits: losses within 1e-4 of one process's, the gradient of the first step within 1e-5
(relative L2, tensor by tensor). Prints a line a layout and adds them to benchmarks/results/layouts.json; exit status 1
where one is beyond.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from itertools import groupby, product
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the tests' helpers are not installed

from tests.distributed.engine_cases import write_start  # noqa: E402
from tests.distributed.layout_cases import (  # noqa: E402
    CONFIG,
    Case,
    Ran,
    distance,
    gradient,
    layout,
    loss_distance,
    outcomes,
)

RESULTS = ROOT / "benchmarks" / "results" / "layouts.json"
WORLD, STEPS = 4, 20
LOSS_LIMIT, GRADIENT_LIMIT = 1e-4, 1e-5
OPTIMIZER = {"lr": 1e-3}
MODELS = ("clip", "vit")
ONE_PROCESS = {"zero": 0}
ERRORS = ("loss_error", "gradient_error", "norm_error")


def model_config(model: str, parallel: dict[str, Any]) -> dict[str, Any]:
    """Four heads a tower, and a layer for each chunk of a stage; two where there are fewer."""
    layers = max(2, parallel["pipeline"] * parallel["virtual"])
    towers = {name: {**CONFIG[name], "layers": layers} for name in ("vision_cfg", "text_cfg")}
    config = {**CONFIG, **towers}
    return config if model == "clip" else {key: value for key, value in config.items() if key != "text_cfg"}


def layouts() -> list[dict[str, Any]]:
    """The section `parallel` of every layout that four processes allow, those with the same process groups together."""
    found = []
    for engine, tensor, pipeline, virtual in product(("deepspeed", "megatron"), (1, 2, 4), (1, 2, 4), (1, 2)):
        if tensor * pipeline > WORLD or (virtual > 1 and pipeline == 1) or (engine == "deepspeed" and pipeline > 1):
            continue
        stages = range(4) if engine == "deepspeed" else range(2)
        for zero, sequence, micro in product(stages, (False, True), (1, 4)):
            if (sequence and tensor == 1) or micro % (pipeline if virtual > 1 else 1):
                continue
            found.append(layout(engine, tensor, pipeline, virtual, zero=zero, sequence=sequence, micro_batches=micro))
    return found


def row(model: str, case: Case, ran: Ran, wanted: Ran) -> dict[str, Any]:
    parallel = case.parallel
    data = WORLD // (parallel["tensor"] * parallel["pipeline"])
    losses, gradients = loss_distance(ran, wanted), distance(gradient(ran), gradient(wanted))
    return {
        "model": model,
        "teacher": case.aligned,
        **parallel,
        "data": data,
        "layers": case.config["vision_cfg"]["layers"],
        "loss_error": losses,
        "gradient_error": gradients,
        "norm_error": max(abs(a - b) / b for a, b in zip(ran.norms, wanted.norms, strict=True)),
        "last_loss": ran.losses[-1][0],
        "seconds": round(ran.seconds, 2),
        "good": losses <= LOSS_LIMIT and gradients <= GRADIENT_LIMIT,
    }


_COLUMNS = (
    ("model", 5), ("teacher", 7), ("engine", 9), ("tensor", 6), ("pipeline", 8), ("virtual", 7), ("data", 4),
    ("zero", 4), ("sequence", 8), ("micro_batches", 13), ("loss_error", 10), ("gradient_error", 14), ("good", 4),
)  # fmt: skip


def line(found: dict[str, Any]) -> str:
    def cell(value: Any) -> str:
        if isinstance(value, bool):
            return "yes" if value else "no"
        return f"{value:.1e}" if isinstance(value, float) else str(value)

    return "  ".join(f"{cell(found[name]):>{width}}" for name, width in _COLUMNS)


def measure(folder: Path, model: str, chosen: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """All chosen layouts of a model, one job of processes for those that have the same process groups."""
    names = ("engine", "tensor", "pipeline", "virtual")
    expected: dict[str, list[Ran]] = {}
    for _, together in groupby(chosen, key=lambda parallel: [parallel[name] for name in names]):
        parallels = list(together)
        config = model_config(model, parallels[0])
        start = folder / f"{model}-{config['vision_cfg']['layers']}"
        if start.name not in expected:
            write_start(start, config)
            expected[start.name] = outcomes(start, _cases([ONE_PROCESS], config), 1)
        ready = _cases(parallels, config)
        ran = zip(ready, outcomes(start, ready, WORLD, timeout=1800), strict=True)
        yield [row(model, case, found, expected[start.name][case.aligned]) for case, found in ran]


def _cases(parallels: list[dict[str, Any]], config: dict[str, Any]) -> list[Case]:
    """Each layout without a teacher and with one."""
    pairs = product(parallels, (False, True))
    return [Case(parallel, STEPS, aligned, "fp32", config, OPTIMIZER) for parallel, aligned in pairs]


def add(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Put rows into the results, in place of older ones of the same layouts."""
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"layouts": []}
    known = {_key(old): old for old in [*results["layouts"], *rows]}
    places = [_key({"model": model, "teacher": teacher, **parallel})
              for model in MODELS for parallel in layouts() for teacher in (False, True)]  # fmt: skip
    kept = [known[place] for place in places if place in known]
    results = {
        "command": "python benchmarks/layouts.py",
        "machine": {"cpus": os.cpu_count(), "threads": 1, "torch": torch.__version__},
        "steps": STEPS,
        "limits": {"loss": LOSS_LIMIT, "gradient": GRADIENT_LIMIT},
        "measured": f"{len(kept)} of {len(places)}",
        "beyond_a_limit": sum(not found["good"] for found in kept),
        "worst": {name: max(found[name] for found in kept) for name in ERRORS},
        "layouts": kept,
    }
    lines = ",\n".join("  " + json.dumps(found) for found in results.pop("layouts"))
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1)[:-2] + f',\n "layouts": [\n{lines}\n ]\n}}\n')
    return results


def _key(found: dict[str, Any]) -> str:
    names = ("model", "teacher", "engine", "tensor", "pipeline", "virtual", "zero", "sequence", "micro_batches")
    return json.dumps([found[name] for name in names])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=[*MODELS])
    parser.add_argument("--engine", choices=["deepspeed", "megatron"])
    parser.add_argument("--tensor", type=int)
    parser.add_argument("--pipeline", type=int)
    options = parser.parse_args()
    chosen = [
        parallel
        for parallel in layouts()
        if all(getattr(options, name) in (None, parallel[name]) for name in ("engine", "tensor", "pipeline"))
    ]
    print("  ".join(f"{name:>{width}}" for name, width in _COLUMNS))
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for model in [options.model] if options.model else [*MODELS]:
            for found in measure(Path(folder), model, chosen):
                rows += found
                print("\n".join(line(each) for each in found), flush=True)
                add(found)
    failed = sum(not found["good"] for found in rows)
    worst = ", ".join(f"{name.removesuffix('_error')} {max(found[name] for found in rows):.1e}" for name in ERRORS)
    print(f"{len(rows)} layouts, {failed} beyond a limit; worst {worst}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
