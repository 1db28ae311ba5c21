"""Tables (Markdown) and the picture of llm_chain, of what has been measured so far."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean

from benchmarks.llm.cells import BATCH, LENGTH, MODELS, PREVIOUS, VARIATIONS, Cell
from benchmarks.llm.compute import Compute
from benchmarks.llm.program import BUDGETS, LINK, TUNED, Pair, Program
from benchmarks.llm.store import Record
from compt_megatron.observe.numbers import human, percent

NOT_YET = "not measured yet"
FIRST, LAST = next(iter(MODELS)), list(MODELS)[-1]


def report(program: Program, family: list[str]) -> str:
    """All tables; what is missing is named."""
    return "\n\n".join(
        [alone_table(program), screen_table(program), family_table(program, family), missing(program, family)]
    )


def alone_table(program: Program) -> str:
    """Losses of the models alone, by budget."""
    rows = []
    for model in MODELS:
        tuned, rate = program.tuning(model)
        tried = ", ".join(f"{cell.rate:g}: {program.known[cell.id]['loss']:.3f}"
                          for cell in sorted(tuned, key=lambda cell: cell.rate)
                          if cell.id in program.known)  # fmt: skip
        row = [model, f"{rate:g}" if rate else NOT_YET, tried or NOT_YET]
        row += ["-" if model == FIRST and budget < BUDGETS[-1]  # it needs no curve
                else _spread(_losses(program, [program.alone(model, seed, budget) for seed in program.seeds]))
                for budget in BUDGETS]  # fmt: skip
        full = _records(program, [program.alone(model, seed, BUDGETS[-1]) for seed in program.seeds])
        row += [human(full[0]["macs"]["total"]), f"{fmean(each['cpu_s'] for each in full):.0f}"] if full else ["-", "-"]
        rows.append(row)
    head = ["model", "rate", f"loss of each rate, {percent(TUNED, 0)} of the tokens"]
    head += [f"loss, {percent(budget, 0)}" for budget in BUDGETS] + ["MACs", "CPU s"]
    whole = f"{BATCH * LENGTH * max(1, round(program.tokens / (BATCH * LENGTH))) / 1e6:.2f} M"
    return f"**Each model alone**, held-out loss in nats a token; all tokens are {whole}:\n\n{_table(head, rows)}"


def screen_table(program: Program) -> str:
    """One factor at a time, the first pair."""
    seed, rows = program.seeds[0], []
    default = program.pair("m", seed, "default")
    for name in VARIATIONS:
        pair, records = program.pair("m", seed, name), _records(program, [program.link("m", seed, name)])
        if pair is None:
            rows.append([name, f"{records[0]['loss']:.4f}" if records else NOT_YET, *["-"] * 6])
            continue
        rows.append([
            name, f"{pair.loss:.4f}", f"{pair.loss - default.loss:+.4f}" if default else "-",
            f"{records[0]['bits_per_byte']:.4f}", human(pair.link), _compute(pair.alone), percent(pair.saving),
            f"{records[0]['cpu_s']:.0f}",
        ])  # fmt: skip
    head = ["link s -> m", "loss", "to default", "bits per byte", "its MACs", "MACs alone", "the pair saves", "CPU s"]
    return (
        f"**The link s -> m**, {percent(LINK, 0)} of the tokens, one seed. *MACs alone*: what m alone needs for that "
        f"loss (`*`: extrapolated); *saves*: s and the link against s and m alone:\n\n{_table(head, rows)}"
    )


def family_table(program: Program, names: list[str]) -> str:
    """The family by the chain against the family alone, over the seeds."""
    rows = []
    for name in names:
        pairs = {seed: found for seed in program.seeds if (found := _family(program, seed, name))}
        records = _records(program, [program.link(LAST, seed, name) for seed in program.seeds])
        if not pairs:
            rows.append([name, NOT_YET, *["-"] * 8])
            continue
        chains, alone = zip(*(_costs(found) for found in pairs.values()))
        last = [found[-1] for found in pairs.values()]
        flag = "*" if any(pair.alone.extrapolated for found in pairs.values() for pair in found) else ""
        mine, theirs = zip(*(_seconds(program, seed, name, found) for seed, found in pairs.items()))
        rows.append([
            name, str(len(pairs)), _spread([found[0].loss for found in pairs.values()]),
            _spread([pair.loss for pair in last]), f"{fmean(each['bits_per_byte'] for each in records):.4f}",
            human(fmean(chains)), human(fmean(alone)) + flag,
            _shares([1 - ours / other for ours, other in zip(chains, alone)]) + flag,
            _shares([1 - ours / pair.alone.macs for ours, pair in zip(chains, last)]) + flag,
            f"{fmean(mine) / 60:.1f} / {fmean(theirs) / 60:.1f}",
        ])  # fmt: skip
    head = ["chain s -> m -> l", "seeds", "loss of m", "loss of l", "bits per byte of l", "MACs, family",
            "MACs, family alone", "the family saves", "for l alone", "CPU min, chain / alone"]  # fmt: skip
    return (
        f"**The family**, each link with {percent(LINK, 0)} of the tokens; teachers are counted. *Alone*: s, and m and "
        "l each trained alone to the same losses (`*`: extrapolated); *for l alone*: the whole chain against l:\n\n"
        + _table(head, rows)
    )


def missing(program: Program, family: list[str]) -> str:
    """One line for each stage: how many of its cells have a result."""
    stages = {
        "tune": program.tune_cells(), "alone": program.alone_cells(), "screen": program.screen_cells(),
        "family": program.family_cells(family),
    }  # fmt: skip
    lines = []
    for stage, cells in stages.items():
        left = [cell for cell in cells if cell.id not in program.known]
        state = f"{len(cells) - len(left)} of {len(cells)} cells" if cells else "waits for the rates"
        lines.append(
            f"- {stage}: {state}" + (f"; missing {'; '.join(cell.label for cell in left[:4])}" if left else "")
        )
    return "**Measured**\n\n" + "\n".join(lines)


def draw(program: Program, family: list[str], path: Path) -> bool:
    """Loss over compute of the last model: alone, and by each chain. False where nothing of that is measured."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.4), layout="constrained")
    axes = figure.subplots()
    for model in PREVIOUS:
        if points := sorted(program.curve(model)):
            axes.plot(*zip(*points), marker="o", color="0.2" if model == LAST else "0.6", label=f"{model} alone")
    for place, name in enumerate(family):
        cells = [program.link(model, program.seeds[0], name) for model in PREVIOUS]
        start = program.alone(FIRST, program.seeds[0], BUDGETS[-1])
        curve = [row for record in _records(program, [start, *cells]) for row in record["curve"]]
        if len(_records(program, cells)) == len(cells):
            axes.plot([row[1] for row in curve], [row[2] for row in curve], marker=".", color=f"C{place}",
                      label=f"chain, {name}")  # fmt: skip
    if not axes.lines:
        return False
    axes.set(xscale="log", xlabel="MACs, predecessors and teachers included", ylabel="held-out loss, nats a token")
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    return True


# -- parts -------------------------------------------------------------------------------------------------------------


def _family(program: Program, seed: int, name: str) -> list[Pair] | None:
    """The pairs of a whole chain, None while one is missing."""
    pairs = [program.pair(model, seed, name) for model in PREVIOUS]
    found = [pair for pair in pairs if pair is not None]
    return found if len(found) == len(pairs) else None


def _costs(pairs: list[Pair]) -> tuple[float, float]:
    """MACs of the family by the chain, and of each of it alone at the same losses."""
    base = pairs[0].before
    return base + sum(pair.link for pair in pairs), base + sum(pair.alone.macs for pair in pairs)


def _seconds(program: Program, seed: int, name: str, pairs: list[Pair]) -> tuple[float, float]:
    """CPU seconds of the same; alone at the mean speed of the largest budget. A training has one thread, so this is
    its time on a core that it has for itself."""
    chain = _records(
        program, [program.alone(FIRST, seed, BUDGETS[-1]), *(program.link(m, seed, name) for m in PREVIOUS)]
    )
    base = chain[0]["cpu_s"]
    alone = base
    for model, pair in zip(PREVIOUS, pairs):
        measured = program.budgets(model)[-1]
        alone += pair.alone.macs * fmean(each["cpu_s"] / each["macs"]["total"] for each in measured)
    return sum(each["cpu_s"] for each in chain), alone


def _records(program: Program, cells: Sequence[Cell | None]) -> list[Record]:
    return [program.known[cell.id] for cell in cells if cell is not None and cell.id in program.known]


def _losses(program: Program, cells: Sequence[Cell | None]) -> list[float]:
    return [record["loss"] for record in _records(program, cells)]


def _range(values: Sequence[float], shown: Callable[[float], str], none: str) -> str:
    """Mean, and least to most where there are several."""
    if not values:
        return none
    mean = shown(fmean(values))
    return mean if len(values) == 1 else f"{mean} ({shown(min(values))} to {shown(max(values))})"


def _spread(losses: Sequence[float]) -> str:
    return _range(losses, lambda value: f"{value:.4f}", NOT_YET)


def _shares(values: Sequence[float]) -> str:
    return _range(values, percent, NOT_YET)


def _compute(compute: Compute) -> str:
    return human(compute.macs) + ("*" if compute.extrapolated else "")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
