"""Indexed datasets are megatron-core's, byte for byte, both ways; damaged ones are refused in one line."""

from __future__ import annotations

import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from compt_megatron.data.text.indexed import IndexedTokens, IndexedWriter, id_dtype
from compt_megatron.errors import UserError
from tests.unit.text_samples import numbered

DTYPES = ("uint8", "int8", "int16", "int32", "int64", "uint16")
# documents of sequences of ids, all of which may be empty
CORPUS = st.lists(st.lists(st.lists(st.integers(0, 127), max_size=5), max_size=3), min_size=1, max_size=6)


def theirs(prefix: Path, corpus: list[list[list[int]]], dtype: str, multimodal: bool = False) -> None:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", getattr(np, dtype), multimodal)
    for document in corpus:
        for sequence in document:
            builder.add_item(torch.tensor(sequence, dtype=torch.int64), mode=1)
        builder.end_document()
    builder.finalize(f"{prefix}.idx")


def ours(prefix: Path, corpus: list[list[list[int]]], dtype: str) -> None:
    with IndexedWriter(prefix, np.dtype(dtype)) as writer:
        for document in corpus:
            for sequence in document:
                writer.add_sequence(np.array(sequence, np.int64))
            writer.end_document()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(corpus=CORPUS, dtype=st.sampled_from(DTYPES), multimodal=st.booleans())
def test_both_write_the_same_bytes_and_read_each_other(
    corpus: list[list[list[int]]], dtype: str, multimodal: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("indexed")
    theirs(folder / "theirs", corpus, dtype)
    ours(folder / "ours", corpus, dtype)
    for suffix in ("bin", "idx"):
        assert (folder / f"ours.{suffix}").read_bytes() == (folder / f"theirs.{suffix}").read_bytes()
    sequences = [sequence for document in corpus for sequence in document]
    flat = [[token for sequence in document for token in sequence] for document in corpus]
    if not any(flat):
        with pytest.raises(UserError, match="holds no tokens"):
            IndexedTokens(folder / "theirs")
        return
    read = IndexedDataset(str(folder / "ours"))
    assert [read[index].tolist() for index in range(len(read))] == sequences
    assert read.document_indices.tolist() == np.cumsum([0, *map(len, corpus)]).tolist()

    theirs(folder / "other", corpus, dtype, multimodal)
    data = IndexedTokens(folder / "other.idx")
    assert data.dtype == np.dtype(dtype)
    assert (data.modes is not None) == (multimodal and bool(sequences))
    assert [data.document(index).tolist() for index in range(len(data))] == flat
    assert data.lengths.tolist() == list(map(len, sequences))


def test_documents_of_many_at_once_are_the_same_bytes(tmp_path: Path) -> None:
    rows = [[1, 2, 3], [4], [5, 6]]
    ours(tmp_path / "single", [[row] for row in rows], "uint16")
    with IndexedWriter(tmp_path / "many", np.dtype("uint16")) as writer:
        for part in (rows[:2], rows[2:]):
            ids = np.array([token for row in part for token in row], np.uint16)
            writer.add_documents(ids.tobytes(), np.array(list(map(len, part))))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"many{suffix}").read_bytes() == (tmp_path / f"single{suffix}").read_bytes()


def test_reading_copies_nothing_and_survives_pickling(tmp_path: Path) -> None:
    data = numbered(tmp_path / "d", [5, 0, 7]).data
    assert data.document(2).tolist() == list(range(5, 12))
    assert np.shares_memory(data.document(2), data.ids)
    assert not data.ids.flags.writeable
    again = pickle.loads(pickle.dumps(data))
    assert again.ids.tolist() == data.ids.tolist()
    assert again.fingerprint == data.fingerprint
    assert (id_dtype(65_499), id_dtype(65_500)) == (np.dtype("uint16"), np.dtype("int32"))


def test_a_data_set_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    writer = IndexedWriter(tmp_path / "d", np.dtype("uint16"))
    writer.add_sequence(np.arange(9))
    assert [path.name for path in tmp_path.iterdir()] == ["d.bin.partial"]
    writer.discard()
    assert list(tmp_path.iterdir()) == []
    numbered(tmp_path / "d", [3])
    with pytest.raises(UserError, match="exists already"):
        IndexedWriter(tmp_path / "d", np.dtype("uint16"))
    with pytest.raises(UserError, match="ids from 1 to 70000 do not fit uint16"):
        ours(tmp_path / "e", [[[1, 70_000]]], "uint16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.bin", "d.idx"]


def _changed(path: Path, offset: int, form: str, value: Any) -> None:
    content = bytearray(path.read_bytes())
    struct.pack_into(form, content, offset, value)
    path.write_bytes(content)


DAMAGE: dict[str, tuple[Any, str]] = {
    "magic": (lambda p: _changed(p / "d.idx", 0, "B", 0), "not a Megatron index"),
    "version": (lambda p: _changed(p / "d.idx", 9, "<Q", 2), "d.idx: is of version 2; version 1 is the one"),
    "dtype": (lambda p: _changed(p / "d.idx", 17, "B", 9), "unknown dtype code 9"),
    "floats": (lambda p: _changed(p / "d.idx", 17, "B", 7), "holds float32 numbers"),
    "header": (lambda p: (p / "d.idx").write_bytes((p / "d.idx").read_bytes()[:20]), "is cut off after 20 bytes"),
    "index cut off": (
        lambda p: (p / "d.idx").write_bytes((p / "d.idx").read_bytes()[:-1]),
        "has 81 bytes, but its 2 s",
    ),
    "sequences": (lambda p: _changed(p / "d.idx", 18, "<Q", 1 << 60), "has 82 bytes, but its"),
    "length": (lambda p: _changed(p / "d.idx", 34, "<i", -1), "contradict each other"),
    "pointer": (lambda p: _changed(p / "d.idx", 50, "<q", 4), "contradict each other"),
    "documents": (lambda p: _changed(p / "d.idx", 66, "<q", 3), "its documents are not the sequences 0 to 2"),
    "wider": (lambda p: _changed(p / "d.idx", 17, "B", 4), "contradict each other"),
    "bin cut off": (lambda p: (p / "d.bin").write_bytes(bytes(15)), "d.bin: is cut off: 15 bytes, the index says 16"),
    "bin longer": (lambda p: (p / "d.bin").write_bytes(bytes(17)), "d.bin: belongs to another index: 17 bytes"),
    "no bin": (lambda p: (p / "d.bin").unlink(), "d.bin: does not exist"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_data_set_is_refused(damage: str, tmp_path: Path) -> None:
    numbered(tmp_path / "d", [5, 3])
    harm, message = DAMAGE[damage]
    assert len((tmp_path / "d.idx").read_bytes()) == 34 + 2 * 12 + 3 * 8
    harm(tmp_path)
    with pytest.raises(UserError) as caught:
        IndexedTokens(tmp_path / "d")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_ids_beyond_the_vocabulary_name_their_document(tmp_path: Path) -> None:
    data = numbered(tmp_path / "d", [5, 0, 3]).data
    data.check_ids(8)
    with pytest.raises(UserError, match="document 2 has id 5, beyond a vocabulary of 5 tokens"):
        data.check_ids(5)
    ours(tmp_path / "e", [[[1, 2]], [[-1]]], "int32")
    with pytest.raises(UserError, match="document 1 has id -1"):
        IndexedTokens(tmp_path / "e").check_ids(5)
