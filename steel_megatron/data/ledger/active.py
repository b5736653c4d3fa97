"""What a ledger's events make of its corpora: the ones that are active from each sample on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from steel_megatron.data.ledger.records import MOST_SAMPLES, Corpus, Event, Unchanged, samples_in
from steel_megatron.errors import DataError


@dataclass(frozen=True)
class ActiveCorpora:
    """What is read from a sample on."""

    at: int
    """The sample."""
    epochs: Mapping[int, float | None]
    """How often each active corpus is read in the whole run, by its number; None for unlimited."""
    mixture: Mapping[str, float] | None
    """Weights by domain; None to read all corpora by their sizes."""


def number_of(corpora: Sequence[Corpus], name: str, among: Iterable[int]) -> int:
    """The number of the corpus that has a name.

    Args:
        corpora: the ledger's corpora, by number.
        name: the name.
        among: the numbers to search.

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


def active_corpora(corpora: Sequence[Corpus], events: Sequence[Event], sequence_length: int) -> list[ActiveCorpora]:
    """What is active after the events of each sample.

    Args:
        corpora: the ledger's corpora, by number.
        events: the events, ordered by sample; none is pending.
        sequence_length: tokens that a sample predicts.

    Returns:
        the active corpora in order of their samples, the first from 0.

    Raises:
        DataError: an event concerns a corpus that is not active, a corpus is read too often, or a mixture does not fit
            the active corpora.
    """
    epochs: dict[int, float | None] = {}
    mixture: Mapping[str, float] | None = None
    by_sample, used = {0: ActiveCorpora(0, {}, None)}, used_by(events)

    def active(name: str, at: int) -> int:
        number = number_of(corpora, name, used)
        if number not in epochs:
            raise DataError(f"corpus {name!r} is not active at sample {at:,}: it is added later, or was removed before")
        return number

    for event in events:
        assert event.at is not None
        for added in event.add:
            if added.corpus in epochs:
                raise DataError(f"{corpora[added.corpus].name} is added at sample {event.at:,}, but is active already")
            epochs[added.corpus] = added.epochs
        for name in event.epochs:
            epochs[active(name, event.at)] = event.epochs[name]
        for name in event.remove:
            del epochs[active(name, event.at)]
        if event.mixture is not Unchanged.MIXTURE:
            mixture = event.mixture
        by_sample[event.at] = ActiveCorpora(event.at, dict(epochs), mixture)
    for found in by_sample.values():
        _check_epochs(corpora, found, sequence_length)
        _check_mixture(corpora, found)
    return list(by_sample.values())


def _check_epochs(corpora: Sequence[Corpus], active: ActiveCorpora, sequence_length: int) -> None:
    for number, epochs in active.epochs.items():
        samples = corpora[number].samples(sequence_length)
        if samples_in(epochs or 1, samples) > MOST_SAMPLES:
            raise DataError(
                f"corpus {corpora[number].name!r} has {samples:,} samples and is to be read {epochs} times, more than "
                f"{MOST_SAMPLES:,} samples; lower epochs, or set them to null for unlimited"
            )


def _check_mixture(corpora: Sequence[Corpus], active: ActiveCorpora) -> None:
    if active.mixture is None:
        return
    domains = {corpora[number].domain: corpora[number].name for number in active.epochs}
    for domain, weight in active.mixture.items():
        if weight > 0 and domain not in domains:
            raise DataError(
                f"the mixture at sample {active.at:,} gives domain {domain!r} the weight {weight}, but no active "
                f"corpus belongs to it; the active domains are {', '.join(domains) or 'none'}"
            )
    for domain, name in domains.items():
        if domain not in active.mixture:
            raise DataError(
                f"the mixture at sample {active.at:,} does not name domain {domain!r} (of {name}); give it a weight in "
                "the same change, 0 to pause it"
            )
