"""How a ledger's history changes: by commands, and by a run that syncs with it. Each change is a new history."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Self

from steel_megatron.data.ledger.history import History
from steel_megatron.data.ledger.pools import pools_of, used_by
from steel_megatron.data.ledger.records import (
    EPOCHS,
    MIXTURE,
    MOST_SAMPLES,
    Added,
    Corpus,
    Event,
    StepSize,
    is_epochs,
    is_mixture,
    shown,
)
from steel_megatron.errors import DataError
from steel_megatron.log import get_logger

logger = get_logger(__name__)


@dataclass(frozen=True)
class Changeable(History):
    """A history with what can be done to it."""

    def with_event_of(self, other: History, event: Event, at: int | None) -> Self:
        """This history with an event of another one, whose corpora may have other numbers there, at some position.

        Raises:
            DataError: it does not fit.
        """
        own = {self.corpora[number].content: number for number in self.used}
        adds = [(other.corpora[added.corpus], added.epochs) for added in event.add]
        corpora, numbers = self.numbered([corpus for corpus, _ in adds if corpus.content not in own])
        own |= {corpora[number].content: number for number in numbers}
        add = tuple(Added(own[corpus.content], epochs) for corpus, epochs in adds)
        event = dataclasses.replace(event, at=at, add=add)
        return dataclasses.replace(self, events=(*self.events, event), corpora=corpora)

    def add(
        self,
        corpora: Sequence[Corpus],
        epochs: float | None = 1.0,
        at: int | None = None,
        on_duplicate: Literal["stop", "skip"] = "stop",
        mixture: Mapping[str, float] | None = None,
    ) -> Self:
        """Put corpora into the pool.

        Args:
            corpora: the new ones.
            epochs: how often each is read, 2.5 for twice and half of a third time; None for without end.
            at: the sample from which they are in; None for the next sync of the run.
            on_duplicate: what to do with a corpus that is in already, or was: ``stop`` or ``skip`` it.
            mixture: weights by domain from then on; None for as before. Needed where a mixture holds that does not name
                the new corpora's domains.

        Raises:
            DataError: a corpus is in already, or does not fit; ``at`` is in the past; the mixture is wrong.
        """
        if not is_epochs(epochs):
            raise DataError(f"epochs is {shown(epochs)}; it must be {EPOCHS}")
        new = self.fresh(corpora, on_duplicate)
        if not new and mixture is None:
            return self
        all_corpora, numbers = self.numbered(new)
        added = tuple(Added(number, epochs) for number in numbers)
        event = Event(at, add=added, mixture=mixture, sets_mixture=mixture is not None)
        return self._with(event, all_corpora)

    def fresh(self, corpora: Sequence[Corpus], on_duplicate: Literal["stop", "skip"]) -> list[Corpus]:
        """The corpora that are not in, and were not: their content is another one, or their dtype.

        Raises:
            DataError: one is, and ``on_duplicate`` says ``stop``.
        """
        new: list[Corpus] = []
        for corpus in corpora:
            same = (entry for entry in (*self._known(), *new) if entry.content == corpus.content)
            if (found := next(same, None)) is None:
                new.append(corpus)
                continue
            known = f"{corpus.prefix} is in the ledger already, as {found.name} ({found.prefix}): the same bytes"
            if on_duplicate == "stop":
                raise DataError(f"{known}; leave it out, or skip it with on_duplicate")
            logger.warning(f"{known}; it is skipped")
        return new

    def _known(self) -> list[Corpus]:
        return [self.corpora[number] for number in sorted(self.used)]

    def numbered(self, new: Sequence[Corpus]) -> tuple[tuple[Corpus, ...], list[int]]:
        """All corpora with some more of them, and the numbers of these: free ones first."""
        corpora = list(self.corpora)
        free = [number for number in range(len(corpora) + len(new)) if number not in self.used][: len(new)]
        for number, corpus in zip(free, new, strict=True):
            corpora[number : number + 1] = [corpus]
        return tuple(corpora), free

    def remove(self, names: Sequence[str], at: int | None = None) -> Self:
        """Take corpora out of the pool, for good.

        Raises:
            DataError: one is not in; the mixture names a domain of which none would be left; ``at`` is in the past.
        """
        return self._with(Event(at, remove=tuple(names)))

    def reweight(self, epochs: Mapping[str, float | None], at: int | None = None) -> Self:
        """Change how often corpora are read in the whole run, by name; what was read counts.

        Raises:
            DataError: a corpus is not in, a number is wrong, or ``at`` is in the past.
        """
        for name, value in epochs.items():
            if not is_epochs(value):
                raise DataError(f"epochs of {name} is {shown(value)}; it must be {EPOCHS}")
        return self._with(Event(at, epochs=dict(epochs)))

    def set_mixture(self, mixture: Mapping[str, float] | None, at: int | None = None) -> Self:
        """Read domains by weights; a domain of weight 0 is paused. None ends the mixture.

        Raises:
            DataError: a domain has no corpus, one is not named, a weight is wrong, or ``at`` is in the past.
        """
        return self._with(Event(at, mixture=mixture, sets_mixture=True))

    def cancel(self, at: int | None = None) -> Self:
        """Take back what is planned for a sample, or with None what is pending, with the corpora that came in by it.

        Raises:
            DataError: nothing is, the run may have passed it, or documents were dropped for the sake of what would go.
        """
        if at is not None and at < self.next_sync_sample:
            raise DataError(f"what is planned for sample {at:,} stays: {self._why_not_before()}")
        kept = tuple(event for event in self.events if event.at != at)
        if len(kept) == len(self.events):
            raise DataError("nothing is pending" if at is None else f"nothing is planned for sample {at:,}")
        if not kept:
            raise DataError("nothing would be left in the ledger; make another one (steel-megatron data create)")
        cancelled = self.corpora[: max(used_by(kept), default=-1) + 1]
        return self._changed(dataclasses.replace(self, events=kept, corpora=cancelled))

    def stopped(self) -> Self:
        """What the ledger says when no run is under way that would read on from where it last looked."""
        return dataclasses.replace(self, next_sync_sample=self.last_synced_sample)

    def apply_pending(self, consumed: int, next_sync: int | None = None) -> Self:
        """Give pending changes the position at which a run syncs with the ledger.

        Args:
            consumed: the position.
            next_sync: where the run syncs next; None for a run that ends.

        Raises:
            DataError: they do not fit there, or there were fewer samples before.
        """
        scheduled = (
            event if event.at is not None else dataclasses.replace(event, at=consumed) for event in self.events
        )
        active = dataclasses.replace(self, events=tuple(scheduled)).synced(consumed, next_sync)
        active.cursors(consumed)  # that many there must have been
        return active

    def synced(self, consumed: int, next_sync: int | None = None) -> Self:
        """:meth:`apply_pending`, but what is pending stays so."""
        return dataclasses.replace(
            self, last_synced_sample=consumed, next_sync_sample=consumed if next_sync is None else next_sync
        )

    def at_step(self, step: int, consumed: int, global_batch_size: int) -> Self:
        """Note that a run goes on with steps of ``global_batch_size`` samples after ``step`` steps; what was noted of
        later steps is forgotten, as these are done again."""
        steps = tuple(size for size in self.steps if size.step < step and size.consumed < consumed)
        latest = dataclasses.replace(self, steps=steps).step_samples(step + 1)
        if latest != range(consumed, consumed + global_batch_size):
            steps += (StepSize(step, consumed, global_batch_size),)
        return dataclasses.replace(self, steps=steps)

    def _with(self, event: Event, corpora: tuple[Corpus, ...] | None = None) -> Self:
        if event.sets_mixture and not is_mixture(event.mixture):
            raise DataError(f"the mixture is {shown(event.mixture)}; it must be {MIXTURE}")
        if not self.events and event.at is None:
            event = dataclasses.replace(event, at=0)  # a run begins with something
        if event.at is not None and event.at < self.next_sync_sample:
            raise DataError(
                f"a change at sample {event.at:,} is no good: {self._why_not_before()}; or leave out the position "
                "(--at): then it holds from the run's next checkpoint, or from where it resumes"
            )
        if event.at is not None and event.at > MOST_SAMPLES:
            raise DataError(
                f"a change at sample {event.at:,} is no good: the last that can be planned is {MOST_SAMPLES:,}"
            )
        return self._changed(dataclasses.replace(self, events=(*self.events, event), corpora=corpora or self.corpora))

    def _why_not_before(self) -> str:
        """Why nothing can change before :attr:`next_sync_sample`, and what can be done."""
        if self.next_sync_sample == self.last_synced_sample:
            return f"the run last looked at the ledger at sample {self.last_synced_sample:,}; plan for a later one"
        return (
            f"a run reads on to sample {self.next_sync_sample:,} before it looks at the ledger again; plan for that or "
            "a later one, or say --stopped true if no run is under way"
        )

    def _changed(self, new: Self) -> Self:
        """A changed history, unless it would lose documents that were dropped because another corpus has them."""
        for dropped_of, kept_in in sorted(new.lost() - self.lost()):
            raise DataError(
                f"documents of {dropped_of} were dropped because {kept_in} has them, but {kept_in} would not be read "
                f"to its end even once, so they would be lost; let it be read for an epoch, take {dropped_of} out as "
                "well, or append without dropping duplicates"
            )
        return new

    def lost(self) -> set[tuple[str, str]]:
        """Of which corpora documents were dropped that another one has which is not read to its end; names of both."""
        if not any(corpus.dropped and corpus.dropped.like for corpus in self._known()):
            return set()
        scheduled = self._scheduled(self.next_sync_sample)
        whole = dataclasses.replace(self, events=tuple(scheduled))
        last = pools_of(self.corpora, scheduled, self.sequence_length)[-1].epochs
        read = {number for number, epochs in last.items() if epochs is None or epochs >= 1}
        cursors = self.cursors(self.last_synced_sample)
        read |= {number for number in self.used if cursors[number] >= self.samples(number)}
        for event in scheduled:
            for number in map(self.number_of, event.remove):
                assert event.at is not None
                if whole.cursors(int(min(event.at, whole.capacity())))[number] >= self.samples(number):
                    read.add(number)
        names = {corpus.content: corpus.name for corpus in self.corpora}
        kept = {self.corpora[number].content for number in read}
        return {
            (self.corpora[number].name, names.get(content, f"a corpus that was taken back ({content[:8]})"))
            for number in last
            if (dropped := self.corpora[number].dropped)
            for content in dropped.like
            if content not in kept
        }
