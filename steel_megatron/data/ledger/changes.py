"""How a ledger's history changes, by commands and by the syncs of a run: functions from one history to the next."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

from steel_megatron.data.ledger.active import active_corpora
from steel_megatron.data.ledger.history import History
from steel_megatron.data.ledger.records import (
    EPOCHS,
    MIXTURE,
    MOST_SAMPLES,
    AddedCorpus,
    Corpus,
    Event,
    SkippedSamples,
    StepSize,
    Unchanged,
)
from steel_megatron.errors import DataError
from steel_megatron.log import get_logger

logger = get_logger(__name__)

OnDuplicate = Literal["stop", "skip"]
"""What to do with a corpus that is, or ever was, in the ledger."""


def add(
    history: History,
    corpora: Sequence[Corpus],
    epochs: float | None = 1.0,
    at: int | None = None,
    on_duplicate: OnDuplicate = "stop",
    mixture: Mapping[str, float] | None = None,
) -> History:
    """Add corpora.

    Args:
        history: the history to change.
        corpora: the new corpora.
        epochs: how often each is read in the whole run, such as 2.5; None for unlimited.
        at: the sample from which they are active; None for the run's next sync.
        on_duplicate: what to do with a corpus that is, or ever was, in the ledger: ``stop`` or ``skip`` it.
        mixture: weights by domain from then on; None to leave the mixture as it is.

    Returns:
        the changed history; the same one if all corpora were skipped and no mixture is given.

    Raises:
        DataError: a corpus is a duplicate or does not fit; ``at`` is in the past; the mixture is wrong.
    """
    EPOCHS.check(epochs, "epochs")
    new = new_corpora(history, corpora, on_duplicate)
    if not new and mixture is None:
        return history
    corpora = (*history.corpora, *new)
    added = tuple(AddedCorpus(number, epochs) for number in range(len(history.corpora), len(corpora)))
    event = Event(at, add=added, mixture=Unchanged.MIXTURE if mixture is None else mixture)
    return _with(history, event, corpora)


def new_corpora(history: History, corpora: Sequence[Corpus], on_duplicate: OnDuplicate) -> list[Corpus]:
    """The corpora whose content is not, and never was, in the ledger.

    Args:
        history: the history.
        corpora: the corpora to look up; they are compared with each other as well.
        on_duplicate: what to do with a known corpus: ``stop``, or ``skip`` it with a warning.

    Raises:
        DataError: a corpus is known, and ``on_duplicate`` is ``stop``.
    """
    new: list[Corpus] = []
    for corpus in corpora:
        known = next((entry for entry in (*history.known(), *new) if entry.content == corpus.content), None)
        if known is None:
            new.append(corpus)
            continue
        duplicate = f"{corpus.prefix} is in the ledger already, as {known.name} ({known.prefix}): the same bytes"
        if on_duplicate == "stop":
            raise DataError(f"{duplicate}; leave it out, or let data append skip it (--on_duplicate skip)")
        logger.warning(f"{duplicate}; skipped")
    return new


def remove(history: History, names: Sequence[str], at: int | None = None) -> History:
    """Remove corpora for good.

    Args:
        history: the history to change.
        names: the corpora, by their names in the ledger.
        at: the sample from which they are not read any further; None for the run's next sync.

    Raises:
        DataError: one is not active; the mixture names a domain that would have no corpus; ``at`` is in the past.
    """
    return _with(history, Event(at, remove=tuple(names)))


def reweight(history: History, epochs: Mapping[str, float | None], at: int | None = None) -> History:
    """Change how often corpora are read in the whole run; epochs already read count.

    Args:
        history: the history to change.
        epochs: the new number of epochs by name of the corpus; None for unlimited.
        at: the sample from which it applies; None for the run's next sync.

    Raises:
        DataError: a corpus is not active, a number is wrong, or ``at`` is in the past.
    """
    for name, value in epochs.items():
        EPOCHS.check(value, f"epochs of {name}")
    return _with(history, Event(at, epochs=dict(epochs)))


def set_mixture(history: History, mixture: Mapping[str, float] | None, at: int | None = None) -> History:
    """Read domains by weights, or end the mixture.

    Args:
        history: the history to change.
        mixture: weights by domain, 0 to pause one; None to read all corpora by their sizes.
        at: the sample from which it applies; None for the run's next sync.

    Raises:
        DataError: a domain has no corpus, one is not named, a weight is wrong, or ``at`` is in the past.
    """
    return _with(history, Event(at, mixture=mixture))


def skip(history: History, first: int, end: int) -> History:
    """Do not read some samples: they keep their places, and none of their labels counts.

    Args:
        history: the history to change.
        first: the first of them.
        end: the one after the last.

    Raises:
        DataError: there are none, or one is in the past.
    """
    return _with_skipped(history, first, end, skips=True)


def read_again(history: History, first: int, end: int) -> History:
    """Withdraw :func:`skip` for some samples.

    Args:
        history: the history to change.
        first: the first of them.
        end: the one after the last.

    Raises:
        DataError: none of them is skipped, or one is in the past.
    """
    if not history.skipped_in(first, end):
        raise DataError(f"none of the samples {first:,} to {end - 1:,} is skipped")
    return _with_skipped(history, first, end, skips=False)


def cancel(history: History, at: int | None = None) -> History:
    """Withdraw the changes planned for a sample, or with None the pending ones.

    Raises:
        DataError: there are none, the run may have passed them, or they hold the remaining copies of dropped documents.
    """
    if at is not None and at < history.next_sync_sample:
        raise DataError(f"the changes at sample {at:,} stay: {_why_not_before(history)}")
    kept = tuple(event for event in history.events if event.at != at)
    if len(kept) == len(history.events):
        raise DataError("nothing is pending" if at is None else f"nothing is planned for sample {at:,}")
    if not kept:
        raise DataError("nothing would be left in the ledger; make another one (steel-megatron data create)")
    return _kept_readable(history, dataclasses.replace(history, events=kept))


def released(history: History) -> History:
    """The history when no run is live that would read past its last sync.

    A pending change may fit only at the sample planned for the next sync. Then nothing is released until it is
    cancelled.
    """
    try:
        return dataclasses.replace(history, next_sync_sample=history.last_synced_sample)
    except DataError:
        return history


def synced(history: History, consumed: int, next_sync: int | None = None) -> History:
    """The history after a sync that leaves pending changes pending.

    Args:
        history: the history.
        consumed: the sample at which the run syncs.
        next_sync: where it syncs next; None for a run that ends.

    Raises:
        DataError: pending changes do not fit at ``next_sync``.
    """
    next_sync = consumed if next_sync is None else next_sync
    return dataclasses.replace(history, last_synced_sample=consumed, next_sync_sample=next_sync)


def apply_pending(history: History, consumed: int, next_sync: int | None = None) -> History:
    """The history after a sync that gives pending changes its sample.

    Args:
        history: the history.
        consumed, next_sync: as for :func:`synced`.

    Raises:
        DataError: they do not fit there, or the ledger has fewer samples.
    """
    events = tuple(dataclasses.replace(event, at=event.start(consumed)) for event in history.events)
    applied = synced(dataclasses.replace(history, events=events), consumed, next_sync)
    applied.schedule.require(consumed)
    return applied


def at_step(history: History, step: int, consumed: int, global_batch_size: int) -> History:
    """Record the step size with which a run continues; records of later steps are dropped, as those are repeated.

    Args:
        history: the history.
        step: optimizer steps done.
        consumed: samples consumed by them.
        global_batch_size: samples of each step from now on.
    """
    steps = tuple(size for size in history.steps if size.step < step and size.consumed < consumed)
    latest = dataclasses.replace(history, steps=steps).step_samples(step + 1)
    if latest != range(consumed, consumed + global_batch_size):
        steps += (StepSize(step, consumed, global_batch_size),)
    return dataclasses.replace(history, steps=steps)


def joined(parts: Sequence[range]) -> tuple[SkippedSamples, ...]:
    """Parts of samples, which ascend and do not overlap, with those that touch made one."""
    found: list[SkippedSamples] = []
    for part in parts:
        if found and found[-1].end == part.start:
            found[-1] = SkippedSamples(found[-1].first, part.stop)
        else:
            found.append(SkippedSamples(part.start, part.stop))
    return tuple(found)


def _with(history: History, event: Event, corpora: tuple[Corpus, ...] | None = None) -> History:
    """A history with one more event."""
    if event.mixture is not Unchanged.MIXTURE:
        MIXTURE.check(event.mixture, "the mixture")
    if not history.events and event.at is None:
        event = dataclasses.replace(event, at=0)  # the first event is what a run begins with
    if event.at is not None and event.at < history.next_sync_sample:
        raise DataError(
            f"sample {event.at:,} is too early for a change: {_why_not_before(history)}; or leave out --at: then it "
            "applies from the run's next checkpoint, or from where it resumes"
        )
    if event.at is not None and event.at > MOST_SAMPLES:
        raise DataError(f"sample {event.at:,} is too late for a change: the latest is {MOST_SAMPLES:,}")
    new = dataclasses.replace(history, events=(*history.events, event), corpora=corpora or history.corpora)
    return _kept_readable(history, new)


def _with_skipped(history: History, first: int, end: int, *, skips: bool) -> History:
    """A history that skips, or reads, the samples ``first`` to before ``end``."""
    if not 0 <= first < end <= MOST_SAMPLES:
        raise DataError(f"samples {first}:{end} are none; they must be A:B with 0 <= A < B <= {MOST_SAMPLES}")
    if first < history.next_sync_sample:
        raise DataError(f"sample {first:,} is too early for a change: {_why_not_before(history)}")
    before, after = history.skipped_in(0, first), history.skipped_in(end, MOST_SAMPLES)
    return dataclasses.replace(history, skipped=joined([*before, *([range(first, end)] if skips else []), *after]))


def _why_not_before(history: History) -> str:
    """Why nothing can change before ``next_sync_sample``, and what can be done."""
    if history.next_sync_sample == history.last_synced_sample:
        return f"the run's last sync was at sample {history.last_synced_sample:,}; choose that sample or a later one"
    return (
        f"a live run reads to sample {history.next_sync_sample:,} before its next sync; choose that sample or a later "
        "one, or stop the run"
    )


def _kept_readable(history: History, new: History) -> History:
    """A changed history, unless it loses documents that were dropped because another corpus has them."""
    for dropped_of, kept_in in sorted(lost(new) - lost(history)):
        raise DataError(
            f"documents of {dropped_of} were dropped because {kept_in} has them, but {kept_in} would not be read "
            f"completely even once, so they would be lost; keep it for one epoch, remove {dropped_of} as well, or "
            "append without dropping duplicates"
        )
    return new


def lost(history: History) -> set[tuple[str, str]]:
    """Names of a corpus whose documents were dropped, and of the one that has them but is never read to its end."""
    if not any(corpus.dropped and corpus.dropped.like for corpus in history.known()):
        return set()
    scheduled = history.scheduled(history.next_sync_sample)
    whole = dataclasses.replace(history, events=tuple(scheduled)).schedule
    last = active_corpora(history.corpora, scheduled, history.sequence_length)[-1].epochs
    read = {number for number, epochs in last.items() if epochs is None or epochs >= 1}
    consumed = history.schedule.consumed(history.last_synced_sample)
    read |= {number for number in history.used if consumed[number] >= history.samples(number)}
    for event in scheduled:
        for number in map(history.number_of, event.remove):
            assert event.at is not None
            if whole.consumed(int(min(event.at, whole.capacity())))[number] >= history.samples(number):
                read.add(number)
    names = {corpus.content: corpus.name for corpus in history.corpora}
    kept = {history.corpora[number].content for number in read}
    return {
        (history.corpora[number].name, names.get(content, f"a corpus that was cancelled ({content[:8]})"))
        for number in last
        if (dropped := history.corpora[number].dropped)
        for content in dropped.like
        if content not in kept
    }
