"""The compiled index helpers give what their numpy references give, and refuse what would make them read elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steel_megatron.data.indexed.exact_duplicates import drop_bits
from steel_megatron.data.native import helpers
from steel_megatron.data.sampling.interleave import counts_below_by_numpy, merge_keys_by_numpy
from steel_megatron.data.sampling.packing import pack_by_numpy
from steel_megatron.data.sampling.permutation import Permutation
from tests import needs

pytestmark = needs.compiled.mark

WORDS = st.integers(0, 2**64 - 1)


@given(count=st.integers(1, 2**62), key=st.tuples(WORDS), places=st.lists(st.integers(0, 2**62), max_size=30))
def test_permutations_are_the_same(count: int, key: tuple[int], places: list[int]) -> None:
    order, inside = Permutation(count, key), np.array([place % count for place in places], dtype=np.int64)
    expected = order.many_by_numpy(inside)
    assert np.array_equal(order.native.many(inside), expected)
    assert [order.native(place) for place in inside.tolist()] == expected.tolist()


@given(
    sizes=st.lists(st.one_of(st.integers(0, 9), st.integers(0, 3000)), min_size=1, max_size=200),
    length=st.integers(1, 64),
    dtype=st.sampled_from([np.int32, np.int64]),
    drop=st.one_of(st.none(), st.sets(st.integers(0, 199))),
    cut=st.integers(0, 199),
)
@settings(deadline=None)
def test_cutting_documents_is_the_same(
    sizes: list[int], length: int, dtype: type, drop: set[int] | None, cut: int
) -> None:
    order, own = Permutation(len(sizes), (3,)), np.array(sizes, dtype=dtype)
    dropped = None if drop is None else drop_bits(np.isin(np.arange(len(sizes)), list(drop)))
    before = 0
    for begin, end in ((0, cut % len(sizes)), (cut % len(sizes), len(sizes))):
        if begin == end:
            continue
        part, after = helpers.pack(order.native, own, dropped, length, begin, end, before)
        expected, before = pack_by_numpy(order, own, dropped, length, begin, end, before)
        assert after == before
        assert part.shape == expected.shape and np.array_equal(part, expected)


COUNTS = st.lists(st.one_of(st.integers(0, 50), st.integers(0, 2**51 // 8)), min_size=1, max_size=8)


@given(counts=COUNTS, seed=WORDS, power=st.integers(0, 40), bucket=st.integers(0, 2**40))
def test_counts_below_a_bound_are_the_same(counts: list[int], seed: int, power: int, bucket: int) -> None:
    own = np.array(counts, dtype=np.int64)
    streams = np.array([(seed + n) % 2**64 for n in range(len(counts))], dtype=np.uint64)
    bound = bucket % (2**power + 1) / 2**power
    assert np.array_equal(helpers.counts_below(own, streams, bound), counts_below_by_numpy(own, streams, bound))


@given(counts=COUNTS, seed=WORDS, bucket=st.integers(0, 2**52))
@settings(deadline=None)
def test_merged_keys_are_the_same(counts: list[int], seed: int, bucket: int) -> None:
    own = np.array(counts, dtype=np.int64)
    streams = np.array([(seed + n) % 2**64 for n in range(len(counts))], dtype=np.uint64)
    buckets = 1 << (sum(counts) // 500).bit_length()
    low, high = (bucket % buckets) / buckets, (bucket % buckets + 1) / buckets
    first, last = (counts_below_by_numpy(own, streams, bound) for bound in (low, high))
    corpora, numbers = helpers.merge_keys(own, streams, first, last, low, high)
    expected = merge_keys_by_numpy(own, streams, first, last)
    assert np.array_equal(corpora, expected[0]) and np.array_equal(numbers, expected[1])
    # Whatever bounds it is told, the order is that of the keys.
    for wrong in ((0.0, 2.0**-40), (low, low + (high - low) / 3)):
        again = helpers.merge_keys(own, streams, first, last, *wrong)
        assert np.array_equal(again[0], expected[0]) and np.array_equal(again[1], expected[1])


def reader(**changes: Any) -> Any:
    """A reader of 4 documents with 10 tokens each, as 3 samples of 11."""
    arguments = {
        "flat": np.arange(40, dtype=np.uint16),
        "positions": np.arange(4, dtype=np.int64) * 20,
        "sizes": np.full(4, 10, dtype=np.int32),
        "dropped": None,
        "documents": Permutation(4, (1,)).native,
        "samples": Permutation(3, (2,)).native,
        "first": np.array([[0, 0], [1, 0], [2, 0]]),
        "length": 10,
    }
    return helpers.Reader(*(arguments | changes).values())


def test_a_reader_takes_arrays_that_are_not_aligned() -> None:
    def unaligned(array: np.ndarray) -> np.ndarray:
        buffer = np.zeros(array.nbytes + 2, dtype=np.uint8)
        shifted = buffer[2:].view(array.dtype)
        shifted[:] = array
        assert not shifted.flags.aligned
        return shifted

    positions, sizes = unaligned(np.arange(4, dtype=np.int64) * 20), unaligned(np.full(4, 10, dtype=np.int32))
    for number in range(3):
        expected = reader().tokens(number)
        assert np.array_equal(reader(positions=positions, sizes=sizes).tokens(number), expected)
        assert len(set(expected.tolist())) == 11


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: reader().tokens(3),
        lambda: reader().tokens(-1),
        lambda: [reader(first=np.array([[4, 0]] * 3)).tokens(n) for n in range(3)],
        lambda: [reader(first=np.array([[0, -1]] * 3)).tokens(n) for n in range(3)],
        lambda: [reader(first=np.array([[0, 11]] * 3)).tokens(n) for n in range(3)],
        lambda: [reader(first=np.array([[3, 5]] * 3)).tokens(n) for n in range(3)],  # no document comes after
        lambda: [reader(positions=np.arange(4) * 20 + 2).tokens(n) for n in range(3)],
        lambda: [reader(sizes=np.full(4, -10, dtype=np.int32)).tokens(n) for n in range(3)],
        lambda: reader(sizes=np.full(4, 10, dtype=np.float32)),
        lambda: reader(flat=np.zeros(40, dtype=np.float32)),
        lambda: reader(flat=np.zeros(80, dtype=np.uint16)[::2]),
        lambda: reader(sizes=np.full(5, 10, dtype=np.int32)),
        lambda: reader(first=np.zeros((2, 2), dtype=np.int64)),
        lambda: reader(first=np.zeros((3, 3), dtype=np.int64)),
        lambda: reader(dropped=np.zeros(2, dtype=np.uint8)),
        lambda: helpers.Permutation(2**62 + 1, [1, 2]),
        lambda: helpers.Permutation(5, [1, 2])(5),
        lambda: helpers.Permutation(5, [1, 2]).many(np.array([0, -1])),
        lambda: helpers.pack(Permutation(4, (1,)).native, np.zeros(3, dtype=np.int32), None, 10, 0, 4, 0),
        lambda: helpers.pack(Permutation(4, (1,)).native, np.zeros(4, dtype=np.int32), None, 10, 0, 5, 0),
        lambda: helpers.pack(Permutation(4, (1,)).native, np.zeros(4, dtype=np.int32), None, 0, 0, 4, 0),
        lambda: helpers.merge_keys(*merge_arguments(last=np.array([3, 5])), 0.0, 1.0),
        lambda: helpers.merge_keys(*merge_arguments(first=np.array([3, -1])), 0.0, 1.0),
        lambda: helpers.merge_keys(*merge_arguments(streams=np.zeros(1, np.uint64)), 0.0, 1.0),
        lambda: helpers.merge_keys(*merge_arguments(counts=np.array([2**53, 4])), 0.0, 1.0),
        lambda: helpers.counts_below(np.array([2**53]), np.zeros(1, np.uint64), 0.5),
    ],
)
def test_what_would_read_elsewhere_is_refused(wrong: Callable[[], object]) -> None:
    with pytest.raises(IndexError):
        wrong()


def merge_arguments(**changes: np.ndarray) -> list[np.ndarray]:
    arguments = {
        "counts": np.array([3, 4]),
        "streams": np.zeros(2, np.uint64),
        "first": np.array([0, 0]),
        "last": np.array([3, 4]),
    }
    return list((arguments | changes).values())
