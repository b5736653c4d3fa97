"""How a ledger's history changes, by commands and by the syncs of a run: functions from one history to the next."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

from steel_megatron.data.ledger.history import History
from steel_megatron.data.ledger.pools import pools_of, used_by
from steel_megatron.data.ledger.records import (
    EPOCHS,
    MIXTURE,
    MOST_SAMPLES,
    AddedCorpus,
    Corpus,
    Event,
    StepSize,
    Unchanged,
)
from steel_megatron.errors import DataError
from steel_megatron.log import get_logger

logger = get_logger(__name__)

OnDuplicate = Literal["stop", "skip"]
"""What to do with a corpus that is in already, or was."""


def add(
    history: History,
    corpora: Sequence[Corpus],
    epochs: float | None = 1.0,
    at: int | None = None,
    on_duplicate: OnDuplicate = "stop",
    mixture: Mapping[str, float] | None = None,
) -> History:
    """Put corpora into the pool.

    Args:
        history: the history to change.
        corpora: the new corpora.
        epochs: how often each is read in the whole run, such as 2.5; None for no limit.
        at: the sample from which they are in; None for the run's next sync.
        on_duplicate: what to do with a corpus that is in already, or was: ``stop`` or ``skip`` it.
        mixture: weights by domain from then on; None to leave the mixture as it is.

    Returns:
        the changed history; the same one if all corpora were skipped and no mixture is given.

    Raises:
        DataError: a corpus is in already, or does not fit; ``at`` is in the past; the mixture is wrong.
    """
    EPOCHS.check(epochs, "epochs")
    new = fresh(history, corpora, on_duplicate)
    if not new and mixture is None:
        return history
    all_corpora, numbers = numbered(history, new)
    added = tuple(AddedCorpus(number, epochs) for number in numbers)
    event = Event(at, add=added, mixture=Unchanged.MIXTURE if mixture is None else mixture)
    return _with(history, event, all_corpora)


def fresh(history: History, corpora: Sequence[Corpus], on_duplicate: OnDuplicate) -> list[Corpus]:
    """The corpora that are not in the ledger and never were: their content or dtype differs from all that is known.

    Args:
        history: the history.
        corpora: the corpora to look for in it; they are compared with each other as well.
        on_duplicate: what to do with a corpus that is known: ``stop``, or ``skip`` it with a warning.

    Raises:
        DataError: a corpus is known, and ``on_duplicate`` says ``stop``.
    """
    new: list[Corpus] = []
    for corpus in corpora:
        alike = (entry for entry in (*history.known(), *new) if entry.content == corpus.content)
        if (found := next(alike, None)) is None:
            new.append(corpus)
            continue
        same_as = f"{corpus.prefix} is in the ledger already, as {found.name} ({found.prefix}): the same bytes"
        if on_duplicate == "stop":
            raise DataError(f"{same_as}; leave it out, or let data append skip it (--on_duplicate skip)")
        logger.warning(f"{same_as}; skipped")
    return new


def numbered(history: History, new: Sequence[Corpus]) -> tuple[tuple[Corpus, ...], list[int]]:
    """All corpora with some more of them, and the numbers of these: free ones first."""
    corpora = list(history.corpora)
    free = [number for number in range(len(corpora) + len(new)) if number not in history.used][: len(new)]
    for number, corpus in zip(free, new, strict=True):
        corpora[number : number + 1] = [corpus]
    return tuple(corpora), free


def remove(history: History, names: Sequence[str], at: int | None = None) -> History:
    """Take corpora out of the pool, for good.

    Args:
        history: the history to change.
        names: the corpora, by their names in the ledger.
        at: the sample from which they are out; None for the run's next sync.

    Raises:
        DataError: one is not in; the mixture names a domain of which none would be left; ``at`` is in the past.
    """
    return _with(history, Event(at, remove=tuple(names)))


def reweight(history: History, epochs: Mapping[str, float | None], at: int | None = None) -> History:
    """Change how often corpora are read in the whole run; epochs already read count.

    Args:
        history: the history to change.
        epochs: the new number of epochs by name of the corpus; None for no limit.
        at: the sample from which it holds; None for the run's next sync.

    Raises:
        DataError: a corpus is not in, a number is wrong, or ``at`` is in the past.
    """
    for name, value in epochs.items():
        EPOCHS.check(value, f"epochs of {name}")
    return _with(history, Event(at, epochs=dict(epochs)))


def set_mixture(history: History, mixture: Mapping[str, float] | None, at: int | None = None) -> History:
    """Read domains by weights, or end the mixture.

    Args:
        history: the history to change.
        mixture: weights by domain, 0 to pause one; None to read all corpora by their sizes.
        at: the sample from which it holds; None for the run's next sync.

    Raises:
        DataError: a domain has no corpus, one is not named, a weight is wrong, or ``at`` is in the past.
    """
    return _with(history, Event(at, mixture=mixture))


def cancel(history: History, at: int | None = None) -> History:
    """Take back what is planned for a sample, or with None what is pending, with the corpora that came in by it.

    Raises:
        DataError: nothing is, the run may have passed it, or documents were dropped for the sake of what would go.
    """
    if at is not None and at < history.next_sync_sample:
        raise DataError(f"what is planned for sample {at:,} stays: {_why_not_before(history)}")
    kept = tuple(event for event in history.events if event.at != at)
    if len(kept) == len(history.events):
        raise DataError("nothing is pending" if at is None else f"nothing is planned for sample {at:,}")
    if not kept:
        raise DataError("nothing would be left in the ledger; make another one (steel-megatron data create)")
    cancelled = history.corpora[: max(used_by(kept), default=-1) + 1]
    return _changed(history, dataclasses.replace(history, events=kept, corpora=cancelled))


def freed(history: History) -> History:
    """What the ledger says when no run is under way that would read on from its last sync.

    Something pending may fit only where the run would have synced next. Then nothing is freed until it is cancelled.
    """
    try:
        return dataclasses.replace(history, next_sync_sample=history.last_synced_sample)
    except DataError:
        return history


def apply_pending(history: History, consumed: int, next_sync: int | None = None) -> History:
    """Give pending changes the position at which a run syncs with the ledger.

    Args:
        consumed: the position.
        next_sync: where the run syncs next; None for a run that ends.

    Raises:
        DataError: they do not fit there, or there were fewer samples before.
    """
    scheduled = (event if event.at is not None else dataclasses.replace(event, at=consumed) for event in history.events)
    active = synced(dataclasses.replace(history, events=tuple(scheduled)), consumed, next_sync)
    active.schedule.cursors(consumed)  # that many there must have been
    return active


def synced(history: History, consumed: int, next_sync: int | None = None) -> History:
    """:func:`apply_pending`, but pending changes stay pending.

    Args:
        history: the history.
        consumed: the position at which the run syncs, in samples.
        next_sync: where it syncs next; None for a run that ends.

    Raises:
        DataError: pending changes do not fit at ``next_sync``.
    """
    next_sync = consumed if next_sync is None else next_sync
    return dataclasses.replace(history, last_synced_sample=consumed, next_sync_sample=next_sync)


def at_step(history: History, step: int, consumed: int, global_batch_size: int) -> History:
    """Note the step size with which a run continues; notes on later steps are dropped, as those are done again.

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


def take_event_of(history: History, other: History, event: Event, at: int | None) -> History:
    """Take over an event from another history, in which corpora may have other numbers.

    Args:
        history: the history that gets it.
        other: the history that has it.
        event: the event.
        at: its position in ``history``; None to make it pending.

    Raises:
        DataError: it does not fit.
    """
    own = {history.corpora[number].content: number for number in history.used}
    adds = [(other.corpora[added.corpus], added.epochs) for added in event.add]
    corpora, numbers = numbered(history, [corpus for corpus, _ in adds if corpus.content not in own])
    own |= {corpora[number].content: number for number in numbers}
    add = tuple(AddedCorpus(own[corpus.content], epochs) for corpus, epochs in adds)
    event = dataclasses.replace(event, at=at, add=add)
    return dataclasses.replace(history, events=(*history.events, event), corpora=corpora)


def _with(history: History, event: Event, corpora: tuple[Corpus, ...] | None = None) -> History:
    if event.mixture is not Unchanged.MIXTURE:
        MIXTURE.check(event.mixture, "the mixture")
    if not history.events and event.at is None:
        event = dataclasses.replace(event, at=0)  # a run begins with something
    if event.at is not None and event.at < history.next_sync_sample:
        raise DataError(
            f"a change at sample {event.at:,} is no good: {_why_not_before(history)}; or leave out the position "
            "(--at): then it holds from the run's next checkpoint, or from where it resumes"
        )
    if event.at is not None and event.at > MOST_SAMPLES:
        raise DataError(f"a change at sample {event.at:,} is no good: the last that can be planned is {MOST_SAMPLES:,}")
    events = *history.events, event
    return _changed(history, dataclasses.replace(history, events=events, corpora=corpora or history.corpora))


def _why_not_before(history: History) -> str:
    """Why nothing can change before :attr:`next_sync_sample`, and what can be done."""
    if history.next_sync_sample == history.last_synced_sample:
        return f"the run last looked at the ledger at sample {history.last_synced_sample:,}; plan for a later one"
    return (
        f"a run reads on to sample {history.next_sync_sample:,} before it looks at the ledger again; plan for that or "
        "a later one, or stop the run"
    )


def _changed(history: History, new: History) -> History:
    """A changed history, unless it would lose documents that were dropped because another corpus has them."""
    for dropped_of, kept_in in sorted(lost(new) - lost(history)):
        raise DataError(
            f"documents of {dropped_of} were dropped because {kept_in} has them, but {kept_in} would not be read "
            f"to its end even once, so they would be lost; let it be read for an epoch, take {dropped_of} out as "
            "well, or append without dropping duplicates"
        )
    return new


def lost(history: History) -> set[tuple[str, str]]:
    """Of which corpora documents were dropped that another one has which is not read to its end; names of both."""
    if not any(corpus.dropped and corpus.dropped.like for corpus in history.known()):
        return set()
    scheduled = history.scheduled(history.next_sync_sample)
    whole = dataclasses.replace(history, events=tuple(scheduled))
    last = pools_of(history.corpora, scheduled, history.sequence_length)[-1].epochs
    read = {number for number, epochs in last.items() if epochs is None or epochs >= 1}
    cursors = history.schedule.cursors(history.last_synced_sample)
    read |= {number for number in history.used if cursors[number] >= history.samples(number)}
    for event in scheduled:
        for number in map(history.number_of, event.remove):
            assert event.at is not None
            if whole.schedule.cursors(int(min(event.at, whole.schedule.capacity())))[number] >= history.samples(number):
                read.add(number)
    names = {corpus.content: corpus.name for corpus in history.corpora}
    kept = {history.corpora[number].content for number in read}
    return {
        (history.corpora[number].name, names.get(content, f"a corpus that was taken back ({content[:8]})"))
        for number in last
        if (dropped := history.corpora[number].dropped)
        for content in dropped.like
        if content not in kept
    }
