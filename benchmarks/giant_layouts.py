"""The cheapest layouts of the giant models on 8 to 512 GPUs of 80 GB: `compt plan RECIPE --scaling`, its last links.

    python benchmarks/giant_layouts.py

Predictions, nothing is measured. Writes benchmarks/results/giant_layouts.json and the table of docs/giants.md; a test
builds and checks every layout of that file without weights.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from compt_megatron.chain.hardware import Hardware
from compt_megatron.chain.layouts import Proposal, cheapest
from compt_megatron.chain.member import link_members
from compt_megatron.chain.planner import SCALES
from compt_megatron.chain.workload import Workload
from compt_megatron.recipe.load import load_recipe

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "giant_layouts.json"
PAGE = ROOT / "docs" / "giants.md"
MARK = "<!-- layouts: written by `python benchmarks/giant_layouts.py` -->\n"
END = "<!-- end of layouts -->"
RECIPES = ("vit-h", "vit-g", "vit-bigg", "vit-e", "vit-22b")


def proposed(name: str) -> dict[int, Proposal]:
    """Ranks -> the cheapest layout of a recipe's last link."""
    members = link_members(load_recipe(name), None)
    workload = Workload.of(members[-1], members[-2].spec)
    found = {ranks: cheapest(workload, ranks, Hardware()) for ranks in SCALES}
    return {ranks: one for ranks, one in found.items() if one is not None}


def table(recipes: dict[str, dict[int, Proposal]]) -> str:
    """The table of docs/giants.md. Efficiency: samples/s of a rank against those on the fewest ranks."""
    lines = [
        "| recipe | GPUs | `parallel` of the last link | GB a GPU | step, s | MFU | samples/s | efficiency |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, found in recipes.items():
        first = next(iter(found.values()))
        for ranks, one in found.items():
            share = one.samples_per_second / ranks / (first.samples_per_second / first.ranks)
            cells = (
                name,
                str(ranks),
                f"`{one.describe()}`",
                f"{one.memory.total / 1e9:.0f}",
                f"{one.time.total:.3g}",
                f"{100 * one.time.mfu:.0f} %",
                f"{one.samples_per_second:,.0f}",
                f"{100 * share:.0f} %",
            )
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    recipes = {}
    for name in RECIPES:
        recipes[name] = proposed(name)
        print(name, *(f"{ranks}: {one.describe()};" for ranks, one in recipes[name].items()), flush=True)
    plain: dict[str, Any] = {
        name: {ranks: one.to_dict() | {"overrides": one.overrides()} for ranks, one in found.items()}
        for name, found in recipes.items()
    }
    RESULTS.write_text(json.dumps({"hardware": asdict(Hardware()), "recipes": plain}, indent=1) + "\n")
    before, _, rest = PAGE.read_text().partition(MARK)
    PAGE.write_text(f"{before}{MARK}\n{table(recipes)}\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
