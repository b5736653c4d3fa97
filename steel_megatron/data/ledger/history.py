"""The history of a ledger, without any file: corpora, the events that change the pool, and what is read by them."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Concatenate, ParamSpec

from steel_megatron.data.ledger.pools import Pool, number_of, pools_of, used_by
from steel_megatron.data.ledger.records import Corpus, Event, StepSize, Unchanged
from steel_megatron.data.ledger.schedule import Schedule
from steel_megatron.data.strict_json import REQUIRED, whole
from steel_megatron.errors import DataError

Arguments = ParamSpec("Arguments")

FORMAT = "steel-megatron-ledger-1"
"""Name and version of a ledger's file; also of the order of samples."""


@dataclass(frozen=True)
class History:
    """What a run reads and will read; how it changes is in :mod:`~steel_megatron.data.ledger.changes`.

    Raises:
        DataError: the corpora and events do not fit together; the message says which and why.
    """

    sequence_length: Annotated[int, whole(1, 2**31)]
    """Tokens that a sample predicts."""
    seed: Annotated[int, whole(0, 2**63 - 1)]
    """Of all orders."""
    last_synced_sample: Annotated[int, whole()] = field(default=0, metadata=REQUIRED | {"key": "reached"})
    """Where a run last synced, by starting, resuming or saving a checkpoint."""
    next_sync_sample: Annotated[int, whole()] = field(default=0, metadata=REQUIRED | {"key": "reserved"})
    """Where the run that wrote it syncs next; while that run is live, nothing can change before."""
    steps: tuple[StepSize, ...] = ()
    """How many samples the run's steps took, from the first on; empty if no run has started with this ledger."""
    corpora: tuple[Corpus, ...] = field(default=(), metadata=REQUIRED)
    """All corpora ever added, by permanent numbers. One that no event uses any more is ignored, and its number goes to
    the next new corpus."""
    events: tuple[Event, ...] = field(default=(), metadata=REQUIRED)
    """In the order in which they were written."""

    def __post_init__(self) -> None:
        assert self.sequence_length >= 1 and 0 <= self.seed < 2**63, (self.sequence_length, self.seed)
        self._check_numbers()
        self._check_corpora()
        # Pending changes are taken as if they held from the next sync; apply_pending() checks their real position.
        pools_of(self.corpora, self.scheduled(self.next_sync_sample), self.sequence_length)

    def _check_numbers(self) -> None:
        """What holds between the fields, of which each alone is right."""
        whole(self.last_synced_sample).check(self.next_sync_sample, "reserved")
        for number, (before, size) in enumerate(itertools.pairwise(self.steps), 1):
            whole(before.step + 1).check(size.step, f"steps[{number}]: step")
            whole(before.consumed + 1).check(size.consumed, f"steps[{number}]: consumed")
        for number, event in enumerate(self.events):
            for place, added in enumerate(event.add):
                whole(0, len(self.corpora) - 1).check(added.corpus, f"events[{number}], add[{place}]: corpus")

    def _check_corpora(self) -> None:
        corpora = self.known()
        for kind in ("name", "content"):
            known: dict[str, str] = {}
            for corpus in corpora:
                value = getattr(corpus, kind)
                if value in known:
                    raise DataError(
                        f"corpus {corpus.name} ({corpus.prefix}) has the {kind} {value} of {known[value]}; "
                        + ("give it another" if kind == "name" else "a corpus can come in once")
                    )
                known[value] = f"{corpus.name} ({corpus.prefix})"
        tokenizers = {corpus.tokenizer: corpus.name for corpus in corpora if corpus.tokenizer is not None}
        if len(tokenizers) > 1:
            found = ", ".join(f"{tokenizer} of {name}" for tokenizer, name in tokenizers.items())
            raise DataError(f"corpora of different tokenizers cannot be mixed: {found}")
        for corpus in corpora:
            if corpus.samples(self.sequence_length) == 0:
                dropped = f" ({corpus.dropped.tokens:,} of them in dropped documents)" if corpus.dropped else ""
                raise DataError(
                    f"{corpus.prefix}: {corpus.tokens:,} tokens{dropped} make no sample of sequence_length + 1 = "
                    f"{self.sequence_length + 1:,} tokens; shorten the sequence or take more text"
                )

    def then(
        self,
        change: Callable[Concatenate[History, Arguments], History],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> History:
        """A change of this history, so that several read in their order: ``history.then(add, new).then(cancel)``."""
        return change(self, *args, **kwargs)

    def known(self) -> list[Corpus]:
        """The corpora that a change adds, also those that were removed."""
        return [self.corpora[number] for number in sorted(self.used)]

    def scheduled(self, pending_at: int | None) -> list[Event]:
        """The events by position, pending ones at a given one, or None to leave them out."""
        scheduled = [
            dataclasses.replace(event, at=pending_at) if event.at is None else event
            for event in self.events
            if event.at is not None or pending_at is not None
        ]
        return sorted(scheduled, key=lambda event: event.at or 0)

    @functools.cached_property
    def schedule(self) -> Schedule:
        """Which sample comes at which position, without pending changes."""
        return Schedule(
            [corpus.name for corpus in self.corpora],
            [corpus.domain for corpus in self.corpora],
            [corpus.samples(self.sequence_length) for corpus in self.corpora],
            self._pools_until_pending() if self.corpora else [],
            self.seed,
        )

    def _pools_until_pending(self) -> list[Pool]:
        """The pools without what is pending."""
        scheduled = self.scheduled(None)
        try:
            return pools_of(self.corpora, scheduled, self.sequence_length)
        except DataError:  # a plan needs what is pending, which comes before it: so far it is for no certain samples
            settled = [event for event in scheduled if event.at is not None and event.at < self.next_sync_sample]
            return pools_of(self.corpora, settled, self.sequence_length)

    @property
    def pending(self) -> tuple[Event, ...]:
        """Changes that wait for the next sync of a run."""
        return tuple(event for event in self.events if event.at is None)

    def in_use(self) -> list[int]:
        """The numbers of the corpora that are read from the last sync on, with or without pending changes."""
        found: set[int] = set()
        with_pending = pools_of(self.corpora, self.scheduled(self.next_sync_sample), self.sequence_length)
        for pools in (self._pools_until_pending(), with_pending):
            current = max(number for number, pool in enumerate(pools) if pool.at <= self.last_synced_sample)
            found |= {corpus for pool in pools[current:] for corpus in pool.epochs}
        return sorted(found)

    @functools.cached_property
    def used(self) -> set[int]:
        """The numbers of the corpora that a change adds, also of those that were removed."""
        return used_by(self.events)

    def samples(self, number: int) -> int:
        """Whole samples in one epoch of a corpus."""
        return self.corpora[number].samples(self.sequence_length)

    def number_of(self, name: str) -> int:
        """The number of the corpus of a name.

        Raises:
            DataError: there is none.
        """
        return number_of(self.corpora, name, self.used)

    def step_samples(self, step: int) -> range | None:
        """The samples of an optimizer step, from 1; None for one of which the ledger does not say it."""
        before = [size for size in self.steps if size.step < step]
        if not before:
            return None
        first = before[-1].consumed + (step - 1 - before[-1].step) * before[-1].global_batch_size
        return range(first, first + before[-1].global_batch_size)

    def fingerprint(self, position: int) -> str:
        """SHA-256 (hex) of all that decides the samples before a position, and nothing else.

        Later changes, names and paths do not alter it.
        """
        said = [self.meaning(event) for event in self.before(position)]
        whole = [FORMAT, self.sequence_length, self.seed, said]
        return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()

    def before(self, position: int) -> list[Event]:
        """The events that decide the samples before a position, in their order."""
        return [event for event in self.scheduled(None) if event.at is not None and event.at < position]

    def meaning(self, event: Event) -> dict[str, Any]:
        """All that an event of this history decides, without names and paths."""
        added = []
        for new in event.add:
            corpus = self.corpora[new.corpus]
            size = corpus.samples(self.sequence_length)
            added.append([new.corpus, *corpus.identity, size, corpus.domain, new.epochs])
        return {
            "at": event.at,
            "add": added,
            "remove": [self.number_of(name) for name in event.remove],
            "epochs": {str(self.number_of(name)): epochs for name, epochs in event.epochs.items()},
            "mixture": event.mixture.value if isinstance(event.mixture, Unchanged) else event.mixture,
        }

    def differs_from(self, other: History) -> bool:
        """Whether another version of the same ledger reads, or may read, something else."""
        return (self.corpora, self.events) != (other.corpora, other.events)
