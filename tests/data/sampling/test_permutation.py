"""Random orders without memory: bijections, the same for ever, and random enough."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steel_megatron.data.sampling import permutation
from steel_megatron.data.sampling.permutation import Permutation, hash64
from tests import needs

KEYS = st.lists(st.integers(0, 2**64 - 1), max_size=4).map(tuple)


@given(count=st.integers(0, 3000), key=KEYS)
@settings(max_examples=100, deadline=None)
def test_each_number_comes_once(count: int, key: tuple[int, ...]) -> None:
    order = Permutation(count, key).many(np.arange(count))
    assert sorted(order.tolist()) == list(range(count))


@given(count=st.integers(1, 2**62), key=KEYS, places=st.lists(st.integers(0, 2**62), min_size=1, max_size=20))
def test_one_by_one_is_many(count: int, key: tuple[int, ...], places: list[int]) -> None:
    order, inside = Permutation(count, key), [place % count for place in places]
    many = order.many_by_numpy(np.array(inside, dtype=np.int64)).tolist()
    assert [order(place) for place in inside] == many
    assert all(0 <= number < count for number in many)
    assert len(set(many)) == len(set(inside))


@pytest.mark.parametrize("compiled", [False, True])
def test_the_order_is_the_same_for_ever(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if compiled and permutation.helpers is None:
        needs.compiled.missing()
    if not compiled:
        monkeypatch.setattr(permutation, "helpers", None)
    assert [Permutation(10, (1234,))(place) for place in range(10)] == [1, 0, 4, 5, 2, 7, 6, 9, 3, 8]
    large = Permutation(10**12, (2**64 - 1, 5))
    assert [large(place) for place in (0, 1, 2, 10**12 - 1)] == [339535565563, 338620934456, 101941904242, 112942288028]


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_few_numbers_come_in_every_order_alike(count: int) -> None:
    orders = Counter(tuple(Permutation(count, (key,))(place) for place in range(count)) for key in range(3000))
    kinds = math.factorial(count)
    expected = 3000 / kinds
    chi_square = sum((orders[order] - expected) ** 2 / expected for order in itertools.permutations(range(count)))
    assert abs(chi_square - (kinds - 1)) < 5 * math.sqrt(2 * (kinds - 1))


@pytest.mark.parametrize("count", [64, 1000, 1100, 5000])
def test_many_numbers_look_random(count: int) -> None:
    trials = 400
    orders = np.stack([Permutation(count, (key, 7)).many(np.arange(count)) for key in range(trials)])
    deviation = 5 / math.sqrt(trials)
    assert abs((orders == np.arange(count)).sum(axis=1).mean() - 1) < deviation  # fixed points are Poisson of mean 1
    for step in (1, -1, 2):  # neighbours that stay neighbours, too
        assert abs((np.diff(orders) == step).sum(axis=1).mean() - 1) < deviation
    # Where a number goes: quarters of the places against quarters of the numbers.
    quarters = np.zeros((4, 4))
    np.add.at(quarters, (np.broadcast_to(np.arange(count) * 4 // count, orders.shape), orders * 4 // count), 1)
    assert np.abs(quarters / orders.size * 16 - 1).max() < 5 * 4 / math.sqrt(orders.size)


def test_keys_of_another_length_are_other_keys() -> None:
    keys = [(), (0,), (0, 0), (1,), (0, 1), (1, 0), (2**64 - 1,)]
    assert len({hash64(key) for key in keys}) == len(keys)
