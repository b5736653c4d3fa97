"""What a ledger's events make of its corpora: the pool that is read from each position on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from steel_megatron.data.ledger.records import MOST_SAMPLES, Corpus, Event, Unchanged, samples_in
from steel_megatron.errors import DataError


@dataclass(frozen=True)
class Pool:
    """What is read from a position on."""

    at: int
    """The position."""
    epochs: Mapping[int, float | None]
    """How often each corpus is read in the whole run, None for without end; a corpus that is not here is not read."""
    mixture: Mapping[str, float] | None
    """Weights by domain; None to read all corpora by their sizes."""


def number_of(corpora: Sequence[Corpus], name: str, among: Iterable[int]) -> int:
    """The number of the corpus that has a name.

    Args:
        corpora: the ledger's corpora, by number.
        name: the name.
        among: the numbers to look at.

    Raises:
        DataError: none of these corpora has it.
    """
    known = sorted(among)
    for number in known:
        if corpora[number].name == name:
            return number
    names = ", ".join(corpora[number].name for number in known)
    raise DataError(f"the ledger has no corpus {name!r}; it has {names or 'none'}")


def used_by(events: Iterable[Event]) -> set[int]:
    """The numbers of the corpora that some events add."""
    return {added.corpus for event in events for added in event.add}


def pools_of(corpora: Sequence[Corpus], events: Sequence[Event], sequence_length: int) -> list[Pool]:
    """The pool after the events of each position.

    Args:
        corpora: the ledger's corpora, by number.
        events: the events, ordered by position; none is pending.
        sequence_length: tokens that a sample predicts.

    Returns:
        the pools in order of position, the first at 0.

    Raises:
        DataError: an event concerns a corpus that is not in the pool, a corpus is read too often, or a mixture does not
            fit the pool.
    """
    epochs: dict[int, float | None] = {}
    mixture: Mapping[str, float] | None = None
    pools, used = {0: Pool(0, {}, None)}, used_by(events)

    def in_pool(name: str, at: int) -> int:
        number = number_of(corpora, name, used)
        if number not in epochs:
            raise DataError(f"corpus {name!r} is not in the pool at sample {at:,}; it was removed, or comes in later")
        return number

    for event in events:
        assert event.at is not None
        for added in event.add:
            if added.corpus in epochs:
                raise DataError(f"{corpora[added.corpus].name} is added at sample {event.at:,}, but is in already")
            epochs[added.corpus] = added.epochs
        for name in event.epochs:
            epochs[in_pool(name, event.at)] = event.epochs[name]
        for name in event.remove:
            del epochs[in_pool(name, event.at)]
        if event.mixture is not Unchanged.MIXTURE:
            mixture = event.mixture
        pools[event.at] = Pool(event.at, dict(epochs), mixture)
    for pool in pools.values():
        _check_epochs(corpora, pool, sequence_length)
        _check_mixture(corpora, pool)
    return list(pools.values())


def _check_epochs(corpora: Sequence[Corpus], pool: Pool, sequence_length: int) -> None:
    for number, epochs in pool.epochs.items():
        samples = corpora[number].samples(sequence_length)
        if samples_in(epochs or 1, samples) > MOST_SAMPLES:
            raise DataError(
                f"corpus {corpora[number].name!r} has {samples:,} samples and is to be read {epochs} times, more than "
                f"{MOST_SAMPLES:,} samples; lower epochs, or read it without end (null)"
            )


def _check_mixture(corpora: Sequence[Corpus], pool: Pool) -> None:
    if pool.mixture is None:
        return
    domains = {corpora[number].domain: corpora[number].name for number in pool.epochs}
    for domain, weight in pool.mixture.items():
        if weight > 0 and domain not in domains:
            raise DataError(
                f"the mixture at sample {pool.at:,} gives domain {domain!r} the weight {weight}, but no corpus of the "
                f"pool is of it; they are of {', '.join(domains) or 'none'}"
            )
    for domain, name in domains.items():
        if domain not in pool.mixture:
            raise DataError(
                f"the mixture at sample {pool.at:,} does not name domain {domain!r} (of {name}); give it a weight in "
                "the same change, 0 to pause it"
            )
