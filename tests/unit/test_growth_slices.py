"""Any slice of any target tensor, made by any worker, has the bytes of the whole."""

from __future__ import annotations

from functools import cache
from itertools import product
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compt_megatron.checkpoint import stream
from compt_megatron.checkpoint.contract import Region, region_shape, slabs
from compt_megatron.growth.execute import Maker, target_infos, tree_sum
from compt_megatron.growth.operators import plan
from compt_megatron.growth.plan import GrowthPlan, pair_signs
from tests.unit.growth_helpers import (
    MemoryCheckpoint,
    State,
    carried_out,
    clip_config,
    make_spec,
    perturbed,
    split_state,
)

CASES = {
    "exact": {"operator": "exact"},
    "tile": {"operator": "exact", "axes": {"embed": "tile", "heads": "tile"}},
    "corner": {"operator": "corner", "depth": "stack"},
    "reference": {"operator": "reference"},
    "joint": {"operator": "exact", "allow_approximate": True},
    "layer scale": {"operator": "exact"},
}


@cache
def case(name: str) -> tuple[GrowthPlan, State]:
    scale = {"ls_init_value": 1e-4} if name == "layer scale" else {}
    small = clip_config(**scale)
    large = clip_config(96, 4, 64, 2, joint=40 if name == "joint" else 24, **scale)
    made = plan(make_spec(small), make_spec(large), seed=5, **CASES[name])
    return made, split_state(made.source, {key: value.detach() for key, value in perturbed(small).state_dict().items()})


@cache
def whole(name: str, dtype: torch.dtype) -> State:
    made, tensors = case(name)
    return carried_out(made, {key: value.to(dtype) for key, value in tensors.items()})


@pytest.mark.parametrize("name", CASES)
def test_boxes_cover_every_element_once(name: str) -> None:
    for tensor in case(name)[0].tensors.values():
        count = torch.zeros(tensor.shape, dtype=torch.int32)
        for part in tensor.parts:
            count[tuple(slice(low, high) for low, high in part.box)] += 1
        assert (count == 1).all(), tensor.name


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_slice_has_the_bytes_of_the_whole(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(list(CASES)))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    made, tensors = case(name)
    reader = MemoryCheckpoint(made.source, {key: value.to(dtype) for key, value in tensors.items()})
    tensor = made.tensors[data.draw(st.sampled_from(list(made.tensors)))]
    starts = [data.draw(st.integers(0, size - 1)) for size in tensor.shape]
    region = tuple(
        slice(start, data.draw(st.integers(start + 1, size))) for start, size in zip(starts, tensor.shape, strict=True)
    )
    maker = Maker(made, reader.read)
    found = maker.make(f"weight/{tensor.name}", region, dtype)
    assert torch.equal(found, whole(name, dtype)[tensor.name][region])


@pytest.mark.parametrize("name", ["exact", "reference", "layer scale"])
def test_workers_and_slab_size_change_no_byte(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made, tensors = case(name)
    expected = whole(name, torch.float32)
    for workers, slab in product((1, 2, 4), (1000, 1 << 25)):
        monkeypatch.setattr(stream, "SLAB", slab)
        found = carried_out(made, tensors, workers)
        assert all(torch.equal(found[key], expected[key]) for key in expected), (workers, slab)


def test_work_is_dealt_evenly() -> None:
    infos = target_infos(case("exact")[0], {}, torch.float32)
    units = [[(name, region)] for name, info in infos.items() for region in slabs(info, 2000)]

    def cost(name: str, region: Region) -> int:
        return prod(region_shape(region))

    shares = [stream.share(units, cost, (rank, 4)) for rank in range(4)]
    assert [unit for mine in shares for unit in mine] == units
    loads = [sum(cost(*box) for unit in mine for box in unit) for mine in shares]
    assert max(loads) < 1.05 * min(loads)
    ahead = sum(loads) / 4
    first = [len(stream.share(units, cost, (0, 4), load)) for load in (0, ahead / 2, 2 * ahead)]
    assert first[0] > first[1] > first[2] == 0


def test_only_needed_rows_are_read() -> None:
    """A worker reads what its slice is made of, never a whole tensor for one of its rows."""
    made, tensors = case("exact")
    reader = MemoryCheckpoint(made.source, tensors)
    maker = Maker(made, reader.read)
    maker.make("weight/visual.transformer.resblocks.0.mlp.c_fc.weight", (slice(10, 12), slice(0, 96)))
    assert reader.largest_read == 2 * 48


def test_dtypes_follow_the_source_or_the_user() -> None:
    made, tensors = case("exact")
    half = {key: value.to(torch.bfloat16) if value.dim() > 1 else value for key, value in tensors.items()}
    kept = carried_out(made, half)
    assert kept["visual.proj"].dtype == torch.bfloat16
    assert kept["visual.ln_post.weight"].dtype == torch.float32
    wide = carried_out(made, half, dtype=torch.float64)
    assert {value.dtype for value in wide.values()} == {torch.float64}
    # bf16 is rounded once, from values that were made exactly
    name = "visual.transformer.resblocks.0.mlp.c_proj.weight"
    assert torch.equal(kept[name], wide[name].to(torch.bfloat16))


def test_a_tree_sum_does_not_depend_on_what_lies_beside() -> None:
    values = torch.randn(777, 64, dtype=torch.float64)
    total = tree_sum(values, 0)
    assert torch.allclose(total[0], values.sum(0), rtol=1e-12, atol=1e-12)
    for column in (0, 3, 63):
        assert torch.equal(tree_sum(values[:, column : column + 1].contiguous(), 0), total[:, column : column + 1])


@pytest.mark.parametrize("rows", [2, 3, 4, 7, 64, 65])
def test_pair_signs_sum_to_zero(rows: int) -> None:
    signs = pair_signs(rows)
    assert len(signs) == rows
    assert sum(signs) == 0
    assert 0 not in signs


def test_plans_are_data() -> None:
    import json

    made, _ = case("exact")
    again = plan(made.source, made.target, "exact", depth=made.depth, axes=made.axes, seed=5)
    assert again == made
    content = json.loads(json.dumps(made.to_dict()))
    assert content["exact"]
    assert sum(content["elements"].values()) == made.target.numel
    text = made.describe()
    assert len(text.splitlines()) == 3 + len(made.tensors)
    assert "mean of visual.conv1.weight over dimension 0" in text
