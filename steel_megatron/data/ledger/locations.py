"""Where the corpora of a ledger lie: as recorded, or where they were moved to, found by their content."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from steel_megatron.data.indexed.dataset import content_hash, open_indexed, verify
from steel_megatron.data.indexed.format import IDX, MANIFEST
from steel_megatron.data.ledger.history import History
from steel_megatron.data.ledger.records import Corpus
from steel_megatron.errors import DataError
from steel_megatron.files import moved_with, with_suffix
from steel_megatron.log import get_logger

logger = get_logger(__name__)


def recorded(prefix: str | Path, folder: Path) -> str:
    """A prefix as a ledger records it: relative to the ledger's folder if it was given relative."""
    path = os.path.abspath(prefix)
    if os.path.isabs(prefix):
        return path
    relative = os.path.relpath(prefix, folder)
    # Behind a link, ".." leads elsewhere.
    same = os.path.realpath(folder / relative) == os.path.realpath(prefix)
    return relative if same else path


def place_of(record: Corpus, folder: Path) -> str:
    """Where a record says that its corpus lies, as a path without a suffix."""
    absolute = os.path.isabs(record.prefix)
    return record.prefix if absolute else os.path.realpath(folder / record.prefix)


def found(history: History, path: Path, named: Sequence[str] = ()) -> History:
    """A history whose records say where the corpora lie now.

    A corpus that is not where its record says is looked for where ``named`` says, in the folders of these, and around
    the ledger. It is taken if it has the recorded content.

    Args:
        history: the history.
        path: the ledger's file.
        named: prefixes of corpora that settings name.

    Raises:
        DataError: a corpus that is in use is not found; the message names what was found in its place.
    """
    in_use = set(history.in_use())

    def there(number: int, record: Corpus) -> Corpus:
        try:
            return _found(record, path, named)
        except DataError:
            if number in in_use:
                raise
            return record  # it is not read any more, and its files may be gone

    return _with_records(history, there)


def _found(record: Corpus, path: Path, named: Sequence[str]) -> Corpus:
    folder = path.parent
    own = place_of(record, folder)
    is_there = with_suffix(own, IDX).exists()
    if is_there and _content_in_manifest(own) in (None, record.content):
        return record
    last, others = Path(record.prefix).name, []
    for prefix in _places(record, folder, named):
        if os.path.realpath(prefix) == os.path.realpath(own) or not with_suffix(prefix, IDX).exists():
            continue
        content = _content(prefix, record)
        if content == record.content:
            logger.info(f"corpus {record.name} was moved: it is read from {prefix}, the ledger had {own}")
            return dataclasses.replace(record, prefix=recorded(prefix, folder))
        if Path(prefix).name == last:
            others.append(f"{prefix} is another corpus ({content}, recorded is {record.content})")
    if is_there:
        return record  # opening it says how it differs
    raise DataError(
        f"corpus {record.name} is not at {own}{''.join(f'; {other}' for other in others)}; name its new place in "
        f"data.train, or tell the ledger: steel-megatron data relocate {path} {own} NEW"
    )


def _places(record: Corpus, folder: Path, named: Sequence[str]) -> list[str]:
    """Where a corpus may lie now, in the order in which it is looked for."""
    last = Path(record.prefix).name
    around = [os.path.relpath(path) for path in moved_with(record.prefix, folder)]
    return list(dict.fromkeys([*named, *(str(Path(prefix).parent / last) for prefix in named), *around]))


def _content_in_manifest(prefix: str) -> str | None:
    """The content that a corpus' manifest records, as it stands; None where there is none."""
    try:
        content = json.loads(with_suffix(prefix, MANIFEST).read_bytes())["content"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return str(content)


def _content(prefix: str, record: Corpus) -> str:
    """The content of a corpus, or why it is not that of a record; one without a manifest is read if its counts fit."""
    try:
        corpus = open_indexed(prefix)
        if (corpus.documents, corpus.tokens) == (record.documents, record.tokens):
            return content_hash(corpus)
    except DataError as error:
        return f"damaged: {error}"
    if corpus.manifest is not None:
        return str(corpus.manifest["content"])
    return f"{corpus.documents:,} documents with {corpus.tokens:,} tokens"


def relocated(history: History, path: Path, old: str, new: str) -> History:
    """A history whose records begin with ``new`` where they began with ``old``. The corpora are read in full.

    Args:
        history: the history.
        path: the ledger's file.
        old: a prefix, or a folder of corpora, as the ledger has it or relative to the working directory.
        new: what it is to be.

    Raises:
        DataError: no record begins with ``old``, or a corpus in use is not at its new place with the recorded content.
    """
    folder, in_use, known = path.parent, set(history.in_use()), []

    def moved(number: int, record: Corpus) -> Corpus:
        known.append(place_of(record, folder))
        rest = _rest((record.prefix, known[-1]), old)
        if rest is None:
            return record
        prefix = os.path.join(new, rest) if rest else new
        if number not in in_use and not with_suffix(prefix, IDX).exists():
            logger.info(f"corpus {record.name} is not read any more and is not at {prefix}; its record stays")
            return record
        _check_content(record, prefix)
        return dataclasses.replace(record, prefix=recorded(prefix, folder))

    changed = _with_records(history, moved)
    if changed == history:
        raise DataError(f"no corpus of {path} is moved from {old} to {new}; it has {', '.join(known)}")
    return changed


def _rest(prefixes: Iterable[str], old: str) -> str | None:
    """What follows ``old`` in one of the prefixes, by whole names; None if none begins with it."""
    for begin in (os.path.normpath(old), os.path.abspath(old), os.path.realpath(old)):
        for prefix in prefixes:
            if prefix == begin or prefix.startswith(begin.rstrip("/") + "/"):
                return prefix[len(begin) :].lstrip("/")
    return None


def _check_content(record: Corpus, prefix: str) -> None:
    content = _content(prefix, record)
    if content != record.content:
        raise DataError(f"{prefix} is not corpus {record.name}: it is {content}, recorded is {record.content}")
    if with_suffix(prefix, MANIFEST).exists():
        verify(prefix)


def _with_records(history: History, change: Callable[[int, Corpus], Corpus]) -> History:
    """A history with other records of the corpora that its events add."""
    used = history.used
    records = (change(number, one) if number in used else one for number, one in enumerate(history.corpora))
    corpora = tuple(records)
    return history if corpora == history.corpora else dataclasses.replace(history, corpora=corpora)
