"""One training goes through engines and layouts: each continues where the one before it stopped, and its files do not
show who wrote them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from compt_megatron.checkpoint.api import convert
from compt_megatron.checkpoint.formats import open_reader
from compt_megatron.spec.families import spec_from_config
from tests.distributed.engine_cases import engine_of, joined, pieces_of, whole_batch, write_start
from tests.distributed.layout_cases import CONFIG, Layout, State, layout, uneven
from tests.distributed.spawn import run_ranks

STEPS, MORE, LR = 2, 1, 1e-3  # steps of a leg; steps that are done twice
RELAY: list[tuple[Layout, int]] = [
    (layout("megatron", 2, 2, micro_batches=2), 4),
    (layout("deepspeed", zero=0), 1),
    (layout("deepspeed", zero=3), 2),
    (layout("deepspeed", 2, zero=1, sequence=True), 4),
    (layout("megatron", 1, 2, 2, zero=0, micro_batches=2), 4),
]
PRECISIONS = ("fp32", "bf16")


@dataclass
class Leg:
    """What one layout did with the checkpoint of the one before it; states are a rank's pieces, then whole."""

    loaded: Any  # the state after loading that
    saved: Any  # after STEPS more
    later: Any  # after MORE more
    again: Any  # after its own checkpoint was loaded back, and MORE more
    losses: list[float]  # of STEPS and MORE
    losses_again: list[float]  # of MORE
    counts: list[int]  # optimizer steps: loaded, saved, later, again
    uneven: list[str]  # model weights that are not their masters, rounded


def go_on(engine: Any, first: int, count: int) -> list[float]:
    place = engine.topology
    steps = range(first, first + count)
    return [engine.step(whole_batch(step).split(place.data)[place.data_rank]).loss for step in steps]


def leg(rank: int, world: int, folder: str, index: int) -> dict[str, Leg]:
    from compt_megatron.engine.runtime import Runtime

    runtime, found = Runtime.start(), {}
    for precision in PRECISIONS:
        root = Path(folder) / precision
        engine = engine_of(runtime, RELAY[index][0], precision, True, CONFIG, lr=LR)
        engine.load(root / str(index))
        loaded, counts, first = pieces_of(engine), [engine._state.step], engine.global_step
        engine.save(root / f"{index}-by-the-next", {"step": first}, [])
        losses = go_on(engine, first, STEPS)
        saved, rounded = pieces_of(engine), uneven(engine)
        counts.append(engine._state.step)
        engine.save(root / str(index + 1), {"step": first + STEPS}, [])
        losses += go_on(engine, first + STEPS, MORE)
        later = pieces_of(engine)
        counts.append(engine._state.step)
        engine.load(root / str(index + 1))
        again = go_on(engine, first + STEPS, MORE)
        counts.append(engine._state.step)
        found[precision] = Leg(loaded, saved, later, pieces_of(engine), losses, again, counts, rounded)
        engine.close()
    return found


def one_process(rank: int, world: int, start: str) -> dict[str, list[float]]:
    """The losses of all legs' steps without a stop."""
    from compt_megatron.engine.runtime import Runtime

    runtime, found = Runtime.start(), {}
    for precision in PRECISIONS:
        engine = engine_of(runtime, {"zero": 1}, precision, True, CONFIG, lr=LR)
        engine.load(Path(start))
        found[precision] = go_on(engine, 0, STEPS * len(RELAY))
        engine.close()
    return found


def whole(legs: list[Leg]) -> Leg:
    spec, first = spec_from_config(CONFIG, "tiny"), legs[0]
    for other in legs[1:]:
        assert (other.losses, other.losses_again, other.counts) == (first.losses, first.losses_again, first.counts)
    states = [joined(spec, [getattr(each, name) for each in legs]) for name in ("loaded", "saved", "later", "again")]
    rounded = [name for each in legs for name in each.uneven]
    return Leg(*states, first.losses, first.losses_again, first.counts, rounded)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("relay")
    for precision in PRECISIONS:
        write_start(root / precision / "0", CONFIG)
    return root


@pytest.fixture(scope="module")
def relay(folder: Path) -> list[dict[str, Leg]]:
    """Every leg by precision."""
    found = []
    for index, (_, world) in enumerate(RELAY):
        ranks = run_ranks(leg, world, str(folder), index)
        found.append({precision: whole([rank[precision] for rank in ranks]) for precision in PRECISIONS})
    return found


def differing(left: State, right: State) -> list[str]:
    """Names of tensors that are not the same in every bit (of numbers: -0.0 and 0.0 are two)."""
    assert left.keys() == right.keys()
    return [name for name, value in left.items() if not torch.equal(_bits(value), _bits(right[name]))]


def _bits(value: torch.Tensor) -> torch.Tensor:
    value = value.contiguous()
    return value.view({4: torch.int32, 2: torch.int16}[value.element_size()]) if value.dim() else value


def contents(path: Path) -> State:
    reader = open_reader(path)
    try:
        return {name: reader.read(name) for name in reader.tensors()}
    finally:
        reader.close()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_five_layouts_train_like_one_process(
    folder: Path, relay: list[dict[str, Leg]], uninterrupted: dict[str, list[float]], precision: str
) -> None:
    legs = [each[precision] for each in relay]
    losses = [loss for each in legs for loss in each.losses[:STEPS]]
    assert losses == pytest.approx(uninterrupted[precision], abs=1e-4 if precision == "fp32" else 5e-2)
    for before, after in pairwise(legs):
        assert differing(before.saved, after.loaded) == []
        assert any(value.any() for name, value in after.loaded.items() if name.startswith("exp_avg_sq/align/"))
    assert [each.counts[0] for each in legs] == [STEPS * index for index in range(len(legs))]
    assert [each.uneven for each in legs] == [[] for _ in legs]


@pytest.fixture(scope="module")
def uninterrupted(folder: Path) -> dict[str, list[float]]:
    return run_ranks(one_process, 1, str(folder / "fp32" / "0"))[0]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("index", range(len(RELAY)), ids=lambda index: str(RELAY[index][0]))
def test_the_same_layout_goes_on_bit_for_bit(relay: list[dict[str, Leg]], index: int, precision: str) -> None:
    found = relay[index][precision]
    assert found.losses_again == found.losses[STEPS:]
    assert differing(found.saved, found.later), "training changes the state"
    assert differing(found.later, found.again) == []
    first = STEPS * index
    assert found.counts == [first, first + STEPS, first + STEPS + MORE, first + STEPS + MORE]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_files_do_not_show_who_wrote_them(
    folder: Path, relay: list[dict[str, Leg]], precision: str, tmp_path: Path
) -> None:
    root = folder / precision
    for index in range(1, len(RELAY)):
        written, next_ones = contents(root / str(index)), contents(root / f"{index}-by-the-next")
        assert written.keys() == next_ones.keys()
        assert {name: value.dtype for name, value in written.items()} == {
            name: value.dtype for name, value in next_ones.items()
        }
        assert differing(written, next_ones) == [], RELAY[index]
    # DeepSpeed's universal checkpoint of what tensor x pipeline ranks wrote: everything it can hold, moments too
    convert(root / "1", tmp_path / "universal", "deepspeed")
    universal, source = contents(tmp_path / "universal"), contents(root / "1")
    for prefix in ("exp_avg/", "exp_avg_sq/", "step/"):
        wanted = {name: value for name, value in source.items() if name.startswith(prefix) and "/align/" not in name}
        assert wanted
        assert differing({name: universal[name] for name in wanted}, wanted) == []
    masters = "master/" if precision == "bf16" else "weight/"
    for name, value in source.items():
        if name.startswith(masters) and "align/" not in name:
            kind = "master" if f"master/{name.removeprefix(masters)}" in universal else "weight"
            assert torch.equal(universal[f"{kind}/{name.removeprefix(masters)}"].float(), value), name
