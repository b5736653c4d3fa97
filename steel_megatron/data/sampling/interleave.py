"""The order in which samples of several corpora are mixed, without an array of its length.

Sample ``j`` of a corpus of ``n`` samples gets a random key in ``[j / n, (j + 1) / n)``; the order is that of the keys.
So each corpus keeps its own order, every stretch has the mixture to within about one sample per corpus, and which
corpus comes when is random. A key is a float64 number from one exact addition and one division, which IEEE 754 rounds
the same way everywhere.

To find the sample at a position, the range of keys is cut into equal buckets. How many keys of each corpus lie before a
bucket is known without computing them, as there is one key per 1 / n. Only the bucket's own keys are computed and
sorted, and kept, since positions are mostly read one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from steel_megatron.data.native import helpers
from steel_megatron.data.sampling.permutation import GOLDEN, finalise_many, hash64

MOST = 2**52 - 1
"""The most samples that an order may have: a key has 53 bits, of which one at least is random."""
_BUCKET, _BUCKET_OF_CORPUS = 4096, 16
"""Samples of a bucket, and the least for each corpus, so that the work per bucket and corpus stays small."""


class Interleave:
    """A random order that mixes the samples of several corpora evenly.

    Args:
        counts: samples of each corpus; 0 is allowed.
        key: 64-bit numbers that decide the order.
    """

    def __init__(self, counts: Sequence[int] | np.ndarray, key: tuple[int, ...]) -> None:
        self.counts = np.asarray(counts, dtype=np.int64)
        self.total = sum(self.counts.tolist())
        """Positions of the order."""
        assert len(self.counts) and min(self.counts.tolist()) >= 0 and self.total <= MOST, counts
        self._streams = np.array([hash64((*key, corpus)) for corpus in range(len(self.counts))], dtype=np.uint64)
        wanted = max(_BUCKET, _BUCKET_OF_CORPUS * len(self.counts))
        self._buckets = 1 << max(0, (self.total // wanted).bit_length())  # a power of two: bounds are exact
        # The current bucket: its number, its first position and the one after its last, the samples of each corpus
        # before it, and its own samples in order.
        self._bucket, self._at, self._first = -1, (0, 0), self.counts
        self._held = (np.empty(0, np.int32), np.empty(0, np.int64))

    def __len__(self) -> int:
        return self.total

    def at(self, position: int) -> tuple[int, int]:
        """The corpus of the sample at a position, and the number of the sample in its corpus."""
        begin, _ = self._bounds(position)
        return int(self._held[0][position - begin]), int(self._held[1][position - begin])

    def slice(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """:meth:`at` of the positions from ``begin`` to before ``end``: int32 [n] corpora, int64 [n] numbers."""
        assert 0 <= begin <= end <= self.total, (begin, end, self.total)
        corpora, numbers = np.empty(end - begin, np.int32), np.empty(end - begin, np.int64)
        position = begin
        while position < end:
            first, last = self._bounds(position)
            stop = min(last, end)
            corpora[position - begin : stop - begin] = self._held[0][position - first : stop - first]
            numbers[position - begin : stop - begin] = self._held[1][position - first : stop - first]
            position = stop
        return corpora, numbers

    def counts_before(self, position: int) -> np.ndarray:
        """The samples of each corpus before a position: int64 [K]."""
        if position == self.total:
            return self.counts.copy()
        begin, _ = self._bounds(position)
        return self._first + np.bincount(self._held[0][: position - begin], minlength=len(self.counts))

    def _bounds(self, position: int) -> tuple[int, int]:
        """The range of positions of the bucket that contains a position; it becomes the current bucket."""
        assert 0 <= position < self.total, (position, self.total)
        if self._at[0] <= position < self._at[1]:
            return self._at
        guess = position * self._buckets // self.total
        if position == self._at[1] and self._bucket + 1 < self._buckets:
            guess = self._bucket + 1
        # A bound is off by less than one key per corpus, so the guess by a few buckets at most.
        last = self._below(guess + 1)
        first = self._below(guess)
        while first[1] > position:
            guess, first, last = guess - 1, self._below(guess - 1), first
        while last[1] <= position:
            guess, first, last = guess + 1, last, self._below(guess + 2)
        bounds = guess / self._buckets, (guess + 1) / self._buckets
        self._held = merge_keys(self.counts, self._streams, first[0], last[0], *bounds)
        self._bucket, self._first, self._at = guess, first[0], (first[1], last[1])
        return self._at

    def _below(self, bucket: int) -> tuple[np.ndarray, int]:
        """The samples of each corpus before a bucket, and their sum."""
        counts = counts_below(self.counts, self._streams, bucket / self._buckets)
        return counts, int(counts.sum())


def counts_below(counts: np.ndarray, streams: np.ndarray, bound: float) -> np.ndarray:
    """How many keys of each corpus are below a bound: int64 [K].

    Args:
        counts: int64 [K], samples of each corpus.
        streams: uint64 [K], from which each corpus draws its keys.
        bound: from 0 to 1, a multiple of a power of two.
    """
    if helpers is not None:
        return np.asarray(helpers.counts_below(counts, streams, bound))
    return counts_below_by_numpy(counts, streams, bound)


def counts_below_by_numpy(counts: np.ndarray, streams: np.ndarray, bound: float) -> np.ndarray:
    """The reference of :func:`counts_below`.

    Of ``n`` keys, the first ``floor(n * bound)`` are below, and perhaps one more; rounding may take the product up to
    the next whole number. So the keys on both sides of it decide.

    Args:
        counts: int64 [K], samples of each corpus.
        streams: uint64 [K], from which each corpus draws its keys.
        bound: from 0 to 1, a multiple of a power of two.

    Returns:
        int64 [K].
    """
    guess = (counts * bound).astype(np.int64)
    corpora = np.arange(len(counts))
    lower = np.where(guess > 0, guess - 1, 0)
    upper = np.minimum(guess, np.maximum(counts - 1, 0))
    too_many = (guess > 0) & ~(_keys(counts, streams, corpora, lower) < bound)
    one_more = (guess < counts) & (_keys(counts, streams, corpora, upper) < bound) & ~too_many
    return guess - too_many + one_more


def merge_keys(
    counts: np.ndarray, streams: np.ndarray, first: np.ndarray, last: np.ndarray, low: float, high: float
) -> tuple[np.ndarray, np.ndarray]:
    """Samples ``first`` to before ``last`` of each corpus in the order of their keys.

    Args:
        counts: int64 [K], samples of each corpus.
        streams: uint64 [K], from which each corpus draws its keys.
        first: int64 [K].
        last: int64 [K].
        low: no key is below.
        high: every key is below.

    Returns:
        corpora int32 [m] and numbers int64 [m].
    """
    if helpers is not None:
        corpora, numbers = helpers.merge_keys(counts, streams, first, last, low, high)
        return corpora, numbers
    return merge_keys_by_numpy(counts, streams, first, last)


def merge_keys_by_numpy(
    counts: np.ndarray, streams: np.ndarray, first: np.ndarray, last: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The reference of :func:`merge_keys`; equal keys stay in order of corpus and number.

    Args:
        counts: int64 [K], samples of each corpus.
        streams: uint64 [K], from which each corpus draws its keys.
        first: int64 [K], the first sample of each corpus.
        last: int64 [K], the sample after the last of each corpus.

    Returns:
        corpora int32 [m] and numbers int64 [m].
    """
    sizes = last - first
    corpora = np.repeat(np.arange(len(counts), dtype=np.int32), sizes)
    numbers = np.arange(len(corpora)) + np.repeat(first - (np.cumsum(sizes) - sizes), sizes)
    order = np.argsort(_keys(counts, streams, corpora, numbers), kind="stable")
    return corpora[order], numbers[order]


def _keys(counts: np.ndarray, streams: np.ndarray, corpora: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """The keys of samples ``numbers`` of ``corpora``: float64 [m], below 1.

    The random part has as many bits as a float64 has left next to the number, so that the sum is exact.
    """
    own = np.maximum(counts, 1)
    bits = 53 - np.frexp(own.astype(np.float64))[1].astype(np.uint64)  # frexp's exponent is the number's bits
    draws = finalise_many(streams[corpora] + (numbers.astype(np.uint64) + np.uint64(1)) * np.uint64(GOLDEN))
    fraction = np.ldexp((draws >> (np.uint64(64) - bits)[corpora]).astype(np.float64), -bits[corpora].astype(np.int32))
    keys: np.ndarray = (numbers + fraction) / own[corpora]
    return keys
