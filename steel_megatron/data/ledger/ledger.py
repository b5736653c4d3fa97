"""The ledger of a run: which corpora it reads, from which sample on, how often and in which mixture.

The position of a run is (ledger, consumed samples) and nothing else: the two determine which sample comes at which
position (:mod:`~steel_megatron.data.ledger.schedule`), for any number of processes. A ledger is a JSON list of events.
Every change appends one, and the past never changes: what decides the samples before a position has a fingerprint,
which is recorded in checkpoints and compared on resume.

A change is pending (``at`` is null) until a run syncs, by starting, resuming or saving a checkpoint; it then takes
effect at that sample. From there, all unseen samples, old and new, are mixed in a new order. A change with a sample of
its own is planned, as a phase of a curriculum.
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
from steel_megatron.data.indexed.format import IDX
from steel_megatron.data.indexed.labels import open_labels
from steel_megatron.data.ledger.changes import OnDuplicate, add, new_corpora
from steel_megatron.data.ledger.corpora import (
    ReferenceCorpus,
    describe,
    dropped_bits,
    names_of,
    open_corpus,
    without_duplicates,
)
from steel_megatron.data.ledger.history import FORMAT, Arguments, History
from steel_megatron.data.ledger.locations import place_of
from steel_megatron.data.ledger.records import Corpus
from steel_megatron.data.sampling.packing import PackedEpoch
from steel_megatron.data.sampling.whole import WholeEpoch
from steel_megatron.data.strict_json import from_json, to_json
from steel_megatron.errors import ConfigError, DataError
from steel_megatron.files import disk_errors, exclusive_lock, is_locked, with_suffix, write_atomically
from steel_megatron.log import get_logger

logger = get_logger(__name__)

LOCK_SECONDS = 300.0
"""How long to wait for another process that changes a ledger, which takes no longer than to open a corpus."""
SYNC_SECONDS = 5.0
"""The same for a run that syncs before a checkpoint: it may be about to be killed, and the next sync is as good."""


class ComparedCorpus(NamedTuple):
    """What a comparison with a corpus of a ledger depends on."""

    number: int
    content: str
    samples: int | None
    """How many were read before it was removed; None if it may still be read."""


@dataclass(frozen=True)
class PendingCorpora:
    """Corpora that were described, and perhaps compared, before they are added to a ledger."""

    corpora: tuple[Corpus, ...]
    files: Mapping[str, bytes]
    """The files of dropped documents, by name."""
    compared: tuple[ComparedCorpus, ...] | None
    """What they were compared with; None if they were not."""
    on_duplicate: OnDuplicate


@dataclass(frozen=True)
class Ledger:
    """A history and the folder of its file, in which relative prefixes start and the files of dropped documents are."""

    history: History
    folder: Path = field(default=Path(), compare=False)

    @classmethod
    def create(
        cls, prefixes: Sequence[str | Path], sequence_length: int, seed: int, folder: Path = Path(), **options: Any
    ) -> Self:
        """A new ledger that begins with some corpora.

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
        """Add corpora on disk. One without a manifest is read in full.

        Args:
            prefixes: paths without a suffix.
            names: their names in commands; None for those of :func:`~steel_megatron.data.ledger.corpora.names_of`.
            domain: the domain of all of them.
            epochs, at, on_duplicate, mixture: as for :func:`~steel_megatron.data.ledger.changes.add`.
            drop_duplicates: whether to drop documents that exactly equal one that was or may still be read, or an
                earlier one of the new corpora. A file next to the ledger says which; it is written at once.

        Raises:
            DataError: a corpus cannot be used or does not fit, or the disk refuses.
        """
        pending = self.prepare(prefixes, names, domain, on_duplicate, drop_duplicates)
        return self.append_prepared(pending, epochs, at, mixture)

    def prepare(
        self,
        prefixes: Sequence[str | Path],
        names: Sequence[str] | None = None,
        domain: str = "default",
        on_duplicate: OnDuplicate = "stop",
        drop_duplicates: bool = False,
    ) -> PendingCorpora:
        """The part of :meth:`append` that reads corpora, which may take long.

        Args:
            prefixes, names, domain, on_duplicate, drop_duplicates: as for :meth:`append`.

        Raises:
            DataError: a corpus cannot be used.
        """
        if names is not None and len(names) != len(prefixes):
            raise DataError(f"{len(names)} names ({', '.join(names)}) were given for {len(prefixes)} corpora")
        called = names if names is not None else names_of(prefixes)
        length = self.history.sequence_length
        new = [
            describe(prefix, name, domain, self.folder, length) for prefix, name in zip(prefixes, called, strict=True)
        ]
        if not drop_duplicates:
            return PendingCorpora(tuple(new), {}, None, on_duplicate)
        compared = self._compared()
        references = [found for corpus in compared if (found := self._reference(corpus)) is not None]
        fresh = new_corpora(self.history, new, on_duplicate)
        reduced, files = without_duplicates(fresh, references, self.folder, length)
        return PendingCorpora(tuple(reduced), files, compared, on_duplicate)

    def _compared(self) -> tuple[ComparedCorpus, ...]:
        """What new documents are compared with: everything that a run has read or may still read."""
        history, in_use = self.history, set(self.history.in_use())
        consumed = history.schedule.consumed(history.last_synced_sample)
        return tuple(
            ComparedCorpus(number, history.corpora[number].content, None if number in in_use else int(consumed[number]))
            for number in sorted(history.used)
            if number in in_use or consumed[number]
        )

    def _reference(self, compared: ComparedCorpus) -> ReferenceCorpus | None:
        """Open a corpus to compare with; None if it was removed and its files are gone."""
        record = self.history.corpora[compared.number]
        try:
            corpus, ignored = open_corpus(record, self.folder), dropped_bits(record, self.folder)
        except DataError as error:
            if compared.samples is None:
                raise
            logger.warning(f"{record.name} was removed; documents are not compared with what was read of it: {error}")
            return None
        if compared.samples is not None and compared.samples < self.history.samples(compared.number):
            unread = ~self.packed(compared.number, 0, corpus).documents_of(compared.samples)
            ignored = unread if ignored is None else ignored | unread
        return ReferenceCorpus(corpus, ignored, record.content if compared.samples is None else None)

    def append_prepared(
        self,
        pending: PendingCorpora,
        epochs: float | None = 1.0,
        at: int | None = None,
        mixture: Mapping[str, float] | None = None,
    ) -> Self:
        """The part of :meth:`append` that changes the ledger.

        Args:
            pending: the corpora; must be :meth:`up_to_date`.
            epochs, at, mixture: as for :meth:`append`.

        Raises:
            DataError: a corpus does not fit, or the disk refuses.
        """
        assert self.up_to_date(pending)
        appended = self.then(add, pending.corpora, epochs, at, pending.on_duplicate, mixture)
        for name, content in pending.files.items():
            write_atomically(self.folder / name, content, DataError)
        return appended

    def up_to_date(self, pending: PendingCorpora) -> bool:
        """Whether new corpora were compared with what the ledger reads now."""
        return pending.compared is None or pending.compared == self._compared()

    def check_began_with(self, prefixes: Sequence[str | Path]) -> None:
        """Raise a DataError unless corpora are in the ledger and include all that it began with and still has."""
        corpora = self.history.known()
        known = {place_of(corpus, self.folder): corpus for corpus in corpora}
        by_content = {corpus.content: corpus for corpus in corpora}
        found = set()
        for prefix in prefixes:
            corpus = known.get(os.path.abspath(prefix)) or known.get(os.path.realpath(prefix))
            corpus = corpus or self._moved_away(prefix) or by_content.get(describe(prefix).content)
            if corpus is None:
                raise DataError(
                    f"{prefix} is not in the ledger, which has {', '.join(known)}; add it with steel-megatron data "
                    "append, or use another ledger"
                )
            found.add(corpus.name)
        removed = {name for event in self.history.events for name in event.remove}
        first = [self.history.corpora[added.corpus] for event in self.history.events[:1] for added in event.add]
        missing = [corpus for corpus in first if corpus.name not in found and corpus.name not in removed]
        if missing:
            raise DataError(
                f"the ledger began with {missing[0].name} ({missing[0].prefix}), which is not among "
                f"{', '.join(map(str, prefixes))}; name it, or remove it with steel-megatron data remove"
            )

    def _moved_away(self, prefix: str | Path) -> Corpus | None:
        """The corpus that lay at a prefix where nothing is any more, by the last part of its path."""
        alike = [one for one in self.history.known() if Path(one.prefix).name == Path(prefix).name]
        if with_suffix(prefix, IDX).exists() or len(alike) != 1:
            return None
        logger.info(f"{prefix} is not there; the ledger has {alike[0].name} at {place_of(alike[0], self.folder)}")
        return alike[0]

    def packed(
        self, number: int, epoch: int, corpus: IndexedCorpus, cache: Path | None = None
    ) -> PackedEpoch | WholeEpoch:
        """The samples of one epoch of a corpus.

        Args:
            number: the corpus' number in the ledger.
            epoch: number of the epoch, from 0.
            corpus: the corpus, from :class:`OpenCorpora`.
            cache: folder for the index of samples; None to keep it in memory.

        Raises:
            DataError: the file of dropped documents is damaged, or the cache cannot be written.
        """
        record = self.history.corpora[number]
        key = (self.history.seed, int(record.content[:16], 16), epoch)
        dropped = dropped_bits(record, self.folder)
        if record.labels is not None:
            return WholeEpoch(corpus, open_labels(corpus), self.history.sequence_length, key, dropped)
        return PackedEpoch(corpus, self.history.sequence_length, key, dropped, cache, record.content)

    def save(self, path: str | Path) -> None:
        """Write the ledger atomically.

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
    """The corpora of a ledger by number, compared with their records when they are opened.

    Those that are read from the last sync on, or pending, are opened at once. The files of corpora that were removed
    before may be gone; such a corpus is opened on demand.

    Args:
        ledger: the ledger.
        vocab_size: every token id must be below it; None to leave ids unchecked.

    Raises:
        DataError: a corpus or a file of dropped documents is missing or damaged, or has changed since it was added.
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
    """Whether a live run reads by a ledger's file: the lock of its folder, or of the ledger, is held."""
    return is_locked(path.parent / "run") or is_locked(with_suffix(path, ".run"))


@dataclass
class Edit:
    """A ledger's file while it is changed: assign the new ledger to ``ledger``."""

    ledger: Ledger


@contextmanager
def edit(path: str | Path, new: Ledger | None = None, wait: float | None = None) -> Iterator[Edit]:
    """Change a ledger's file under its lock; it stays as it was if the block raises.

    Args:
        path: the file.
        new: the ledger to begin with if there is no file; None to require one.
        wait: seconds to wait for another process that changes it, at most; :data:`LOCK_SECONDS` if None.

    Raises:
        DataError: the file is missing or damaged, another job keeps the lock, or the disk refuses.
    """
    path = Path(path)
    with exclusive_lock(path, DataError, LOCK_SECONDS if wait is None else wait):
        before = new if new is not None and not path.exists() else Ledger.load(path)
        file = Edit(before)
        yield file
        if file.ledger != before or not path.exists():
            file.ledger.save(path)
