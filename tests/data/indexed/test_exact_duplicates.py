"""Documents that are the same as others: found whatever their dtype, left out of samples, never lost."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steel_megatron.data.indexed import exact_duplicates as duplicates
from steel_megatron.data.indexed.dataset import IndexedCorpus
from steel_megatron.data.indexed.exact_duplicates import bits_of, drop_bits, duplicate_documents
from steel_megatron.data.ledger.changes import apply_pending, cancel, lost, remove
from steel_megatron.data.ledger.ledger import Ledger, OpenCorpora
from steel_megatron.errors import DataError
from tests.data.corpora import write

TEXTS = st.lists(st.lists(st.integers(0, 2), max_size=3), min_size=1, max_size=30)


def in_memory(documents: list[list[int]], dtype: type) -> IndexedCorpus:
    sizes = np.array([len(document) for document in documents], dtype=np.int32)
    positions = (np.cumsum(sizes, dtype=np.int64) - sizes) * np.dtype(dtype).itemsize
    return IndexedCorpus("memory", np.array(list(itertools.chain(*documents)), dtype=dtype), positions, sizes, {})


@given(
    new=TEXTS,
    others=st.lists(TEXTS, max_size=3),
    dtype=st.sampled_from([np.uint8, np.uint16, np.int32, np.int64]),
    chunk=st.sampled_from([1, 4, 1 << 16]),
    drop=st.sets(st.integers(0, 29)),
)
@settings(max_examples=100, deadline=None)
def test_duplicates_are_those_of_a_set(
    new: list[list[int]], others: list[list[list[int]]], dtype: type, chunk: int, drop: set[int]
) -> None:
    seen = {tuple(text) for other in others for number, text in enumerate(other) if number not in drop}
    expected = []
    for text in new:
        expected.append(bool(text) and tuple(text) in seen)
        seen.add(tuple(text))
    compared = [
        (in_memory(other, np.uint16), drop_bits(np.isin(np.arange(len(other)), list(drop)))) for other in others
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(duplicates, "_CHUNK_DOCUMENTS", chunk)
        patch.setattr(duplicates, "_CHUNK_TOKENS", chunk)
        found = duplicate_documents(in_memory(new, dtype), compared)
    assert bits_of(found.bits, 0, len(new)).tolist() == expected
    assert found.documents == sum(expected)
    left = {tuple(text) for text in new if text}
    for number, other in enumerate(others):
        has = left & {tuple(text) for at, text in enumerate(other) if at not in drop}
        assert (number in found.like) == bool(has)
        left -= has
    assert found.tokens == sum(len(text) for text, same in zip(new, expected, strict=True) if same)


def texts(*numbers: int) -> list[list[int]]:
    return [list(range(30 * number, 30 * number + 20)) for number in numbers]


def read(ledger: Ledger) -> Counter[int]:
    """How often each token is predicted in the whole run."""
    corpora, found = OpenCorpora(ledger), Counter[int]()
    for number, entry in enumerate(ledger.history.corpora):
        packed = ledger.packed(number, 0, corpora[number])
        assert len(packed) == entry.samples(ledger.history.sequence_length)
        for sample in range(len(packed)):
            found.update(packed.tokens(sample)[1:].tolist())
    return found


def test_duplicates_are_dropped_on_append(tmp_path: Path) -> None:
    first = write(tmp_path / "first", texts(*range(50)))
    second = write(tmp_path / "second", texts(*range(40, 90), 60, 61), np.int32)
    third = write(tmp_path / "third", texts(*range(30), *range(80, 120)))
    path = tmp_path / "ledger.json"
    Ledger.create([first], sequence_length=10, seed=1).save(path)
    ledger = Ledger.load(path).append([second, third], drop_duplicates=True)
    dropped = [entry.dropped for entry in ledger.history.corpora]
    assert dropped[0] is None
    assert [(of.documents, of.tokens) for of in dropped[1:] if of] == [(12, 240), (40, 800)]
    ledger.save(path)
    again = Ledger.load(path).then(apply_pending, 30)
    assert set(read(again).values()) == {1}
    assert again.history.schedule.capacity() == 99 + 79 + 59
    # Where documents were dropped decides what was read.
    plain = Ledger.load(path).append([write(tmp_path / "x", texts(*range(200, 250)))], drop_duplicates=True)
    assert plain.history.corpora[-1].dropped is None
    contents = [entry.content for entry in again.history.corpora]
    assert [of.like for of in dropped[1:] if of] == [tuple(contents[:1]), tuple(contents[:2])]


def test_a_corpus_of_duplicates_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    ledger = Ledger.create([write(tmp_path / "first", texts(*range(50)))], sequence_length=10, seed=1)
    copy = write(tmp_path / "copy", texts(*range(49)))
    with pytest.raises(DataError, match=r"980 tokens \(980 of them in dropped documents\) make no sample"):
        ledger.append([copy], drop_duplicates=True)
    assert not list(tmp_path.glob("dropped-*"))


def test_damaged_files_of_dropped_documents_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.json"
    Ledger.create([write(tmp_path / "first", texts(*range(50)))], sequence_length=10, seed=1).save(path)
    ledger = Ledger.load(path).append([write(tmp_path / "second", texts(*range(40, 90)))], drop_duplicates=True)
    file = next(tmp_path.glob("dropped-*.npy"))
    content = file.read_bytes()
    file.write_bytes(content[:-1] + b"\xff")
    with pytest.raises(DataError, match=f"{file} has changed since documents of second were dropped"):
        OpenCorpora(ledger)
    file.unlink()
    with pytest.raises(DataError, match=f"cannot read {file}"):
        OpenCorpora(ledger)


def append_all(path: Path, prefix: str) -> Ledger:
    return Ledger.load(path).append([prefix], drop_duplicates=True)


def dropped(ledger: Ledger) -> int:
    return of.documents if (of := ledger.history.corpora[-1].dropped) else 0


def test_documents_are_compared_with_all_that_is_read(tmp_path: Path) -> None:
    path, new = tmp_path / "ledger.json", write(tmp_path / "new", texts(*range(40, 90)))
    begin = Ledger.create([write(tmp_path / "a", texts(*range(50)))], sequence_length=10, seed=1)
    begin = begin.append([write(tmp_path / "base", texts(*range(200, 260)))], at=0)
    begin.then(remove, ["a"], at=300).save(path)  # later, when it is read
    assert dropped(append_all(path, new)) == 10
    begin.append([write(tmp_path / "c", texts(*range(60, 80)))], at=120).save(path)  # comes in later
    assert dropped(append_all(path, new)) == 30
    begin.then(remove, ["a"], at=218).then(apply_pending, 218).save(path)  # was read in full
    assert dropped(append_all(path, new)) == 10
    begin.then(remove, ["a"], at=0).then(apply_pending, 10).save(path)  # was never read
    assert dropped(append_all(path, new)) == 0


def test_of_a_removed_corpus_what_was_read_counts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, new = tmp_path / "ledger.json", write(tmp_path / "new", texts(*range(90)))
    begin = Ledger.create([write(tmp_path / "a", texts(*range(50)))], sequence_length=10, seed=1)
    begin = begin.append([write(tmp_path / "base", texts(*range(200, 260)))], at=0)
    ledger = begin.then(remove, ["a"], at=100).then(apply_pending, 100)
    ledger.save(path)
    first = ledger.packed(0, 0, OpenCorpora(ledger)[0])
    spans = [span for sample in range(int(ledger.history.schedule.consumed(100)[0])) for span in first.spans(sample)]
    grown = append_all(path, new)
    assert 10 < dropped(grown) == len({span.document for span in spans}) < 50
    assert lost(grown.history) == set()
    for file in tmp_path.glob("a.*"):
        file.unlink()
    assert dropped(append_all(path, new)) == 0
    assert "a was removed; documents are not compared with what was read of it" in caplog.text


def test_what_would_be_lost_with_another_corpus_is_refused(tmp_path: Path) -> None:
    path, new = tmp_path / "ledger.json", write(tmp_path / "new", texts(*range(40, 90)))
    begin = Ledger.create([write(tmp_path / "base", texts(*range(200, 260)))], sequence_length=10, seed=1)
    begin.append([write(tmp_path / "a", texts(*range(50)))], at=5).save(path)
    ledger = append_all(path, new)
    with pytest.raises(DataError, match=r"documents of new were dropped because .* would not be read completely"):
        ledger.then(cancel, 5)
    with pytest.raises(DataError, match="documents of new were dropped because a has them"):
        ledger.then(remove, ["a"], at=20)
    Ledger.load(path).then(remove, ["a"], at=20).save(path)
    with pytest.raises(DataError, match="documents of new were dropped because a has them"):
        append_all(path, new)
