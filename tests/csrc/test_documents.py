"""The compiled helpers for documents on their way to the disk give what their numpy references give."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steel_megatron.data.native import helpers
from steel_megatron.data.preprocessing.stored_documents import count_ids, stored_documents, stored_documents_by_numpy
from tests import needs

pytestmark = needs.compiled.mark

DOCUMENTS = st.lists(st.tuples(st.lists(st.integers(0, 9), max_size=5), st.booleans()), max_size=12)


@given(DOCUMENTS, st.none() | st.integers(0, 9), st.sampled_from([np.uint16, np.int32]))
def test_stored_documents_are_the_same(documents: list[tuple[list[int], bool]], eod: int | None, dtype: type) -> None:
    ids = np.array([token for tokens, _ in documents for token in tokens], dtype=np.int32)
    lengths = np.array([len(tokens) for tokens, _ in documents], dtype=np.int64)
    chosen = np.array([wanted for _, wanted in documents], dtype=bool)
    found = stored_documents(ids, lengths, chosen, eod, np.dtype(dtype))
    expected = stored_documents_by_numpy(ids, lengths, chosen, eod, np.dtype(dtype))
    assert found[0].dtype == expected[0].dtype == dtype and found[1].dtype == expected[1].dtype == np.int64
    assert all(map(np.array_equal, found, expected))
    ended = [
        tokens if eod is None or tokens[-1:] == [eod] else [*tokens, eod] for tokens, wanted in documents if wanted
    ]
    assert found[0].tolist() == [token for tokens in ended for token in tokens]
    assert found[1].tolist() == list(map(len, ended))


@given(st.lists(st.integers(0, 9)), st.sampled_from([np.uint16, np.int32]))
def test_tokens_are_counted(ids: list[int], dtype: type) -> None:
    counts = np.arange(10)
    count_ids(counts, np.array(ids, dtype=dtype))
    assert np.array_equal(counts, np.arange(10) + np.bincount(ids, minlength=10))


def test_nothing_is_read_elsewhere() -> None:
    ids, one = np.array([1, 2, 3], dtype=np.int32), np.ones(1, dtype=np.uint8)
    for lengths in ([2], [4], [-1], [2**62]):
        with pytest.raises(IndexError, match="documents have the ids"):
            helpers.stored_documents(ids, np.array(lengths), one, -1, 4)
    with pytest.raises(IndexError, match="a choice for each document"):
        helpers.stored_documents(ids, np.array([1, 2]), one, -1, 4)
    with pytest.raises(IndexError, match="2 or 4 bytes"):
        helpers.stored_documents(ids, np.array([3]), one, -1, 8)
    for outside in (np.array([3], np.uint16), np.array([-1], np.int32)):
        with pytest.raises(IndexError, match="outside the vocabulary"):
            helpers.count_ids(np.zeros(3, np.int64), outside)
    with pytest.raises(IndexError, match="one piece"):
        helpers.count_ids(np.zeros(9, np.int64), ids[::2])
    for not_written_to in (np.zeros(9, np.int32), np.zeros(9, np.int64)[::2]):
        with pytest.raises(TypeError, match="incompatible function arguments"):
            helpers.count_ids(not_written_to, ids)
    with pytest.raises(TypeError, match="uint16 or int32"):
        helpers.count_ids(np.zeros(9, np.int64), ids.astype(np.int64))
