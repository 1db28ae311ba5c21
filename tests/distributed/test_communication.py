"""The planner's formulas of communication against what a training step really sends: every byte, and the calls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.communication_cases import Counted, Found, count, predicted
from tests.distributed.engine_cases import write_start
from tests.distributed.layout_cases import CONFIG, PLAIN, layout
from tests.distributed.spawn import run_ranks

# matrices of more than 100,000 parameters, which DeepSpeed's stage 3 does not keep gathered
WIDE: dict[str, Any] = {**CONFIG, "vision_cfg": {**CONFIG["vision_cfg"], "width": 256, "layers": 2, "head_width": 64}}
WIDE_PLAIN: dict[str, Any] = {key: value for key, value in WIDE.items() if key != "text_cfg"}
TIED: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 48, "vocab_size": 61, "max_position_embeddings": 32,
    "tie_word_embeddings": True,
}  # fmt: skip
UNTIED = {**TIED, "tie_word_embeddings": False}
CASES = [
    Counted(2, layout("deepspeed", tensor=2, sequence=True), "bf16"),  # first: nothing has prepared megatron-core yet
    Counted(2, layout("deepspeed", zero=0)),
    Counted(2, layout("deepspeed", zero=1, micro_batches=2), "bf16"),
    Counted(2, layout("deepspeed", zero=2, micro_batches=2)),
    Counted(2, layout("deepspeed", zero=3), config=WIDE),
    Counted(2, layout("deepspeed", zero=3, micro_batches=2), config=WIDE),
    Counted(2, layout("megatron", zero=0)),
    Counted(2, layout("megatron", zero=1), "bf16"),
    Counted(2, layout("deepspeed", tensor=2), aligned=True),
    Counted(2, layout("megatron", tensor=2, recompute="full", micro_batches=2)),
    Counted(2, layout("megatron", tensor=2, sequence=True, micro_batches=2)),
    Counted(2, layout("megatron", pipeline=2, virtual=2, micro_batches=4), aligned=True),
    Counted(2, layout("megatron", pipeline=2, micro_batches=2), aligned=True, config=PLAIN),
    Counted(2, layout("deepspeed", zero=3, micro_batches=2), config=WIDE_PLAIN),
    Counted(2, layout("deepspeed", tensor=2), config=TIED),
    Counted(2, layout("megatron", tensor=2, sequence=True, micro_batches=2), config=TIED),
    Counted(2, layout("megatron", pipeline=2, micro_batches=2), config=TIED),
    Counted(2, layout("megatron", zero=1), config=UNTIED),
    Counted(4, layout("megatron", pipeline=4, micro_batches=4), config=TIED),
    Counted(4, layout("megatron", 2, 2, 2, micro_batches=4, sequence=True), config=TIED),
    Counted(4, layout("megatron", pipeline=4, micro_batches=4)),
    Counted(4, layout("megatron", tensor=2, pipeline=2, sequence=True)),
    Counted(4, layout("megatron", pipeline=2, virtual=2, micro_batches=4)),
]
CONFIGS = (CONFIG, WIDE, PLAIN, WIDE_PLAIN, TIED, UNTIED)


def _name(case: Counted) -> str:
    words = [
        key if value is True else f"{key} {value}" for key, value in case.parallel.items() if value not in (1, False)
    ]
    words += [case.config["model_type"]] if "model_type" in case.config else []
    return ", ".join([str(words.pop(0)).removeprefix("engine "), *words, case.precision])


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Found]]:
    """What every rank sent, for the number of each case; one job for each number of ranks."""
    folder: Path = tmp_path_factory.mktemp("start")
    starts = [(config, str(write_start(folder / str(n), config))) for n, config in enumerate(CONFIGS)]
    found: dict[int, list[Found]] = {}
    for world in {case.world for case in CASES}:
        numbers = [number for number, case in enumerate(CASES) if case.world == world]
        paths = [next(start for config, start in starts if config is CASES[number].config) for number in numbers]
        ranks = run_ranks(count, world, paths, [CASES[number] for number in numbers], timeout=200)
        found |= {number: [rank[place] for rank in ranks] for place, number in enumerate(numbers)}
    return found


@pytest.mark.parametrize("number", range(len(CASES)), ids=map(_name, CASES))
def test_a_step_sends_what_the_formulas_say(number: int, counted: dict[int, list[Found]]) -> None:
    said = predicted(CASES[number])
    sent = {name: max(rank.get(name, (0.0, 0)) for rank in counted[number]) for name in said}
    assert {name for rank in counted[number] for name in rank} == said.keys()
    assert {name: value for name, (value, _) in sent.items()} == {name: value for name, (value, _) in said.items()}
    for name in said.keys() & {"tensor", "pipeline", "features", "teacher"}:  # the others go in the engines' buckets
        assert sent[name][1] == said[name][1], name
