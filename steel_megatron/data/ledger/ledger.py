"""The ledger of a run: which corpora it reads, from which sample on, how often and in which mixture.

The position of a run is (ledger, consumed samples), nothing else: which sample comes at which position is a function of
the two (:mod:`~steel_megatron.data.ledger.schedule`), the same for any number of processes. A ledger is JSON, a list of
events to which one is appended for every change, and is never changed in the past: what decides the samples before a
position has a fingerprint, which a checkpoint holds against the ledger it resumes with.

A change is pending (``at`` is null) until a run syncs, by starting, resuming or saving a checkpoint, and gives it the
position it is at. Then the pool is everything unseen plus the new, in a new order. A change with a
position of its own is planned, a stage of a curriculum.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Concatenate, NamedTuple, Self

from steel_megatron.data.indexed.dataset import IndexedCorpus
from steel_megatron.data.ledger.changes import OnDuplicate, add, fresh
from steel_megatron.data.ledger.corpora import Other, describe, dropped_bits, names_of, open_corpus, without_duplicates
from steel_megatron.data.ledger.history import FORMAT, Arguments, History
from steel_megatron.data.ledger.records import Corpus
from steel_megatron.data.sampling.packing import PackedEpoch
from steel_megatron.data.strict_json import from_json, to_json
from steel_megatron.errors import ConfigError, DataError
from steel_megatron.files import disk_errors, exclusive_lock, is_locked, with_suffix, write_atomically
from steel_megatron.log import get_logger

logger = get_logger(__name__)

LOCK_SECONDS = 300.0
"""How long to wait for somebody who changes a ledger; changes take no longer than a corpus takes to be opened."""
SYNC_SECONDS = 5.0
"""The same for a run that syncs before a checkpoint: it can sync again at the next, and may be about to be killed."""


class Read(NamedTuple):
    """A corpus of a ledger whose documents are, or may be, read."""

    number: int
    content: str
    samples: int | None
    """How many were read of one that is out; None for one that may be read on."""


@dataclass(frozen=True)
class PendingCorpora:
    """Corpora that were described, and perhaps compared, before they come into a ledger."""

    corpora: tuple[Corpus, ...]
    files: Mapping[str, bytes]
    """What is to be written of dropped documents, by name."""
    compared: tuple[Read, ...] | None
    """With what they were compared; None where they were not."""
    on_duplicate: OnDuplicate


@dataclass(frozen=True)
class Ledger:
    """A history, and the folder of its file: relative corpora start there, and files of dropped documents are there."""

    history: History
    folder: Path = field(default=Path(), compare=False)

    @classmethod
    def create(
        cls, prefixes: Sequence[str | Path], sequence_length: int, seed: int, folder: Path = Path(), **options: Any
    ) -> Self:
        """A new ledger of some corpora.

        Args:
            prefixes: the corpora, as paths without a suffix.
            sequence_length: tokens that a sample predicts, from 1 to 2**31.
            seed: seed of all orders, from 0 to 2**63 - 1.
            folder: the folder of the ledger's file.
            options: as for :meth:`append`.

        Raises:
            ConfigError: the length or the seed is out of range.
            DataError: a corpus cannot be used, or they do not fit together.
        """
        if not (1 <= sequence_length <= 2**31 and 0 <= seed < 2**63):
            raise ConfigError(
                f"sequence_length is {sequence_length} and seed {seed}; they must be from 1 to 2**31 and 0 to 2**63 - 1"
            )
        return cls(History(sequence_length, seed), folder).append(prefixes, **options)

    def then(
        self,
        change: Callable[Concatenate[History, Arguments], History],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> Self:
        """The ledger after a change of its history, one of :mod:`~steel_megatron.data.ledger.changes`."""
        return dataclasses.replace(self, history=change(self.history, *args, **kwargs))

    def append(
        self,
        prefixes: Sequence[str | Path],
        names: Sequence[str] | None = None,
        domain: str = "default",
        epochs: float | None = 1.0,
        at: int | None = None,
        on_duplicate: OnDuplicate = "stop",
        mixture: Mapping[str, float] | None = None,
        drop_duplicates: bool = False,
    ) -> Self:
        """Put corpora on disk into the pool. One without a manifest is read in full.

        Args:
            prefixes: paths without a suffix.
            names: by which commands call them; None for those of :func:`~steel_megatron.data.ledger.corpora.names_of`.
            domain: by which mixtures call all of them.
            epochs: how often each is read, 2.5 for twice and half of a third time; None for without end.
            at: the sample from which they are in; None for the next sync of the run.
            on_duplicate: what to do with a corpus that is in already, or was: ``stop`` or ``skip`` it.
            mixture: weights by domain from then on; None for as before. Needed where a mixture holds that does not name
                the new corpora's domains.
            drop_duplicates: whether to leave out documents that are exactly the same as others in the pool, or as
                earlier ones of the new corpora. Which ones is written beside the ledger at once.

        Raises:
            DataError: a corpus cannot be used or does not fit, or the disk refuses.
        """
        incoming = self.incoming(prefixes, names, domain, on_duplicate, drop_duplicates)
        return self.take_in(incoming, epochs, at, mixture)

    def incoming(
        self,
        prefixes: Sequence[str | Path],
        names: Sequence[str] | None = None,
        domain: str = "default",
        on_duplicate: OnDuplicate = "stop",
        drop_duplicates: bool = False,
    ) -> PendingCorpora:
        """The part of :meth:`append` that reads corpora, and may take long.

        Args:
            prefixes, names, domain, on_duplicate, drop_duplicates: as for :meth:`append`.

        Raises:
            DataError: a corpus cannot be used.
        """
        if names is not None and len(names) != len(prefixes):
            raise DataError(f"{len(names)} names ({', '.join(names)}) were given for {len(prefixes)} corpora")
        called = names if names is not None else names_of(prefixes)
        new = [describe(prefix, name, domain) for prefix, name in zip(prefixes, called, strict=True)]
        if not drop_duplicates:
            return PendingCorpora(tuple(new), {}, None, on_duplicate)
        compared = self._compared()
        others = [other for read in compared if (other := self._other(read)) is not None]
        reduced, files = without_duplicates(fresh(self.history, new, on_duplicate), others)
        return PendingCorpora(tuple(reduced), files, compared, on_duplicate)

    def _compared(self) -> tuple[Read, ...]:
        """What new documents are compared with: all that a run has read, or may still read."""
        history, in_use = self.history, set(self.history.in_use())
        cursors = history.schedule.cursors(history.last_synced_sample)
        return tuple(
            Read(number, history.corpora[number].content, None if number in in_use else int(cursors[number]))
            for number in sorted(history.used)
            if number in in_use or cursors[number]
        )

    def _other(self, read: Read) -> Other | None:
        """A corpus to compare with; None for one that is read no more, and gone."""
        record = self.history.corpora[read.number]
        try:
            corpus, dropped = open_corpus(record, self.folder), dropped_bits(record, self.folder)
        except DataError as error:
            if read.samples is None:
                raise
            logger.warning(
                f"{record.name} was removed, and documents are not compared with what was read of it: {error}"
            )
            return None
        if read.samples is not None and read.samples < self.history.samples(read.number):
            seen = self.packed(read.number, 0, corpus).documents_of(read.samples)
            dropped = ~seen if dropped is None else dropped | ~seen
        return Other(corpus, dropped, record.content if read.samples is None else None)

    def take_in(
        self,
        incoming: PendingCorpora,
        epochs: float | None = 1.0,
        at: int | None = None,
        mixture: Mapping[str, float] | None = None,
    ) -> Self:
        """The part of :meth:`append` that changes the ledger.

        Args:
            incoming: the corpora; must be :meth:`up_to_date`.
            epochs, at, mixture: as for :meth:`append`.

        Raises:
            DataError: a corpus does not fit, or the disk refuses.
        """
        assert self.up_to_date(incoming)
        appended = self.then(add, incoming.corpora, epochs, at, incoming.on_duplicate, mixture)
        for name, content in incoming.files.items():
            write_atomically(self.folder / name, content, DataError)
        return appended

    def up_to_date(self, incoming: PendingCorpora) -> bool:
        """Whether new corpora were compared with what the ledger reads now."""
        return incoming.compared is None or incoming.compared == self._compared()

    def check_began_with(self, prefixes: Sequence[str | Path]) -> None:
        """Raise a DataError unless corpora are those the ledger began with (removed ones aside) or took in since."""
        corpora = self.history.known()
        known = {os.path.abspath(self.folder / corpus.prefix): corpus for corpus in corpora}
        by_content = {corpus.content: corpus for corpus in corpora}
        found = set()
        for prefix in prefixes:
            corpus = known.get(os.path.abspath(prefix)) or by_content.get(describe(prefix).content)
            if corpus is None:
                raise DataError(
                    f"{prefix} is not in the ledger, which has {', '.join(known)}; add it with steel-megatron data "
                    "append, or take another ledger"
                )
            found.add(corpus.name)
        removed = {name for event in self.history.events for name in event.remove}
        first = [self.history.corpora[added.corpus] for event in self.history.events[:1] for added in event.add]
        missing = [corpus for corpus in first if corpus.name not in found and corpus.name not in removed]
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
            corpus: the corpus, from :class:`OpenCorpora`.
            cache: folder for where samples begin; None to keep that in memory.

        Raises:
            DataError: the file of dropped documents is damaged, or the cache cannot be written.
        """
        record = self.history.corpora[number]
        key = (self.history.seed, int(record.content[:16], 16), epoch)
        dropped = dropped_bits(record, self.folder)
        return PackedEpoch(corpus, self.history.sequence_length, key, dropped, cache, record.content)

    def save(self, path: str | Path) -> None:
        """Write the ledger, whole or not at all.

        Raises:
            DataError: the disk refuses.
        """
        write_atomically(path, dumps(self.history).encode(), DataError)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a ledger.

        Raises:
            DataError: it is not there, or damaged; the message names the field.
        """
        with disk_errors("read", Path(path), DataError):
            content = Path(path).read_bytes()
        return cls.parse(content, path)

    @classmethod
    def parse(cls, content: bytes, path: str | Path) -> Self:
        """The ledger that a file holds.

        Raises:
            DataError: it is damaged; the message names the field.
        """
        return cls(loads(content, str(path)), Path(path).parent)


class OpenCorpora:
    """The corpora of a ledger by number, held against what was recorded.

    Those that are read from the last sync on, or pending, are opened at once. One that was removed before may be gone;
    it is opened when somebody asks for it.

    Args:
        ledger: the ledger.
        vocab_size: every token id must be below it; None to leave ids unchecked.

    Raises:
        DataError: a corpus or a file of dropped documents is missing, damaged, or not what it was when it came in.
    """

    def __init__(self, ledger: Ledger, vocab_size: int | None = None) -> None:
        self._corpora, self._folder, self._vocab_size = ledger.history.corpora, ledger.folder, vocab_size
        self._opened: dict[int, IndexedCorpus] = {}
        for number in ledger.history.in_use():
            dropped_bits(self._corpora[number], ledger.folder)
            self[number]

    def __len__(self) -> int:
        return len(self._corpora)

    def __getitem__(self, number: int) -> IndexedCorpus:
        if number not in self._opened:
            self._opened[number] = open_corpus(self._corpora[number], self._folder, self._vocab_size)
        return self._opened[number]


def dumps(history: History) -> str:
    """A history as a ledger's JSON."""
    return json.dumps({"format": FORMAT, **to_json(history)}, indent=2, ensure_ascii=False) + "\n"


def loads(content: str | bytes, where: str) -> History:
    """A history out of a ledger's JSON.

    Args:
        content: the JSON.
        where: its file, for messages.

    Raises:
        DataError: a field is missing, unknown or wrong; the message names it.
    """
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"ledger {where} is not valid JSON: {error}") from error
    found = value.pop("format", None) if isinstance(value, dict) else value
    if found != FORMAT:
        raise DataError(f"{where} is no ledger of format {FORMAT!r} (its format is {str(found)[:80]!r})")
    if "reached" in value:
        value.setdefault("reserved", value["reached"])  # earlier versions did not write it
    return from_json(History, value, f"ledger {where}")


def run_is_live(path: Path) -> bool:
    """Whether a run is under way that reads by a ledger's file: the lock of its folder, or of the ledger, is held."""
    return is_locked(path.parent / "run") or is_locked(with_suffix(path, ".run"))


class Edit:
    """A ledger's file while it is changed: put the new ledger into ``ledger``."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger


@contextmanager
def edit(path: str | Path, new: Ledger | None = None, wait: float | None = None) -> Iterator[Edit]:
    """Change a ledger's file; nobody else can at the same time, and it is left as it was when the block raises.

    Args:
        path: the file.
        new: what to begin with where there is no file; None to insist on one.
        wait: seconds to wait for somebody else who changes it, at most; :data:`LOCK_SECONDS` if None.

    Raises:
        DataError: the file is missing or damaged, another job changes it all the time, or the disk refuses.
    """
    path = Path(path)
    with exclusive_lock(path, DataError, LOCK_SECONDS if wait is None else wait):
        begun = new if new is not None and not path.exists() else Ledger.load(path)
        changed = Edit(begun)
        yield changed
        if changed.ledger != begun or not path.exists():
            changed.ledger.save(path)
