"""The history of a ledger, without any file: corpora, the events that change which are active, and what is read."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Concatenate, ParamSpec

from steel_megatron.data.ledger.active import ActiveCorpora, active_corpora, number_of, used_by
from steel_megatron.data.ledger.records import MOST_POSITIONS, Corpus, Event, SkippedSamples, StepSize, Unchanged
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
        DataError: corpora and events do not fit together; the message says which and why.
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
    """How many samples the run's steps took, from the first on; empty if no run has started with the ledger."""
    corpora: tuple[Corpus, ...] = field(default=(), metadata=REQUIRED)
    """All corpora ever added, by permanent numbers. Those of cancelled changes are ignored by everything else."""
    events: tuple[Event, ...] = field(default=(), metadata=REQUIRED)
    """In the order in which they were written."""
    skipped: tuple[SkippedSamples, ...] = ()
    """Samples that are not read, by number; no two parts touch."""

    def __post_init__(self) -> None:
        assert self.sequence_length >= 1 and 0 <= self.seed < 2**63, (self.sequence_length, self.seed)
        self._check_numbers()
        self._check_corpora()
        # Pending changes are checked again by apply_pending(), at their final sample.
        self._active(self.scheduled(self.next_sync_sample))

    def _check_numbers(self) -> None:
        """What relates the numbers of several records; each alone is in its range."""
        whole(self.last_synced_sample).check(self.next_sync_sample, "reserved")
        for number, (before, size) in enumerate(itertools.pairwise(self.steps), 1):
            whole(before.step + 1).check(size.step, f"steps[{number}]: step")
            whole(before.consumed + 1).check(size.consumed, f"steps[{number}]: consumed")
        for number, part in enumerate(self.skipped):
            least = self.skipped[number - 1].end + 1 if number else 0
            whole(least).check(part.first, f"skipped[{number}]: first")
            whole(part.first + 1).check(part.end, f"skipped[{number}]: end")
        for number, event in enumerate(self.events):
            for entry, added in enumerate(event.add):
                whole(0, len(self.corpora) - 1).check(added.corpus, f"events[{number}], add[{entry}]: corpus")

    def _check_corpora(self) -> None:
        corpora = self.known()
        for kind in ("name", "content"):
            known: dict[str, str] = {}
            for corpus in corpora:
                value = getattr(corpus, kind)
                if value in known:
                    raise DataError(
                        f"corpus {corpus.name} ({corpus.prefix}) has the {kind} {value} of {known[value]}; "
                        + ("choose another" if kind == "name" else "a corpus can be added only once")
                    )
                known[value] = f"{corpus.name} ({corpus.prefix})"
        tokenizers = {corpus.tokenizer: corpus.name for corpus in corpora if corpus.tokenizer is not None}
        if len(tokenizers) > 1:
            found = ", ".join(f"{tokenizer} of {name}" for tokenizer, name in tokenizers.items())
            raise DataError(f"corpora of different tokenizers cannot be mixed: {found}")
        with_labels = {corpus.labels is not None: corpus.name for corpus in corpora}
        if len(with_labels) > 1:
            raise DataError(
                f"{with_labels[True]} has labels and {with_labels[False]} has none: conversations and plain text "
                "cannot be mixed in one run; prepare both as conversations"
            )
        for corpus in corpora:
            if corpus.samples(self.sequence_length) == 0:
                dropped = f" ({corpus.dropped.tokens:,} of them in dropped documents)" if corpus.dropped else ""
                raise DataError(
                    f"{corpus.prefix}: {corpus.tokens:,} tokens{dropped} make no sample of sequence_length + 1 = "
                    f"{self.sequence_length + 1:,} tokens; shorten the sequence or use a longer text"
                )

    def then(
        self,
        change: Callable[Concatenate[History, Arguments], History],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> History:
        """A change of this history, so that several read in their order: ``history.then(add, new).then(cancel)``."""
        return change(self, *args, **kwargs)

    @functools.cached_property
    def used(self) -> set[int]:
        """The numbers of the corpora that events add, including removed ones."""
        return used_by(self.events)

    def known(self) -> list[Corpus]:
        """The corpora that events add, including removed ones."""
        return [self.corpora[number] for number in sorted(self.used)]

    @property
    def labelled(self) -> bool:
        """Whether its corpora have labels: their documents stay whole, and only some of their tokens are predicted."""
        return any(corpus.labels is not None for corpus in self.known())

    @property
    def tokenizer(self) -> str | None:
        """Fingerprint of the tokenizer that made the corpora; None if not recorded."""
        return next((one.tokenizer for one in self.known() if one.tokenizer is not None), None)

    def number_of(self, name: str) -> int:
        """The number of the corpus of a name.

        Raises:
            DataError: there is none.
        """
        return number_of(self.corpora, name, self.used)

    def samples(self, number: int) -> int:
        """Whole samples in one epoch of a corpus."""
        return self.corpora[number].samples(self.sequence_length)

    def scheduled(self, pending_at: int) -> list[Event]:
        """The events by sample, pending ones at a given sample."""
        events = (dataclasses.replace(event, at=event.start(pending_at)) for event in self.events)
        return sorted(events, key=lambda event: event.start(0))

    def before(self, position: int) -> list[Event]:
        """The events that decide the samples before a position, by sample."""
        events = (event for event in self.events if event.at is not None and event.at < position)
        return sorted(events, key=lambda event: event.start(0))

    def _active(self, events: Sequence[Event]) -> list[ActiveCorpora]:
        return active_corpora(self.corpora, events, self.sequence_length)

    def _active_without_pending(self) -> list[ActiveCorpora]:
        try:
            return self._active(self.before(MOST_POSITIONS))
        except DataError:  # a planned change needs a pending one, so its effect is not decided yet
            return self._active(self.before(self.next_sync_sample))

    @functools.cached_property
    def schedule(self) -> Schedule:
        """Which sample comes at which position, without pending changes."""
        return Schedule(
            [corpus.name for corpus in self.corpora],
            [corpus.domain for corpus in self.corpora],
            [corpus.samples(self.sequence_length) for corpus in self.corpora],
            self._active_without_pending() if self.corpora else [],
            self.seed,
        )

    def in_use(self) -> list[int]:
        """The numbers of the corpora that are read from the last sync on, with or without pending changes."""
        found: set[int] = set()
        for phases in (self._active_without_pending(), self._active(self.scheduled(self.next_sync_sample))):
            current = max(number for number, active in enumerate(phases) if active.at <= self.last_synced_sample)
            found.update(*(active.epochs for active in phases[current:]))
        return sorted(found)

    def step_samples(self, step: int) -> range | None:
        """The samples of an optimizer step, counted from 1; None if the ledger did not record them."""
        before = [size for size in self.steps if size.step < step]
        if not before:
            return None
        first = before[-1].consumed + (step - 1 - before[-1].step) * before[-1].global_batch_size
        return range(first, first + before[-1].global_batch_size)

    def skips(self, sample: int) -> bool:
        """Whether a sample is not read."""
        return any(part.first <= sample < part.end for part in self.skipped)

    def skipped_in(self, begin: int, end: int) -> list[range]:
        """The parts of the samples ``begin`` to before ``end`` that are not read."""
        parts = (range(max(part.first, begin), min(part.end, end)) for part in self.skipped)
        return [part for part in parts if part]

    def fingerprint(self, position: int) -> str:
        """SHA-256 (hex) of everything that decides the samples before a position, and of nothing else.

        Later changes, names and paths do not alter it.
        """
        decisions = [self.meaning(event) for event in self.before(position)]
        skipped = [[part.start, part.stop] for part in self.skipped_in(0, position)]
        all_decisions = [FORMAT, self.sequence_length, self.seed, decisions, *([skipped] if skipped else [])]
        content = json.dumps(all_decisions, sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def meaning(self, event: Event) -> dict[str, Any]:
        """Everything that an event of this history decides, without names and paths."""
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
        return (self.corpora, self.events, self.skipped) != (other.corpora, other.events, other.skipped)
