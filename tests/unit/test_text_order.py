"""The order of training samples: a function of the data, the seed and the sample's number alone."""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from compt_megatron.data.text import order as order_module
from compt_megatron.data.text.blend import PARTS, Blend
from compt_megatron.data.text.order import Documents, Pass
from compt_megatron.data.text.sequences import Sequences
from compt_megatron.data.text.shuffle import shuffled, shuffled_one
from compt_megatron.errors import UserError
from tests.unit.text_samples import numbered

LENGTHS = np.random.default_rng(0).integers(0, 40, 300).tolist()


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Documents:
    """300 documents of 0 to 39 tokens, whose ids count up."""
    return numbered(tmp_path_factory.mktemp("numbered") / "d", LENGTHS)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 64, 257, 4096, 10_007])
def test_a_shuffle_is_a_permutation(count: int) -> None:
    whole = shuffled(np.arange(count), count, 7, 1)
    assert sorted(whole.tolist()) == list(range(count))
    some = np.arange(count)[:: max(1, count // 10)]
    assert shuffled(some, count, 7, 1).tolist() == whole[some].tolist()
    assert [shuffled_one(place, count, 7, 1) for place in some.tolist()] == whole[some].tolist()
    if count > 100:
        assert np.abs(np.corrcoef(whole, np.arange(count))[0, 1]) < 0.2
        assert (whole != shuffled(np.arange(count), count, 7, 2)).mean() > 0.9


def test_a_shuffle_puts_everything_everywhere_alike() -> None:
    """Chi-square over the 64 cells of 8 places, 49 degrees of freedom: 85.4 is exceeded once in a thousand."""
    seen = np.zeros((8, 8))
    for seed in range(800):
        seen[np.arange(8), shuffled(np.arange(8), 8, seed)] += 1
    assert ((seen - 100) ** 2 / 100).sum() < 85.4


WEIGHTS = st.lists(st.integers(1, 60), min_size=1, max_size=6)


@settings(max_examples=30, deadline=None)
@example([1.0, 2**0.5, 1e-3, 1e3], 10**9)
@given(WEIGHTS, st.integers(0, 10**9))
def test_a_blend_is_within_one_sample_everywhere(weights: list[float], far: int) -> None:
    blend = Blend(weights)
    shares = np.array(blend.shares) / blend.period
    assert np.abs(shares - np.array(weights) / sum(weights)).max() <= len(weights) / PARTS
    for start in (0, far):
        first: dict[int, int] = {}
        counts: Counter[int] = Counter()
        for sample in range(start, start + 150):
            index, own = blend(sample)
            assert own == first.setdefault(index, own) + counts[index]
            counts[index] += 1
            for known, number in first.items():
                assert abs(number + counts[known] - (sample + 1) * shares[known]) < 1 + 1e-6


def test_usual_weights_are_kept_exactly() -> None:
    assert Blend([0.7, 0.2, 0.1]).shares == [7, 2, 1]
    assert Blend([1, 1, 1]).shares == [1, 1, 1]
    assert Blend([5]).shares == [1]
    assert Blend([1e-9, 1]).shares == [1, PARTS - 1]
    assert Counter(Blend([3, 1])(sample)[0] for sample in range(400)) == {0: 300, 1: 100}
    for wrong in ([0, 1], [-1, 2], [float("nan")], [float("inf")]):
        with pytest.raises(UserError, match="must be numbers above 0"):
            Blend(wrong)


def test_a_pass_lays_whole_documents_end_to_end(documents: Documents) -> None:
    line = Pass(documents, 3, 0)
    ids, firsts = line.read(0, documents.tokens)
    assert sorted(ids.tolist()) == list(range(documents.tokens))
    begins = np.cumsum([0, *LENGTHS])[:-1][np.array(LENGTHS) > 0]
    assert sorted(ids[firsts].tolist()) == begins.tolist()
    inside = np.flatnonzero(~firsts)
    assert (ids[inside] == ids[inside - 1] + 1).all()
    for start, count in ((0, 1), (1234, 1), (1000, 777), (documents.tokens - 5, 5)):
        part = line.read(start, count)
        assert part[0].tolist() == ids[start : start + count].tolist()
        assert part[1].tolist() == firsts[start : start + count].tolist()
    with pytest.raises(IndexError):
        line.read(documents.tokens - 5, 6)
    assert (Pass(documents, 3, 1).read(0, documents.tokens)[0] != ids).any()
    assert Pass(documents, None, 0).read(0, documents.tokens)[0].tolist() == list(range(documents.tokens))


def test_marks_are_kept_and_survive_damage(
    documents: Documents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(order_module, "_SLICE", 128)  # several slices
    cache = tmp_path / "cache"
    plain = Pass(documents, 3, 0).read(700, 500)[0].tolist()
    assert Pass(documents, 3, 0, cache).read(700, 500)[0].tolist() == plain
    (kept,) = cache.iterdir()
    monkeypatch.setattr(Pass, "_made", lambda self: pytest.fail("made again"))
    assert Pass(documents, 3, 0, cache).read(700, 500)[0].tolist() == plain
    monkeypatch.undo()
    for content in (b"", kept.read_bytes()[:-8], bytes(200)):
        kept.write_bytes(content)
        assert Pass(documents, 3, 0, cache).read(700, 500)[0].tolist() == plain
    Pass(Documents(documents.data, 0, 200), 3, 0, cache)
    Pass(documents, 3, 1, cache)
    assert len(list(cache.iterdir())) == 3


def test_a_pass_meets_each_token_once(documents: Documents) -> None:
    length = 48
    sequences = Sequences([("d", documents)], [1.0], length, 5)
    count = len(sequences)
    assert count == (documents.tokens - 1) // length
    orders = []
    for number in range(2):
        rows = [sequences[number * count + index] for index in range(count)]
        targets = [token for row in rows for token in row.ids[1:].tolist()]
        assert len(set(targets)) == len(targets) == count * length
        assert all(row.mask.all() for row in rows)
        orders.append([row.ids.tolist() for row in rows])
        assert len({row.name for row in rows}) == count
    assert orders[0] != orders[1]
    again = pickle.loads(pickle.dumps(sequences))
    for index in np.random.default_rng(1).permutation(2 * count)[:60].tolist():
        assert again[index].ids.tolist() == orders[index // count][index % count]


def test_the_loss_can_leave_out_where_documents_begin(documents: Documents) -> None:
    sequences = Sequences([("d", documents)], [1.0], 64, 5, mask_document_starts=True)
    begins = set(np.cumsum([0, *LENGTHS]).tolist())
    for index in range(len(sequences)):
        ids, mask, _ = sequences[index]
        assert mask.tolist() == [token not in begins for token in ids[1:].tolist()]


def test_a_blend_draws_from_each_set_its_own_samples(documents: Documents, tmp_path: Path) -> None:
    other = numbered(tmp_path / "o", [500])
    alone = [Sequences([("x", part)], [1], 8, 2) for part in (documents, other)]
    both = Sequences([("d", documents), ("o", other)], [0.75, 0.25], 8, 2)
    seen = [0, 0]
    for sample in range(400):  # the smaller set is met more than once
        ids, _, name = both[sample]
        index = "do".index(name[0])
        assert ids.tolist() == alone[index][seen[index]].ids.tolist()
        seen[index] += 1
    assert seen == [300, 100]


def test_a_range_of_documents(documents: Documents) -> None:
    begins = np.cumsum([0, *LENGTHS])
    part = Documents(documents.data, 100, 250)
    ids = Pass(part, 0, 0).read(0, part.tokens)[0]
    assert sorted(ids.tolist()) == list(range(begins[100], begins[250]))


def test_too_little_text_and_foreign_ids_are_refused(tmp_path: Path) -> None:
    few = numbered(tmp_path / "few", [5, 4])
    with pytest.raises(UserError, match=r"data 'x': 9 tokens, fewer than one sequence of 9 \+ 1"):
        Sequences([("x", few)], [1.0], 9)
    assert len(Sequences([("x", few)], [1.0], 8)) == 1
    with pytest.raises(UserError, match="data 'x': id 8 is beyond the vocabulary of 8 tokens"):
        Sequences([("x", few)], [1.0], 8, vocab_size=8)[0]
