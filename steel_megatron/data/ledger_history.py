"""The history of a ledger, without any file: corpora, the events that change the pool, and what follows from them.

Everything here is a function of the values of a frozen dataclass, so it can be tested over random histories.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np

from steel_megatron.data.ledger_records import (
    EPOCHS,
    MIXTURE,
    MOST_SAMPLES,
    Added,
    Corpus,
    Event,
    is_epochs,
    is_mixture,
)
from steel_megatron.data.pools import number_of, pools_of
from steel_megatron.data.schedule import Location, Schedule
from steel_megatron.errors import DataError
from steel_megatron.log import get_logger

logger = get_logger(__name__)

FORMAT = "steel-megatron-ledger-1"
"""Name and version of a ledger's file; also of the order of samples."""


@dataclass(frozen=True)
class History:
    """What a run reads and will read; changes are new histories.

    Raises:
        DataError: the corpora and events do not fit together; the message says which and why.
    """

    sequence_length: int
    """Tokens that a sample predicts."""
    seed: int
    """Of all orders, from 0 to 2**63 - 1."""
    corpora: tuple[Corpus, ...] = ()
    """All that ever came in; never taken out, so that none comes in twice."""
    events: tuple[Event, ...] = ()
    """In the order in which they were written down."""
    reached: int = 0
    """Where a run last started or resumed; nothing can be put before."""

    def __post_init__(self) -> None:
        assert self.sequence_length >= 1 and 0 <= self.seed < 2**63, (self.sequence_length, self.seed)
        self._check_corpora()
        # Pending changes are taken as if the run resumed where it last did; activate() checks their real place.
        pools_of(self.corpora, self._placed(self.reached), self.sequence_length)

    def _check_corpora(self) -> None:
        for kind in ("name", "content"):
            known: dict[str, str] = {}
            for corpus in self.corpora:
                value = getattr(corpus, kind)
                if value in known:
                    raise DataError(
                        f"corpus {corpus.name} ({corpus.prefix}) has the {kind} {value} of {known[value]}; "
                        + ("give it another" if kind == "name" else "a corpus can come in once")
                    )
                known[value] = f"{corpus.name} ({corpus.prefix})"
        tokenizers = {corpus.tokenizer: corpus.name for corpus in self.corpora if corpus.tokenizer is not None}
        if len(tokenizers) > 1:
            found = ", ".join(f"{tokenizer} of {name}" for tokenizer, name in tokenizers.items())
            raise DataError(f"corpora of different tokenizers cannot be mixed: {found}")
        for corpus in self.corpora:
            if corpus.samples(self.sequence_length) == 0:
                dropped = f" ({corpus.dropped.tokens:,} of them in dropped documents)" if corpus.dropped else ""
                raise DataError(
                    f"{corpus.prefix}: {corpus.tokens:,} tokens{dropped} make no sample of sequence_length + 1 = "
                    f"{self.sequence_length + 1:,} tokens; shorten the sequence or take more text"
                )

    def _placed(self, pending_at: int | None) -> list[Event]:
        """The events by position, pending ones at a given one, or None to leave them out."""
        placed = [
            dataclasses.replace(event, at=pending_at) if event.at is None else event
            for event in self.events
            if event.at is not None or pending_at is not None
        ]
        return sorted(placed, key=lambda event: event.at or 0)

    @functools.cached_property
    def _schedule(self) -> Schedule:
        return Schedule(
            [corpus.name for corpus in self.corpora],
            [corpus.domain for corpus in self.corpora],
            [corpus.samples(self.sequence_length) for corpus in self.corpora],
            pools_of(self.corpora, self._placed(None), self.sequence_length) if self.corpora else [],
            self.seed,
        )

    # ---- reading ----

    @property
    def pending(self) -> tuple[Event, ...]:
        """Changes that wait for a run to start or resume."""
        return tuple(event for event in self.events if event.at is None)

    def in_use(self) -> list[int]:
        """The numbers of the corpora that are read from :attr:`reached` on, or will be with pending changes."""
        pools = pools_of(self.corpora, self._placed(self.reached), self.sequence_length)
        current = max(number for number, pool in enumerate(pools) if pool.at <= self.reached)
        return sorted({corpus for pool in pools[current:] for corpus in pool.epochs})

    @property
    def used(self) -> set[int]:
        """The numbers of the corpora that a change adds, also of those that were removed."""
        return {added.corpus for event in self.events for added in event.add}

    def samples(self, number: int) -> int:
        """Whole samples in one epoch of a corpus."""
        return self.corpora[number].samples(self.sequence_length)

    def number_of(self, name: str) -> int:
        """The number of the corpus of a name.

        Raises:
            DataError: there is none.
        """
        return number_of(self.corpora, name)

    def capacity(self) -> int | float:
        """How many samples there are, without pending changes; infinity when corpora are read without end."""
        return self._schedule.capacity()

    def require(self, samples: int, wanted_by: str) -> None:
        """Raise a DataError when there are fewer samples; ``wanted_by`` says who asks for them."""
        self._schedule.require(samples, wanted_by)

    def locate(self, position: int) -> Location:
        """The sample at a position.

        Raises:
            DataError: there are fewer samples; the message says what ran out.
        """
        return self._schedule.locate(position)

    def locate_range(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The samples from ``begin`` to before ``end``: int32 [n] corpora, int64 [n] epochs, int64 [n] numbers.

        Raises:
            DataError: there are fewer samples; the message says what ran out.
        """
        return self._schedule.locate_range(begin, end)

    def cursors(self, position: int) -> np.ndarray:
        """The samples of each corpus consumed before a position, over all its epochs: int64 [corpora].

        Raises:
            DataError: there are fewer samples.
        """
        return self._schedule.cursors(position)

    def fingerprint(self, position: int) -> str:
        """SHA-256 (hex) of all that decides the samples before a position, and nothing else.

        Later changes, names and paths do not alter it.
        """
        said = []
        for event in self._placed(None):
            assert event.at is not None
            if event.at >= position:
                break
            added = []
            for new in event.add:
                corpus = self.corpora[new.corpus]
                size = corpus.samples(self.sequence_length)
                added.append([new.corpus, *corpus.identity, size, corpus.domain, new.epochs])
            said.append(
                {
                    "at": event.at,
                    "add": added,
                    "remove": [self.number_of(name) for name in event.remove],
                    "epochs": {str(self.number_of(name)): epochs for name, epochs in event.epochs.items()},
                    "mixture": event.mixture if event.sets_mixture else "as before",
                }
            )
        whole = [FORMAT, self.sequence_length, self.seed, said]
        return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()

    # ---- changing ----

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
            at: the sample from which they are in; None for from where the run starts or resumes.
            on_duplicate: what to do with a corpus that is in already, or was: ``stop`` or ``skip`` it.
            mixture: weights by domain from then on; None for as before. Needed where a mixture holds that does not name
                the new corpora's domains.

        Raises:
            DataError: a corpus is in already, or does not fit; ``at`` is in the past; the mixture is wrong.
        """
        if not is_epochs(epochs):
            raise DataError(f"epochs is {epochs!r}; it must be {EPOCHS}")
        # What was only ever in a change that was taken back keeps its number, and can come in.
        used = self.used
        all_corpora, numbers = list(self.corpora), []
        for corpus in corpora:
            same = (number for number, other in enumerate(all_corpora) if other.content == corpus.content)
            number = next(same, len(all_corpora))
            if number in used or number in numbers:
                found = all_corpora[number]
                known = f"{corpus.prefix} is in the ledger already, as {found.name} ({found.prefix}): the same tokens"
                if on_duplicate == "stop":
                    raise DataError(f"{known}; leave it out, or skip it with on_duplicate")
                logger.warning(f"{known}; it is skipped")
                continue
            all_corpora[number : number + 1] = [corpus]
            numbers.append(number)
        if not numbers and mixture is None:
            return self
        added = tuple(Added(number, epochs) for number in numbers)
        event = Event(at, add=added, mixture=mixture, sets_mixture=mixture is not None)
        return self._with(event, tuple(all_corpora))

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
                raise DataError(f"epochs of {name} is {value!r}; it must be {EPOCHS}")
        return self._with(Event(at, epochs=dict(epochs)))

    def set_mixture(self, mixture: Mapping[str, float] | None, at: int | None = None) -> Self:
        """Read domains by weights; a domain of weight 0 is paused. None ends the mixture.

        Raises:
            DataError: a domain has no corpus, one is not named, a weight is wrong, or ``at`` is in the past.
        """
        return self._with(Event(at, mixture=mixture, sets_mixture=True))

    def cancel(self, at: int | None = None) -> Self:
        """Take back what is planned for a sample, or with None what is pending. Its corpora stay known.

        Raises:
            DataError: nothing is, or the run may have passed it.
        """
        if at is not None and at <= self.reached:
            raise DataError(f"what happened at sample {at:,} stays: the run resumed at {self.reached:,}")
        kept = tuple(event for event in self.events if event.at != at)
        if len(kept) == len(self.events):
            raise DataError("nothing is pending" if at is None else f"nothing is planned for sample {at:,}")
        return dataclasses.replace(self, events=kept)

    def activate(self, consumed: int) -> Self:
        """Give pending changes the position at which a run starts or resumes.

        Raises:
            DataError: they do not fit there, or there were fewer samples before.
        """
        self.cursors(consumed)  # that many there must have been
        placed = (event if event.at is not None else dataclasses.replace(event, at=consumed) for event in self.events)
        return dataclasses.replace(self, events=tuple(placed), reached=consumed)

    def _with(self, event: Event, corpora: tuple[Corpus, ...] | None = None) -> Self:
        if event.sets_mixture and not is_mixture(event.mixture):
            raise DataError(f"the mixture is {event.mixture!r}; it must be {MIXTURE}")
        if not self.events and event.at is None:
            event = dataclasses.replace(event, at=0)  # a run begins with something
        if event.at is not None and not self.reached <= event.at <= MOST_SAMPLES:
            raise DataError(
                f"a change at sample {event.at:,} is no good: the run last resumed at {self.reached:,}; plan it for a "
                "later sample, or leave out the position for where the run resumes next"
            )
        return dataclasses.replace(self, events=(*self.events, event), corpora=corpora or self.corpora)
