"""Writes the figures of README.md, between its markers, from benchmarks/results/*.json and the planner.

    python -m benchmarks.readme            # write
    python -m benchmarks.readme --check    # only say whether README.md is current (exit status 1 if not)

Every figure is labelled: measured (from a result file), modelled (counted by the planner, nothing was run) or not
measured yet.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.llm.program import Program
from benchmarks.llm.store import Store
from compt_megatron.chain.planner import Plan, make_plan
from compt_megatron.observe.numbers import human, percent
from compt_megatron.recipe.load import load_recipe

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
BEGIN = "<!-- figures: written by `python -m benchmarks.readme`, do not edit -->"
END = "<!-- end of figures -->"
NOT_YET = "not measured yet"
DEMO = "python benchmarks/chain_vs_alone.py"
LANGUAGE_TOKENS, LANGUAGE_SEEDS = 5_000_000, (0, 1, 2)

Row = tuple[str, ...]


def figures(results: Path = RESULTS) -> str:
    """The whole generated block (Markdown), without its markers."""
    return "\n\n".join([demo_section(_load(results, "chain_vs_alone")), other_section(results)])


# -- the demo's chain against its last model alone ---------------------------------------------------------------------


def demo_section(result: dict[str, Any] | None) -> str:
    """The table of the demo, and in one sentence who won.

    `result`: chain_vs_alone.json. Its top1 and top5 are fractions, one a seed; samples and macs are a link's own,
    predecessors not included.
    """
    if result is None:
        return f"**The demo's chain against its last model alone**: {NOT_YET} (`{DEMO}`)."
    links, control = result["links"], result["control"]
    chain_macs = sum(link["macs"] for link in links)
    rows = [_member(link["name"], link) for link in links]
    rows.append(_member(f"{control['name']} (trained alone)", control))
    seeds = result["seeds"]
    head = ("model", "parameters", "samples", "MACs", "top-1, unseen artist", "top-5")
    rate = [f"rate {control['lr']:g}"] if "lr" in control else []
    warmup = [f"warm-up {control['warmup_steps']} steps"] if "warmup_steps" in control else []
    said = f" The control has its own {', '.join([*rate, *warmup])}." if rate or warmup else ""
    return "\n\n".join(
        [
            f"**The demo's chain against its last model alone** (measured, {_seeds(seeds)}: mean, least and most):",
            table(head, rows),
            f"{verdict(links[-1], control, chain_macs)}{said}",
            f"Machine: {machine(result.get('machine'))}. Command: `{result.get('command', DEMO)}`. A link's samples "
            "and MACs are its own; MACs include its teacher's.",
        ]
    )


def verdict(last: dict[str, Any], control: dict[str, Any], chain_macs: float) -> str:
    """Who won, from the seeds' ranges: ranges that overlap are no clear difference."""
    ours, theirs = last["top1"], control["top1"]
    if not ours or not theirs:
        return f"Chain against alone: {NOT_YET}."
    if min(ours) > max(theirs):
        result = "The chain wins"
    elif max(ours) < min(theirs):
        result = "**The chain loses**"
    else:
        result = "No clear difference (the seeds' ranges overlap)"
    points = 100 * (fmean(ours) - fmean(theirs))
    share = control["macs"] / chain_macs
    return (
        f"{result}: {last['name']} at the end of the chain is {points:+.1f} points against the same model alone "
        f"with {share:.2f} times the chain's compute."
    )


def _member(name: str, member: dict[str, Any]) -> Row:
    return (
        name,
        human(member["parameters"]),
        human(member["samples"]) if "samples" in member else "-",
        human(member["macs"]),
        _spread(member.get("top1", [])),
        _spread(member.get("top5", [])),
    )


def _spread(fractions: list[float]) -> str:
    """14.2 % (13.9 to 14.6): mean, least and most."""
    if not fractions:
        return NOT_YET
    assert all(0 <= value <= 1 for value in fractions), f"accuracies are fractions: {fractions}"
    if len(fractions) == 1:
        return percent(fractions[0])
    return f"{percent(fmean(fractions))} ({100 * min(fractions):.1f} to {100 * max(fractions):.1f})"


def _seeds(seeds: list[int]) -> str:
    return f"{len(seeds)} seeds" if len(seeds) != 1 else "one seed, no spread"


# -- everything else ---------------------------------------------------------------------------------------------------


def other_section(results: Path) -> str:
    """The table of single figures: what, value, how it is known, command."""
    rows = [
        demo_time_row(_load(results, "demo")),
        *parity_rows(_load(results, "open_clip_parity")),
        *exactness_rows(_load(results, "growth_exactness")),
        *grow_rows(_load(results, "grow")),
        *(grow_rows(large) if (large := _load(results, "grow_20gb")) else []),
        *(grow_rows(peers) if (peers := _load(results, "grow_peers")) else []),
        *layout_rows(_load(results, "layouts"), _load(results, "communication")),
        *step_rows(_load(results, "train_step")),
        *language_rows(results / "llm_chain" / "cells.jsonl"),
        *modelled_rows(),
        ("accuracy of the CC3M and Merged-15M chains", "-", NOT_YET, "`compt train cc3m`"),
        ("throughput on GPUs, scaling over nodes", "-", NOT_YET, "-"),
    ]
    return table(("figure", "value", "known by", "command"), rows)


def demo_time_row(result: dict[str, Any] | None) -> Row:
    """How long the demo takes once everything is installed. `result`: demo.json, its seconds one a run."""
    what = "`make demo` after installation, minutes"
    if not result:
        return (what, "-", NOT_YET, "`make demo`")
    minutes = ", ".join(f"{seconds / 60:.1f}" for seconds in result["seconds"])
    return (what, minutes, f"measured ({machine(result['machine'])})", "`make demo`")


def parity_rows(result: dict[str, Any] | None) -> list[Row]:
    what, command = (
        "features against open_clip's, fp32, largest relative error",
        "python benchmarks/open_clip_parity.py",
    )
    if not result:
        return [(what, "-", NOT_YET, f"`{command}`")]
    errors = [value for row in result.values() for key, value in row.items() if key.endswith("_relative_error")]
    where = machine(next(iter(result.values())).get("machine"))
    return [(what, f"{max(errors):.1e} over {len(result)} models", f"measured ({where})", f"`{command}`")]


def exactness_rows(result: dict[str, Any] | None) -> list[Row]:
    command = "`python benchmarks/growth_exactness.py`"
    names = {
        "exact": "features after `exact` growth against the source's, fp32, largest relative error",
        "noise_floor": "noise floor of that: the source in fp32 against itself in fp64",
        "corner": "the same after `corner` growth (the paper's text)",
    }
    if not result or not result.get("pairs"):
        return [(what, "-", NOT_YET, command) for what in names.values()]
    pairs = list(result["pairs"].values())
    known = f"measured ({machine(result.get('machine'))})"
    rows = []
    for kind, what in names.items():
        errors = [error for pair in pairs for error in pair[kind].values()]
        text = f"{max(errors):.1e}" if max(errors) < 0.01 else f"{max(errors):.2f}"
        rows.append((what, f"{text} over {len(pairs)} pairs", known, command))
    return rows


def grow_rows(result: dict[str, Any] | None) -> list[Row]:
    """Throughput and memory of the grow tool, from grow.json (beside the peers: grow_peers.json). A task's ratio is
    against the slower of cp + sync and, where entries are new, the generator alone."""
    if not result:
        what = "throughput of `grow` and `convert` beside `cp` + `sync`, memory of a worker"
        return [(what, "-", NOT_YET, "`python benchmarks/grow.py`")]
    known, command = f"measured ({machine(result.get('machine'))})", f"`{result['command']}`"
    rows = []
    for name, found in result["tasks"].items():
        beside = "the slower of `cp` + `sync` and the generator alone" if name.startswith("exact") else "`cp` + `sync`"
        value = f"{found['MB_per_second']} MB/s, {found['ratio']:.2f} of {beside}; {found['peak_MiB']} MiB"
        rows.append((f"{name}, {found['bytes'] / 1e9:.1f} GB", value, known, command))
    for name, found in result["peers"].items():
        if "MB_per_second" in found:
            value = f"{found['MB_per_second']} MB/s; {found['peak_MiB']} MiB"
            rows.append((f"{name} for the same ({found['task']})", value, known, command))
    return rows


def layout_rows(layouts: dict[str, Any] | None, communication: dict[str, Any] | None) -> list[Row]:
    """How near the layouts of several processes come to one, and whether they send what the planner says."""
    command, wire = "`python benchmarks/layouts.py`", "`python benchmarks/communication.py`"
    rows: list[Row] = []
    if layouts:
        known, worst = f"measured ({machine(layouts['machine'])})", layouts["worst"]
        near = f"{worst['loss_error']:.0e}, {worst['gradient_error']:.0e}; {layouts['beyond_a_limit']} beyond a limit"
        what = f"losses of 20 steps and first gradient, {layouts['measured']} layouts, against one process: worst error"
        rows.append((what, near, known, command))
    if communication:
        count = len(communication["layouts"])
        same = f"{count - communication['differ']} of {count}"
        rows.append(("layouts that send exactly the bytes of the planner's formulas", same, "measured", wire))
    return rows


def step_rows(result: dict[str, Any] | None) -> list[Row]:
    """An engine's training step beside others', as ratios of time: below 1 is faster."""
    rows: list[Row] = []
    for precision, found in (result or {}).items():
        known = f"measured ({machine(found['machine'])})"
        for setting in ("task", "distilled"):
            ratios = found.get(setting, {}).get("ratios", {})
            for pair, ratio in ratios.items():
                ours, _, theirs = pair.partition(" / ")
                if "amp" in theirs or (ours != "deepspeed" and f"deepspeed / {theirs}" in ratios and "zero" in ours):
                    continue  # the slower of a contender's two ways
                cpu, teacher = ratio["cpu"], " with a teacher" if setting == "distilled" else ""
                what = f"step of {found['model']['name']}{teacher}, {precision}: {ours} against {theirs}, time"
                value = f"{cpu['median']:.2f} ({cpu['least']:.2f} to {cpu['most']:.2f})"
                rows.append((what, value, known, f"`{found['command']}`"))
    return rows


def language_rows(cells: Path) -> list[Row]:
    """What the chain saves small language models: the family of three, by the default settings and the best, or the
    first pair where that is not measured. `cells`: cells.jsonl."""
    command, program = "`python benchmarks/llm_chain.py`", Program(LANGUAGE_TOKENS, LANGUAGE_SEEDS, Store(cells).load())
    rows: list[Row] = []
    names = program.family_names()
    for models, which, best in (("ml", "chain s -> m -> l", names[-1:]), ("m", "link s -> m", names[1:2])):
        for name in dict.fromkeys(["default", *best]):
            savings = {
                seed: found for seed in program.seeds if (found := program.saving(models, seed, name)) is not None
            }
            if savings:
                what = f"small Llamas on the built-in text, {which}, {name}: compute saved at equal losses"
                rows.append((what, _spread([*savings.values()]), f"measured ({_seeds([*savings])})", command))
        if rows:
            break
    return rows or [("chains of language models against each alone", "-", NOT_YET, command)]


def modelled_rows() -> list[Row]:
    """What the planner counts, beside what the paper reports."""
    four, seven = _plan("cc3m"), _plan("cc3m-seven")
    return [
        (
            "compute of the chain T, S, B, L on CC3M, of training L alone (paper: 28 %)",
            percent(four.last_share),
            "modelled",
            "`compt plan cc3m`",
        ),
        (
            "the four as a chain against one by one (paper: 5.68 times)",
            f"{four.speed_up:.2f} times cheaper",
            "modelled",
            "`compt plan cc3m`",
        ),
        (
            "seven members as a chain against one by one (paper: 7.09 times)",
            f"{seven.speed_up:.2f} times cheaper",
            "modelled",
            "`compt plan cc3m-seven`",
        ),
    ]


def _plan(recipe: str) -> Plan:
    return make_plan(load_recipe(recipe))


def machine(known: dict[str, Any] | str | None) -> str:
    """One line about the machine, as a result file has it: text, or a mapping of what is known."""
    if isinstance(known, dict):
        return ", ".join(f"{key} {value}" for key, value in known.items())
    return known or "unknown machine"


def table(head: Row, rows: list[Row]) -> str:
    """A Markdown table."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _load(results: Path, name: str) -> dict[str, Any] | None:
    path = results / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


# -- the file ----------------------------------------------------------------------------------------------------------


def with_figures(text: str, block: str) -> str:
    """`text` of a README with what stands between its markers replaced by `block`."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin, "README.md has no begin marker of the figures"
    assert end, "README.md has no end marker of the figures"
    return f"{before}{BEGIN}\n\n{block}\n\n{END}{after}"


def main(argv: list[str]) -> int:
    text = README.read_text(encoding="utf-8")
    wanted = with_figures(text, figures())
    if text == wanted:
        print("README.md is current")
        return 0
    if "--check" in argv:
        print("README.md: its figures are not those of benchmarks/results; run python -m benchmarks.readme")
        return 1
    README.write_text(wanted, encoding="utf-8")
    print("README.md: figures written")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
