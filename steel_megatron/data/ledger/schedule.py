"""Which sample of which corpus comes at a position: the stages of a ledger, one after the other.

How far a corpus was read is one number, its cursor: the samples consumed so far, over all its epochs. So what was seen
is always the beginning of the corpus' own order, and what is unseen the rest. A stage mixes what is unseen in a new
order, from cursors that follow from the stages before it alone.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from steel_megatron.data.ledger.pools import Pool
from steel_megatron.data.ledger.records import MOST_POSITIONS, MOST_SAMPLES, samples_in
from steel_megatron.data.sampling.interleave import Interleave
from steel_megatron.errors import DataError


class Location(NamedTuple):
    """A sample of a corpus."""

    corpus: int
    """Number of the corpus in its ledger."""
    epoch: int
    """Number of the pass over the corpus, from 0."""
    number: int
    """Number of the sample in the order of the pass."""


@dataclass(frozen=True)
class _Rounds:
    """Samples of each corpus in the first round of a stage, and in each one after it (all 0 where there is none)."""

    first: list[int]
    others: list[int]
    ends: str
    """Why a stage without other rounds ends after the first."""


class _Stage:
    """The samples from a pool's position to the next pool."""

    def __init__(self, begin: int, cursors: np.ndarray, rounds: _Rounds, seed: int) -> None:
        self.begin, self.cursors, self.ends = begin, cursors, rounds.ends
        self._counts = [np.array(rounds.first, np.int64), np.array(rounds.others, np.int64)]
        self._lengths = [sum(rounds.first), sum(rounds.others)]
        self.capacity: int | float = math.inf if self._lengths[1] else self._lengths[0]
        self._seed, self._held = seed, (-1, Interleave([0], (0,)))

    def _round_of(self, offset: int) -> tuple[int, int]:
        """The round that a sample of the stage is in, and the first sample of the round."""
        first, others = self._lengths
        if offset < first or not others:
            return 0, 0
        number = (offset - first) // others
        return number + 1, first + number * others

    def _order_of(self, number: int) -> Interleave:
        if self._held[0] != number:
            counts = self._counts[min(number, 1)]
            self._held = number, Interleave(counts, (self._seed, self.begin, number))
        return self._held[1]

    def _before(self, number: int) -> np.ndarray:
        """The samples consumed of each corpus when a round begins."""
        consumed: np.ndarray = self.cursors
        return consumed if number == 0 else consumed + self._counts[0] + (number - 1) * self._counts[1]

    def cursors_at(self, position: int) -> np.ndarray:
        """The samples of each corpus consumed before a position."""
        number, begin = self._round_of(position - self.begin)
        return self._before(number) + self._order_of(number).counts_before(position - self.begin - begin)

    def at(self, position: int) -> tuple[int, int]:
        """Corpus and sample of the corpus, counted over its epochs."""
        number, begin = self._round_of(position - self.begin)
        corpus, sample = self._order_of(number).at(position - self.begin - begin)
        return corpus, sample + int(self._before(number)[corpus])

    def slice(self, begin: int, end: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """:meth:`at` of several positions, in parts."""
        parts = []
        while begin < end:
            number, first = self._round_of(begin - self.begin)
            order = self._order_of(number)
            stop = min(end, self.begin + first + order.total)
            corpora, samples = order.slice(begin - self.begin - first, stop - self.begin - first)
            parts.append((corpora, samples + self._before(number)[corpora]))
            begin = stop
        return parts


class Schedule:
    """Samples by position.

    Args:
        names: of the corpora, for messages.
        domains: of the corpora.
        samples: of the corpora, in one epoch; at least 1.
        pools: in order of their positions, the first at 0.
        seed: of the orders.
    """

    def __init__(
        self, names: Sequence[str], domains: Sequence[str], samples: Sequence[int], pools: Sequence[Pool], seed: int
    ) -> None:
        self._names, self._domains, self._samples = names, domains, np.array(samples, np.int64)
        self._stages: list[_Stage] = []
        self._unreached: Pool | None = None
        cursors = np.zeros(len(names), np.int64)
        for pool in pools:
            if self._stages:
                if pool.at > self.capacity():
                    self._unreached = pool
                    break
                cursors = self._stages[-1].cursors_at(pool.at)
            self._stages.append(_Stage(pool.at, cursors, self._rounds(pool, cursors), seed))
        self._begins = [stage.begin for stage in self._stages]

    def capacity(self) -> int | float:
        """How many samples there are; infinity when corpora are read without end."""
        return self._stages[-1].begin + self._stages[-1].capacity if self._stages else 0

    def locate(self, position: int) -> Location:
        """The sample at a position.

        Raises:
            DataError: there are fewer samples; the message says what ran out.
        """
        corpus, sample = self._stage_of(position, position + 1).at(position)
        return Location(corpus, *divmod(sample, int(self._samples[corpus])))

    def locate_range(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """:meth:`locate` of the positions from ``begin`` to before ``end``, in three arrays.

        Returns:
            int32 [n] corpora, int64 [n] epochs, int64 [n] numbers.

        Raises:
            DataError: as :meth:`locate`.
        """
        assert 0 <= begin <= end, (begin, end)
        parts: list[tuple[np.ndarray, np.ndarray]] = [(np.empty(0, np.int32), np.empty(0, np.int64))]
        while begin < end:
            stage = self._stage_of(begin, end)
            following = bisect.bisect_right(self._begins, begin)
            stop = min(end, self._begins[following]) if following < len(self._begins) else end
            parts += stage.slice(begin, stop)
            begin = stop
        corpora, samples = (np.concatenate(column) for column in zip(*parts, strict=True))
        return corpora, *np.divmod(samples, self._samples[corpora])

    def cursors(self, position: int) -> np.ndarray:
        """The samples of each corpus consumed before a position, over all epochs: int64 [corpora].

        Raises:
            DataError: there are fewer samples.
        """
        if not self._stages:
            self.require(position)
            return np.zeros(len(self._names), np.int64)
        return self._stage_of(position, position).cursors_at(position)

    def _stage_of(self, position: int, end: int) -> _Stage:
        assert position >= 0, position
        self.require(end)
        return self._stages[bisect.bisect_right(self._begins, position) - 1]

    def require(self, end: int, wanted_by: str = "") -> None:
        """Raise a DataError when there are fewer than ``end`` samples; ``wanted_by`` says who asks for them."""
        if end > MOST_POSITIONS:
            raise DataError(f"{end:,} samples were asked for; no run reads more than {MOST_POSITIONS:,}")
        if end <= self.capacity():
            return
        reason = self._stages[-1].ends if self._stages else "no corpus is in it"
        planned = f", before what is planned for sample {self._unreached.at:,}" if self._unreached else ""
        by = f" by {wanted_by}" if wanted_by else ""
        raise DataError(
            f"the ledger has {self.capacity():,} samples{planned}, and {end:,} were asked for{by}: {reason}; append "
            "corpora or raise their epochs (steel-megatron data append, reweight), or train for fewer samples"
        )

    def _rounds(self, pool: Pool, cursors: np.ndarray) -> _Rounds:
        """How a pool is read from some cursors on."""
        size, left = self._samples.tolist(), [0] * len(self._names)
        if not pool.epochs:
            return _Rounds(left, left, "no corpus is in it")
        for corpus, epochs in pool.epochs.items():
            consumed = int(cursors[corpus])
            if epochs is None:
                left[corpus] = size[corpus] - consumed % size[corpus]
            else:
                left[corpus] = max(0, samples_in(epochs, size[corpus]) - consumed)
        endless = {corpus for corpus, epochs in pool.epochs.items() if epochs is None}
        if pool.mixture is None:
            others = [size[corpus] if corpus in endless else 0 for corpus in range(len(size))]
            return _Rounds(left, others, f"every corpus is read to the end of its epochs ({self._listed(pool.epochs)})")
        basis = [size[corpus] if corpus in endless else left[corpus] for corpus in range(len(size))]
        return self._mixed(pool, basis, endless)

    def _mixed(self, pool: Pool, basis: list[int], endless: set[int]) -> _Rounds:
        """A mixture: the longest round that no corpus with an end is too short for, or equal ones without end."""
        assert pool.mixture is not None
        weights = {domain: Fraction(repr(weight)) for domain, weight in pool.mixture.items() if weight > 0}
        everything = sum(weights.values())
        shares: dict[int, Fraction] = {}
        for domain, weight in weights.items():
            own = [corpus for corpus in pool.epochs if self._domains[corpus] == domain]
            together = sum(basis[corpus] for corpus in own)
            if not together:
                nothing = [0] * len(basis)
                return _Rounds(nothing, nothing, f"of domain {domain!r} nothing is left ({self._listed(own)})")
            shares |= {corpus: weight / everything * basis[corpus] / together for corpus in own if basis[corpus]}
        finite = {corpus: basis[corpus] / share for corpus, share in shares.items() if corpus not in endless}
        length, ends, repeated = MOST_SAMPLES, f"a mixture is read for {MOST_SAMPLES:,} samples at most", not finite
        if finite and min(finite.values()) < MOST_SAMPLES:
            shortest = min(finite, key=lambda corpus: finite[corpus])
            length = math.floor(finite[shortest])
            ends = f"the mixture used up domain {self._domains[shortest]!r} ({self._names[shortest]})"
        counts = [0] * len(basis)
        for corpus, count in _apportioned(length, shares).items():
            counts[corpus] = count
        return _Rounds(counts, counts if repeated else [0] * len(basis), ends)

    def _listed(self, corpora: Mapping[int, object] | Sequence[int]) -> str:
        names = [self._names[corpus] for corpus in corpora]
        return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _apportioned(total: int, shares: Mapping[int, Fraction]) -> dict[int, int]:
    """``total`` in whole numbers by shares that sum to 1: each quota rounded down, the largest remainders up."""
    quotas = {corpus: total * share for corpus, share in shares.items()}
    counts = {corpus: math.floor(quota) for corpus, quota in quotas.items()}
    by_remainder = sorted(quotas, key=lambda corpus: (counts[corpus] - quotas[corpus], corpus))
    for corpus in by_remainder[: total - sum(counts.values())]:
        counts[corpus] += 1
    return counts
