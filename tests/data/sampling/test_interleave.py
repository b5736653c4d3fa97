"""Mixing corpora: the order by buckets is that of all keys sorted, and holds the mixture everywhere."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from steel_megatron.data.sampling import interleave as mixing
from steel_megatron.data.sampling.interleave import Interleave
from steel_megatron.data.sampling.permutation import GOLDEN, MASK, finalise, hash64
from tests import needs


@pytest.fixture(params=["compiled", "numpy"], autouse=True)
def both(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test, with the compiled helpers and without."""
    if request.param == "numpy":
        monkeypatch.setattr(mixing, "helpers", None)
    elif mixing.helpers is None:
        needs.compiled.missing()


def exact_key(count: int, key: tuple[int, ...], corpus: int, number: int) -> float:
    """A sample's key by Python's exact integers, rounded once."""
    bits = 53 - count.bit_length()
    draw = finalise(hash64((*key, corpus)) + (number + 1) * GOLDEN & MASK) >> 64 - bits
    return float(Fraction((number << bits) + draw, count << bits))


def by_sorting(counts: list[int], key: tuple[int, ...]) -> list[tuple[int, int]]:
    samples = [(corpus, number) for corpus, count in enumerate(counts) for number in range(count)]
    return sorted(samples, key=lambda sample: (exact_key(counts[sample[0]], key, *sample), sample))


@given(
    counts=st.lists(st.integers(0, 400), min_size=1, max_size=8),
    key=st.tuples(st.integers(0, 2**64 - 1)),
    bucket=st.sampled_from([1, 3, 40, 4096]),
    data=st.data(),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_order_is_that_of_the_keys(
    counts: list[int], key: tuple[int, ...], bucket: int, data: st.DataObject
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixing, "_BUCKET", bucket)
        patch.setattr(mixing, "_BUCKET_OF_CORPUS", 1)
        order = Interleave(counts, key)
    expected = by_sorting(counts, key)
    corpora, numbers = order.slice(0, len(order))
    assert list(zip(corpora.tolist(), numbers.tolist(), strict=True)) == expected
    for position in data.draw(st.lists(st.integers(0, max(0, len(order) - 1)), max_size=5)) if len(order) else []:
        assert order.at(position) == expected[position]
        before = np.bincount([corpus for corpus, _ in expected[:position]], minlength=len(counts))
        assert order.counts_before(position).tolist() == before.tolist()
    assert order.counts_before(len(order)).tolist() == counts


@pytest.mark.parametrize("counts", [[100_000], [100_000, 7, 0, 31_000], [37 * n % 500 for n in range(256)]])
def test_each_sample_comes_once_and_in_order(counts: list[int]) -> None:
    corpora, numbers = Interleave(counts, (1,)).slice(0, sum(counts))
    for corpus, count in enumerate(counts):
        assert np.array_equal(numbers[corpora == corpus], np.arange(count))


def test_every_stretch_holds_the_mixture() -> None:
    counts = np.array([50_000, 30_000, 15_000, 4_000, 1_000])
    corpora, _ = Interleave(counts, (5,)).slice(0, 100_000)
    consumed = np.stack([np.cumsum(corpora == corpus) for corpus in range(5)])
    quota = np.outer(counts / counts.sum(), np.arange(1, 100_001))
    assert np.abs(consumed - quota).max() < 5  # corpora; each has one key in each of its strata


def test_which_corpus_comes_is_random() -> None:
    corpora, _ = Interleave([1000, 1000], (5,)).slice(0, 2000)
    others, _ = Interleave([1000, 1000], (6,)).slice(0, 2000)
    assert 800 < (corpora == others).sum() < 1200
    assert 400 < (np.diff(corpora) == 0).sum() < 600  # a pair is either way round: a quarter follow their like


@pytest.mark.parametrize("counts", [[10**12, 3], [10**12, 10**12 - 1, 5 * 10**11, 0, 1]])
def test_corpora_of_a_trillion_samples(counts: list[int]) -> None:
    order = Interleave(counts, (9,))
    for position in (0, 1, 10**6, sum(counts) // 3, sum(counts) - 5):
        corpora, numbers = order.slice(position, position + 5)
        for n in range(5):
            corpus, number = int(corpora[n]), int(numbers[n])
            assert order.at(position + n) == (corpus, number)
            key = exact_key(counts[corpus], (9,), corpus, number)
            for other, count in enumerate(counts):  # as many of each come before as have lower keys
                before = int(order.counts_before(position + n)[other])
                assert before == 0 or exact_key(count, (9,), other, before - 1) <= key
                assert before == count or exact_key(count, (9,), other, before) >= key
