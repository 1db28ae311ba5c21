"""What a training step sends, counted, beside what the planner says it sends: bytes and calls of one rank, by layout.

    python benchmarks/communication.py

Small models on two and four processes on the CPU, both engines. Every collective and transfer of a step is counted
where torch starts it, and held against `compt_megatron.chain.communication`; the bytes that the engines add to
parameters as padding are put on top of the formulas' (by the engines' own rules). Collectives are counted as rings send
them. Prints a line a purpose and writes benchmarks/results/communication.json; exit status 1 where bytes differ.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the tests' helpers are not installed

from compt_megatron.errors import UserError  # noqa: E402
from compt_megatron.recipe.parallel_section import ParallelSettings  # noqa: E402
from tests.distributed.communication_cases import Counted, Found, count, predicted  # noqa: E402
from tests.distributed.engine_cases import write_start  # noqa: E402
from tests.distributed.layout_cases import CONFIG, layout  # noqa: E402
from tests.distributed.spawn import run_ranks  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "communication.json"


def cases(world: int) -> list[Counted]:
    """Both engines, tensor x pipeline x virtual x data, ZeRO stages, sequence parallelism, micro-batches, precision."""
    found = []
    for engine, tensor, pipeline, virtual in product(("deepspeed", "megatron"), (1, 2, 4), (1, 2, 4), (1, 2)):
        if tensor * pipeline > world or pipeline * virtual > 4:  # the model's layers
            continue
        for zero, sequence, micro in product((0, 1, 2, 3), (False, True), (1, 4)):
            parallel = layout(engine, tensor, pipeline, virtual, zero=zero, sequence=sequence, micro_batches=micro)
            try:
                ParallelSettings.model_validate(parallel)
            except (UserError, ValueError):
                continue
            for precision in ("fp32", "bf16"):
                if (zero > 0 and world == tensor * pipeline) or (precision, zero) == ("bf16", 0):
                    continue  # nothing to share out; nobody should train so
                # with several copies the projections, which the formulas leave out, would be among the gradients
                aligned = micro == 1 and world == tensor * pipeline
                found.append(Counted(world, parallel, precision, aligned))  # type: ignore[arg-type]
    return found


def compare(case: Counted, ranks: list[Found]) -> list[dict[str, Any]]:
    """A row for each purpose: of the rank that sends most."""
    said = predicted(case)
    rows = []
    for name in sorted(said.keys() | {name for rank in ranks for name in rank}):
        sent, calls = max(rank.get(name, (0.0, 0)) for rank in ranks)
        formula, formula_calls = said.get(name, (0.0, 0))
        rows.append(
            {
                "purpose": name, "bytes": round(sent), "formula": round(formula), "calls": calls,
                "formula_calls": formula_calls,
            }
        )  # fmt: skip
    return rows


def name_of(case: Counted) -> str:
    """What is special about a layout."""
    parallel = case.parallel
    words = [f"{key} {parallel[key]}" for key in ("tensor", "pipeline", "virtual") if parallel[key] > 1]
    words += ["sequence"] if parallel.get("sequence") else []
    words += [f"{parallel['micro_batches']} micro-batches"] if parallel["micro_batches"] > 1 else []
    words += ["teacher"] if case.aligned else []
    return f"{case.world} ranks: {parallel['engine']} zero {parallel['zero']} {' '.join([*words, case.precision])}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=int, choices=(2, 4), action="append", help="ranks (default: both)")
    options = parser.parse_args()
    found, differ = [], 0
    with tempfile.TemporaryDirectory() as folder:
        start = str(write_start(Path(folder) / "start", CONFIG))
        for world in options.world or (2, 4):
            wanted = cases(world)
            ranks = run_ranks(count, world, [start] * len(wanted), wanted, timeout=3600)
            for number, case in enumerate(wanted):
                rows = compare(case, [rank[number] for rank in ranks])
                found.append({"layout": name_of(case), "parallel": case.parallel, "sent": rows})
                for row in rows:
                    same = row["bytes"] == row["formula"]
                    differ += not same
                    print(
                        f"{name_of(case):<76} {row['purpose']:<10} {row['bytes']:>9} bytes in {row['calls']:>4} calls"
                        + ("" if same else f", formula {row['formula']}"),
                        flush=True,
                    )
    print(f"{len(found)} layouts; {differ} purposes differ from their formula")
    if not options.world:
        result = {"command": "python benchmarks/communication.py", "differ": differ, "layouts": found}
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if differ else 0


if __name__ == "__main__":
    raise SystemExit(main())
