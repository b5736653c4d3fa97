"""The ledger of a run: which corpora it reads, from which sample on, how often and in which mixture.

The position of a run is (ledger, consumed samples), nothing else: which sample comes at which position is a function of
the two (:mod:`~steel_megatron.data.schedule`), the same for any number of processes. A ledger is JSON, a list of events
to which one is appended for every change, and is never changed in the past: what decides the samples before a position
has a fingerprint, which a checkpoint holds against the ledger it resumes with.

A change is pending (``at`` is null) until a run starts or resumes and gives it the position it is at. Then the pool is
everything unseen plus the new, in a new order. A change with a position of its own is planned, a stage of a curriculum.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from steel_megatron.data.indexed import IndexedCorpus
from steel_megatron.data.ledger_corpora import describe, dropped_bits, open_corpus, without_duplicates
from steel_megatron.data.ledger_history import FORMAT, History
from steel_megatron.data.ledger_records import (
    MOST_SAMPLES,
    Fields,
    corpus_from,
    corpus_to,
    event_from,
    event_to,
)
from steel_megatron.data.packing import PackedEpoch
from steel_megatron.errors import DataError
from steel_megatron.files import disk_errors, exclusive_lock, write_atomically


@dataclass(frozen=True)
class Ledger(History):
    """A ledger; changes are new ledgers, which :meth:`save` writes.

    Raises:
        DataError: the corpora and events do not fit together; the message says which and why.
    """

    folder: Path = field(default=Path(), compare=False)
    """Where its file is, and beside it those of dropped documents."""

    @classmethod
    def create(cls, prefixes: Sequence[str | Path], sequence_length: int, seed: int, **options: Any) -> Self:
        """A new ledger of some corpora; ``options`` as for :meth:`append`.

        Raises:
            DataError: a corpus cannot be used, or they do not fit together.
        """
        return cls(sequence_length, seed).append(prefixes, **options)

    def append(
        self,
        prefixes: Sequence[str | Path],
        names: Sequence[str] | None = None,
        domain: str = "default",
        epochs: float | None = 1.0,
        at: int | None = None,
        on_duplicate: Literal["stop", "skip"] = "stop",
        mixture: Mapping[str, float] | None = None,
        drop_duplicates: bool = False,
    ) -> Self:
        """Put corpora on disk into the pool. One without a manifest is read in full.

        Args:
            prefixes: paths without a suffix.
            names: by which commands call them; None for the last parts of the prefixes.
            domain: by which mixtures call all of them.
            epochs: how often each is read, 2.5 for twice and half of a third time; None for without end.
            at: the sample from which they are in; None for from where the run starts or resumes.
            on_duplicate: what to do with a corpus that is in already, or was: ``stop`` or ``skip`` it.
            mixture: weights by domain from then on; None for as before.
            drop_duplicates: whether to leave out documents that are exactly the same as others in the pool, or as
                earlier ones of the new corpora. Which ones is written beside the ledger at once.

        Raises:
            DataError: a corpus cannot be used or does not fit, or the disk refuses.
        """
        if names is not None and len(names) != len(prefixes):
            raise DataError(f"{len(names)} names ({', '.join(names)}) were given for {len(prefixes)} corpora")
        new = [describe(prefix, names[n] if names else None, domain) for n, prefix in enumerate(prefixes)]
        if not drop_duplicates:
            return self.add(new, epochs, at, on_duplicate, mixture)
        if on_duplicate == "stop":
            self.add(new, epochs, at, on_duplicate, mixture)  # refuses before documents are compared
        removed = {name for event in self.events for name in event.remove}
        known = [self.corpora[number] for number in sorted(self.used)]
        others = [corpus for corpus in known if corpus.name not in removed]
        fresh = {corpus.content for corpus in new} - {corpus.content for corpus in known}
        reduced, files = without_duplicates(new, fresh, others, self.folder)
        appended = self.add(reduced, epochs, at, on_duplicate, mixture)
        for name, content in files.items():
            write_atomically(self.folder / name, content, DataError)
        return appended

    def check_began_with(self, prefixes: Sequence[str | Path]) -> None:
        """Raise a DataError when corpora are not those that the ledger began with, or has taken in since."""
        known = {os.path.abspath(self.folder / corpus.prefix): corpus for corpus in self.corpora}
        by_content = {corpus.content: corpus for corpus in self.corpora}
        found = set()
        for prefix in prefixes:
            corpus = known.get(os.path.abspath(prefix)) or by_content.get(describe(prefix).content)
            if corpus is None:
                raise DataError(
                    f"{prefix} is not in the ledger, which has {', '.join(known)}; add it with steel-megatron data "
                    "append, or take another ledger"
                )
            found.add(corpus.name)
        first = [self.corpora[added.corpus] for event in self.events[:1] for added in event.add]
        missing = [corpus for corpus in first if corpus.name not in found]
        if missing:
            raise DataError(
                f"the ledger began with {missing[0].name} ({missing[0].prefix}), which is not among "
                f"{', '.join(map(str, prefixes))}; name it, or take it out with steel-megatron data remove"
            )

    def packed(self, number: int, epoch: int, corpus: IndexedCorpus, cache: Path | None = None) -> PackedEpoch:
        """The samples of one pass over a corpus.

        Args:
            number: of the corpus in the ledger.
            epoch: number of the pass.
            corpus: the corpus, from :func:`open_corpora`.
            cache: folder for where samples begin; None to keep that in memory.

        Raises:
            DataError: the file of dropped documents is damaged, or the cache cannot be written.
        """
        record = self.corpora[number]
        key = (self.seed, int(record.content[:16], 16), epoch)
        dropped = dropped_bits(record, self.folder)
        return PackedEpoch(corpus, self.sequence_length, key, dropped, cache, record.content)

    def save(self, path: str | Path) -> None:
        """Write the ledger, whole or not at all.

        Raises:
            DataError: the disk refuses.
        """
        write_atomically(path, dumps(self).encode(), DataError)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a ledger.

        Raises:
            DataError: it is not there, or damaged; the message names the field.
        """
        path = Path(path)
        with disk_errors("read", path, DataError):
            content = path.read_bytes()
        history = loads(content, str(path))
        return cls(**{**vars(history), "folder": path.parent})


class OpenCorpora:
    """The corpora of a ledger by number; see :func:`open_corpora`."""

    def __init__(self, ledger: Ledger, vocab_size: int | None) -> None:
        self._ledger, self._vocab_size = ledger, vocab_size
        self._opened: dict[int, IndexedCorpus] = {}

    def __len__(self) -> int:
        return len(self._ledger.corpora)

    def __getitem__(self, number: int) -> IndexedCorpus:
        if number not in self._opened:
            self._opened[number] = open_corpus(self._ledger.corpora[number], self._ledger.folder, self._vocab_size)
        return self._opened[number]


def open_corpora(ledger: Ledger, vocab_size: int | None = None) -> OpenCorpora:
    """Open what a ledger reads from where its run resumed, or has pending, and hold it against what was recorded.

    A corpus that was removed before that may be gone; it is opened when somebody asks for it.

    Args:
        ledger: the ledger.
        vocab_size: every token id must be below it; None to leave ids unchecked.

    Raises:
        DataError: a corpus or a file of dropped documents is missing, damaged, or not what it was when it came in.
    """
    opened = OpenCorpora(ledger, vocab_size)
    for number in ledger.in_use():
        dropped_bits(ledger.corpora[number], ledger.folder)
        opened[number]
    return opened


def dumps(ledger: Ledger) -> str:
    """A ledger as JSON."""
    values: dict[str, Any] = {"format": FORMAT, "sequence_length": ledger.sequence_length, "seed": ledger.seed}
    values["reached"] = ledger.reached
    values["corpora"] = [corpus_to(corpus) for corpus in ledger.corpora]
    values["events"] = [event_to(event) for event in ledger.events]
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def loads(content: str | bytes, where: str) -> Ledger:
    """A ledger out of JSON.

    Args:
        content: the JSON.
        where: its file, for messages.

    Raises:
        DataError: a field is missing, unknown or wrong; the message names it.
    """
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"ledger {where} is no JSON: {error}") from error
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        found = value.get("format") if isinstance(value, dict) else value
        raise DataError(f"{where} is no ledger of format {FORMAT!r} (it says {str(found)[:80]!r})")
    where = f"ledger {where}"
    fields = Fields(value, where, ("format", "sequence_length", "seed", "reached", "corpora", "events"))
    corpora = fields.get("corpora", "a list", lambda v: isinstance(v, list))
    events = fields.get("events", "a list", lambda v: isinstance(v, list))
    try:
        return Ledger(
            fields.count("sequence_length", 1, 2**31),
            fields.count("seed", 0, 2**63 - 1),
            tuple(corpus_from(corpus, f"{where}, corpora[{number}]") for number, corpus in enumerate(corpora)),
            tuple(event_from(event, f"{where}, events[{number}]", len(corpora)) for number, event in enumerate(events)),
            fields.count("reached", 0, MOST_SAMPLES),
        )
    except DataError as error:
        raise error if str(error).startswith(where) else DataError(f"{where}: {error}") from None


class Edit:
    """A ledger's file while it is changed: put the new ledger into ``ledger``."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger


@contextmanager
def edit(path: str | Path, new: Ledger | None = None) -> Iterator[Edit]:
    """Change a ledger's file; nobody else can at the same time, and it is left as it was when the block raises.

    Args:
        path: the file.
        new: what to begin with where there is no file; None to insist on one.

    Raises:
        DataError: the file is missing or damaged, another job changes it just now, or the disk refuses.
    """
    path = Path(path)
    with exclusive_lock(path, DataError):
        begun = new if new is not None and not path.exists() else Ledger.load(path)
        changed = Edit(begun)
        yield changed
        if changed.ledger != begun or not path.exists():
            changed.ledger.save(path)
