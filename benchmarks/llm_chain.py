"""Whether the chain helps language models: small Llamas on the built-in text, chains against each model alone.

    python benchmarks/llm_chain.py [--stage tune|alone|screen|family|all] [--jobs 2] [--report]

Three models s -> m -> l, each wider and deeper than the one before and of about twice its MACs. Stages:

- tune    the best rate of each model alone, on a fifth of the tokens, in factors of two until it lies inside
- alone   each model alone at that rate: half of the tokens and all of them (three seeds), for loss over compute
- screen  s -> m, the link with 40 % of the tokens, one seed, one factor at a time around the default
- family  s -> m -> l with the default, the three variations that saved the most compute, and the best two of them
          together, three seeds

Every training is a cell: `compt train` in a process of its own, with one thread. Its result is a line of
benchmarks/results/llm_chain/cells.jsonl; cells with a line are not repeated, interrupted ones go on. A link is a recipe
of two, the first of which is read from the other cell's last checkpoint and not trained. `--report` prints tables of
what is there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.llm.cells import Cell, variation  # noqa: E402
from benchmarks.llm.program import Program  # noqa: E402
from benchmarks.llm.report import draw, report  # noqa: E402
from benchmarks.llm.run import run_cells  # noqa: E402
from benchmarks.llm.store import Store  # noqa: E402

STAGES = ("tune", "alone", "screen", "family")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=(*STAGES, "all"), default="all")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time, each on one core (default 2)")
    parser.add_argument("--tokens", type=int, default=5_000_000, help="tokens of a model alone (default 5 million)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--configs", nargs="+", metavar="NAME", help="variations of the family, a+b joins two of them "
                        "(default: the default, the best three, the best two together)")  # fmt: skip
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "llm_chain", help="where the runs go")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "llm_chain" / "cells.jsonl")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "images" / "llm_chain.svg")
    parser.add_argument("--report", action="store_true", help="only print what is there, and draw it")
    options = parser.parse_args(argv)
    for name in options.configs or []:
        try:
            variation(name)
        except KeyError as error:
            parser.error(f"--configs {name}: there is no variation {error}")
    store = Store(options.results)

    def program() -> Program:
        return Program(options.tokens, tuple(options.seeds), store.load())

    def family() -> list[str]:
        return options.configs or program().family_names()

    wanted: dict[str, Callable[[], list[Cell]]] = {
        "tune": lambda: program().tune_cells(),
        "alone": lambda: program().alone_cells(),
        "screen": lambda: program().screen_cells(),
        "family": lambda: program().family_cells(family()),
    }
    failed: dict[str, str] = {}
    if not options.report:
        for stage in STAGES if options.stage == "all" else [options.stage]:
            failed |= _run(wanted[stage], store, options.work.resolve(), options.jobs)
    print(report(program(), family()))
    if options.report and draw(program(), family(), options.picture):
        print(f"drawn: {options.picture}")
    for label, reason in failed.items():
        print(f"no result: {label}: {reason}")
    return 1 if failed else 0


def _run(wanted: Callable[[], list[Cell]], store: Store, work: Path, jobs: int) -> dict[str, str]:
    """Run a stage until its results ask for no more cells."""
    failed: dict[str, str] = {}
    while new := [cell for cell in wanted() if cell.id not in store.load() and cell.label not in failed]:
        failed |= run_cells(new, store, work, jobs)
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
