"""Which sample of which corpus comes at a position: the phases of a ledger, one after the other.

How far a corpus was read is one number: the samples consumed of it, over all epochs. So the samples seen are always the
beginning of the corpus' own order, and the unseen ones are the rest. A phase mixes the unseen samples in a new order;
the samples consumed before it follow from the phases before it alone.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from steel_megatron.data.ledger.active import ActiveCorpora
from steel_megatron.data.ledger.records import MOST_POSITIONS, MOST_SAMPLES, samples_in
from steel_megatron.data.sampling.interleave import Interleave
from steel_megatron.errors import DataError


class Location(NamedTuple):
    """A sample of a corpus."""

    corpus: int
    """Number of the corpus in its ledger."""
    epoch: int
    """Number of the epoch, from 0."""
    number: int
    """Number of the sample in the order of the epoch."""


@dataclass(frozen=True)
class _Rounds:
    """Samples of each corpus in the first round of a phase, and in each later one (all 0 if there is none)."""

    first: list[int]
    others: list[int]
    ends: str
    """Why a phase without later rounds ends after the first."""


class _Phase:
    """The samples from one change of the active corpora to the next."""

    def __init__(self, begin: int, consumed: np.ndarray, rounds: _Rounds, seed: int) -> None:
        self.begin, self._consumed, self.ends = begin, consumed, rounds.ends
        self._counts = [np.array(rounds.first, np.int64), np.array(rounds.others, np.int64)]
        self._lengths = [sum(rounds.first), sum(rounds.others)]
        self.capacity: int | float = math.inf if self._lengths[1] else self._lengths[0]
        self._seed, self._held = seed, (-1, Interleave([0], (0,)))

    def _round_of(self, offset: int) -> tuple[int, int]:
        """The round that a sample of the phase is in, and the first sample of the round."""
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
        consumed: np.ndarray = self._consumed
        return consumed if number == 0 else consumed + self._counts[0] + (number - 1) * self._counts[1]

    def consumed_before(self, position: int) -> np.ndarray:
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
        changes: what is active from each change on, by sample; the first at 0.
        seed: of the orders.
    """

    def __init__(
        self,
        names: Sequence[str],
        domains: Sequence[str],
        samples: Sequence[int],
        changes: Sequence[ActiveCorpora],
        seed: int,
    ) -> None:
        self._names, self._domains, self._samples = names, domains, np.array(samples, np.int64)
        self._phases: list[_Phase] = []
        self._unreached: ActiveCorpora | None = None
        consumed = np.zeros(len(names), np.int64)
        for active in changes:
            if self._phases:
                if active.at > self.capacity():
                    self._unreached = active
                    break
                consumed = self._phases[-1].consumed_before(active.at)
            self._phases.append(_Phase(active.at, consumed, self._rounds(active, consumed), seed))
        self._begins = [phase.begin for phase in self._phases]

    def capacity(self) -> int | float:
        """How many samples there are; infinity if corpora are read for unlimited epochs."""
        return self._phases[-1].begin + self._phases[-1].capacity if self._phases else 0

    def locate(self, position: int) -> Location:
        """The sample at a position.

        Raises:
            DataError: there are fewer samples; the message says what ran out.
        """
        corpus, sample = self._phase_of(position, position + 1).at(position)
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
            phase = self._phase_of(begin, end)
            following = bisect.bisect_right(self._begins, begin)
            stop = min(end, self._begins[following]) if following < len(self._begins) else end
            parts += phase.slice(begin, stop)
            begin = stop
        corpora, samples = (np.concatenate(column) for column in zip(*parts, strict=True))
        return corpora, *np.divmod(samples, self._samples[corpora])

    def consumed(self, position: int) -> np.ndarray:
        """The samples of each corpus consumed before a position, over all epochs: int64 [corpora].

        Raises:
            DataError: there are fewer samples.
        """
        if not self._phases:
            self.require(position)
            return np.zeros(len(self._names), np.int64)
        return self._phase_of(position, position).consumed_before(position)

    def _phase_of(self, position: int, end: int) -> _Phase:
        assert position >= 0, position
        self.require(end)
        return self._phases[bisect.bisect_right(self._begins, position) - 1]

    def require(self, end: int, needed_by: str = "") -> None:
        """Raise a DataError if there are fewer than ``end`` samples; ``needed_by`` says what needs them."""
        if end > MOST_POSITIONS:
            raise DataError(f"{end:,} samples are needed; no run reads more than {MOST_POSITIONS:,}")
        if end <= self.capacity():
            return
        reason = self._phases[-1].ends if self._phases else "no corpus is active"
        planned = f" before the change planned for sample {self._unreached.at:,}" if self._unreached else ""
        by = f" by {needed_by}" if needed_by else ""
        raise DataError(
            f"the ledger has {self.capacity():,} samples{planned}, and {end:,} are needed{by}: {reason}; append "
            "corpora or raise their epochs (steel-megatron data append, reweight), or train for fewer samples"
        )

    def _rounds(self, active: ActiveCorpora, consumed: np.ndarray) -> _Rounds:
        """How the active corpora are read after some samples of each were consumed."""
        size, left = self._samples.tolist(), [0] * len(self._names)
        if not active.epochs:
            return _Rounds(left, left, "no corpus is active")
        for corpus, epochs in active.epochs.items():
            seen = int(consumed[corpus])
            if epochs is None:
                left[corpus] = size[corpus] - seen % size[corpus]
            else:
                left[corpus] = max(0, samples_in(epochs, size[corpus]) - seen)
        unlimited = {corpus for corpus, epochs in active.epochs.items() if epochs is None}
        whole = [size[corpus] if corpus in unlimited else 0 for corpus in range(len(size))]
        if active.mixture is None:
            return _Rounds(
                left, whole, f"every corpus is read to the end of its epochs ({self._listed(active.epochs)})"
            )
        return self._mixed(active, [whole[corpus] or left[corpus] for corpus in range(len(size))], unlimited)

    def _mixed(self, active: ActiveCorpora, sizes: list[int], unlimited: set[int]) -> _Rounds:
        """A mixture: the longest round that no limited corpus is too short for, or equal ones forever."""
        assert active.mixture is not None
        weights = {domain: Fraction(repr(weight)) for domain, weight in active.mixture.items() if weight > 0}
        weight_of_all = sum(weights.values())
        nothing = [0] * len(sizes)
        shares: dict[int, Fraction] = {}
        for domain, weight in weights.items():
            own = [corpus for corpus in active.epochs if self._domains[corpus] == domain]
            size = sum(sizes[corpus] for corpus in own)
            if not size:
                return _Rounds(nothing, nothing, f"of domain {domain!r} nothing is left ({self._listed(own)})")
            shares |= {corpus: weight / weight_of_all * sizes[corpus] / size for corpus in own if sizes[corpus]}
        limits = {corpus: sizes[corpus] / share for corpus, share in shares.items() if corpus not in unlimited}
        length, ends = MOST_SAMPLES, f"a mixture is read for {MOST_SAMPLES:,} samples at most"
        if limits and min(limits.values()) < MOST_SAMPLES:
            shortest = min(limits, key=lambda corpus: limits[corpus])
            length = math.floor(limits[shortest])
            ends = f"the mixture used up domain {self._domains[shortest]!r} ({self._names[shortest]})"
        counts = list(nothing)
        for corpus, count in _apportioned(length, shares).items():
            counts[corpus] = count
        return _Rounds(counts, nothing if limits else counts, ends)

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
