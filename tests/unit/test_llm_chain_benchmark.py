"""The bookkeeping of benchmarks/llm_chain.py: compute at equal loss, the search for a rate, cells and their records."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.llm.cells import DEFAULT, VARIATIONS, Cell, layer_map, link_cell, variation
from benchmarks.llm.compute import Point, equal_compute, frontier, next_rates
from benchmarks.llm.program import Program
from benchmarks.llm.report import report
from benchmarks.llm.run import pending
from benchmarks.llm.store import Record, Store
from compt_megatron.growth.depth import layer_uses
from compt_megatron.recipe.schema import Recipe

TOKENS = 5_000_000
SCALE = {"s": 1.0, "m": 2.0, "l": 4.0}


def _law(macs: float) -> float:
    return 3.0 * macs**-0.1


def test_equal_compute_follows_a_power_law_inside_and_outside() -> None:
    points = [Point(macs, _law(macs)) for macs in (4.0, 1.0, 2.0)]
    for macs, outside in ((1.0, False), (1.5, False), (3.0, False), (4.0, False), (8.0, True), (0.5, True)):
        found = equal_compute(points, _law(macs))
        assert found is not None
        assert found.macs == pytest.approx(macs)
        assert found.extrapolated == outside, macs


def test_compute_that_lowered_no_loss_is_no_part_of_the_curve() -> None:
    points = [Point(1.0, 3.0), Point(2.0, 3.1), Point(4.0, 2.0)]
    assert frontier(points) == [points[0], points[2]]
    assert equal_compute(points, 2.5) == equal_compute([points[0], points[2]], 2.5)
    assert equal_compute(points[:2], 2.5) is None


@pytest.mark.parametrize("best", [0.5, 2.0, 4.0, 16.0])
def test_the_search_ends_at_the_best_rate_with_both_neighbours(best: float) -> None:
    losses: dict[float, float] = {}
    while rates := next_rates(losses, 4.0):
        losses |= {rate: abs(rate / best + best / rate) for rate in rates}
    assert min(losses, key=lambda rate: losses[rate]) == best
    assert {best / 2, best * 2} <= set(losses)
    assert len(losses) <= 6


def _record(cell: Cell, loss: float, macs: float, before: float = 0.0) -> Record:
    return {
        "id": cell.id, "model": cell.model, "loss": loss, "bits_per_byte": loss / 2, "macs_before": before,
        "macs": {"train": macs, "teacher": 0.0, "total": macs}, "cpu_s": 10 * macs, "curve": [[1, macs, loss]],
    }  # fmt: skip


def _measured(tokens: int = TOKENS, seeds: tuple[int, ...] = (0, 1)) -> Program:
    """All stages of a world in which a model alone has the loss `_law`, and a link that of twice its compute; without
    alignment, of three times."""
    known: dict[str, Record] = {}
    program = Program(tokens, seeds, known)

    def add(cells: list[Cell]) -> bool:
        new = [cell for cell in cells if cell.id not in known]
        for cell in new:
            macs = SCALE[cell.model] * cell.tokens / tokens
            gain, before = 1.0, 0.0
            if cell.parent is not None:
                gain = 2.0 if "align" in cell.link else 3.0
                parent = known[cell.parent.id]
                before = parent["macs_before"] + parent["macs"]["total"]
            handicap = 1.0 if cell.parent else 1.0 + abs(cell.rate - 8e-3)
            known[cell.id] = _record(cell, _law(gain * macs) * handicap, macs, before)
        return bool(new)

    while add(program.tune_cells()):
        pass
    for cells in (program.alone_cells(), program.screen_cells(), program.family_cells(["default", "align-off"])):
        add(cells)
    return program


def test_a_chain_is_counted_against_each_model_alone() -> None:
    program = _measured()
    assert [program.tuning(model)[1] for model in SCALE] == [8e-3] * 3
    pair = program.pair("m", 0, "default")
    assert pair is not None
    assert pair.alone.macs == pytest.approx(2 * 2 * 0.4), "twice what the link took"
    assert (pair.link, pair.before) == (pytest.approx(0.8), 1.0)
    assert pair.saving == pytest.approx(1 - 1.8 / 2.6)
    last = program.pair("l", 1, "align-off")
    assert last is not None
    assert last.before == pytest.approx(1.8), "s and m"
    assert last.alone.macs == pytest.approx(4.8)
    assert last.alone.extrapolated, "more than the whole budget"
    assert program.best()[0] in {"align-off", "distill"}
    assert "default" not in program.best()
    assert program.family_names() == ["default", *program.best(), "+".join(program.best()[:2])]


def test_the_report_says_what_is_missing_and_prints_what_is_there() -> None:
    empty = report(Program(TOKENS, (0, 1), {}), ["default"])
    assert "not measured yet" in empty
    assert "0 of 9 cells" in empty
    assert "alone: waits for the rates" in empty
    whole = report(_measured(), ["default", "align-off"])
    family = next(line for line in whole.splitlines() if line.startswith("| align-off | 2 |"))
    # s 1, m 0.8, l 1.6 against s 1, m 2.4, l 4.8
    assert "| 3.4 | 8.2* | 58.5 % (58.5 % to 58.5 %)* | 29.2 % (29.2 % to 29.2 %)* |" in family
    assert whole.count("missing") == 0


def test_the_id_of_a_cell_is_of_what_decides_its_result() -> None:
    base = Cell("s", 0, TOKENS, 1e-3)
    cell = link_cell(base, "m", TOKENS, 1e-3)
    other = [
        replace(cell, seed=1), replace(cell, rate=2e-3), replace(cell, warmup=0.0), replace(cell, tokens=TOKENS // 2),
        replace(cell, parent=None), replace(cell, parent=replace(base, seed=1)), replace(cell, link={"grow": None}),
    ]  # fmt: skip
    assert len({cell.id, *(each.id for each in other)}) == 1 + len(other)
    assert replace(cell, evaluations=9, name="other").id == cell.id


def test_variations_differ_and_give_recipes() -> None:
    base = Cell("s", 0, TOKENS, 1e-3)
    cells = {name: link_cell(base, "m", TOKENS, 1e-3, name) for name in VARIATIONS}
    assert len({cell.id for cell in cells.values()}) == len(VARIATIONS)
    both = variation("rate-half+depth-stack")
    assert (both["rate"], both["grow"]["depth"], both["grow"]["moments"]) == (0.5, "stack", "fresh")
    assert DEFAULT["rate"] == 1.0
    for name, cell in cells.items():
        recipe = Recipe.model_validate(cell.recipe(Path("models"), Path("s")))
        first, second = recipe.links
        assert (first.train, first.init, second.steps) == (False, "s", cell.steps)
        assert second.grow is not None
        assert second.grow.moments == ("grow" if name == "moments-grown" else "fresh")
        assert (second.align is None) == (name in {"align-off", "distill"})
        assert (second.distill is not None) == name.startswith("distill")
        assert second.align is None or second.align.layers == ({1: 0} if name == "align-layers" else {})


def test_aligned_layers_are_where_identity_growth_leaves_the_same_states() -> None:
    assert layer_map(5, 3) == {1: 0, 3: 1}, "the last use of each, without the final layer"
    for student, teacher in ((3, 2), (5, 3), (4, 4), (12, 5)):
        uses = layer_uses("identity", teacher, student)
        for layer, source in layer_map(student, teacher).items():
            done = {use.source for use in uses[: layer + 1] if not use.silent}
            assert done == set(range(source + 1)), (student, teacher, layer)


def test_a_torn_line_counts_as_not_written(tmp_path: Path) -> None:
    store = Store(tmp_path / "results" / "cells.jsonl")
    assert store.load() == {}
    store.add({"id": "a", "loss": 1.0})
    with store.path.open("a") as file:
        file.write(json.dumps({"id": "b", "loss": 2.0})[:-4])
    assert set(store.load()) == {"a"}
    store.add({"id": "b", "loss": 3.0})
    assert store.load() == {"a": {"id": "a", "loss": 1.0}, "b": {"id": "b", "loss": 3.0}}


def test_only_cells_without_a_record_run_and_what_they_grow_from(tmp_path: Path) -> None:
    base = Cell("s", 0, TOKENS, 1e-3)
    first, second = (link_cell(base, "m", TOKENS, 1e-3, name) for name in ("default", "align-off"))
    known = {base.id: _record(base, 1.0, 1.0), first.id: _record(first, 1.0, 1.0)}
    assert pending([base, first], known, tmp_path) == []
    assert pending([base, second, second], known, tmp_path) == [base, second], "the base's run folder is gone"
    folder = tmp_path / "runs" / base.id
    folder.mkdir(parents=True)
    for state, expected in (("training", [base, second]), ("done", [second])):
        entry = {"state": state, "checkpoint": "s/checkpoints/step_1"}
        (folder / "chain.json").write_text(json.dumps({"links": [entry]}))
        assert pending([base, first, second], known, tmp_path) == expected
