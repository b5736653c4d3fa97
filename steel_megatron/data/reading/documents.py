"""Raw corpora of every format -> a stream of :class:`Document`.

:mod:`~steel_megatron.data.reading.formats` knows files and rows; a :class:`Source` knows what the rows of one corpus
mean. What cannot be read as text is either an error that names the file, the row and the byte, or is skipped and
reported with its reason; nothing disappears silently.
"""

from __future__ import annotations

import glob
import itertools
import json
import operator
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from steel_megatron.config import BadRowPolicy
from steel_megatron.data.native import helpers
from steel_megatron.data.reading.formats import (
    CODE_SUFFIXES,
    KNOWN_SUFFIXES,
    BadRow,
    RawChunk,
    has_keys,
    parse_chunk,
    read_chunks,
)
from steel_megatron.data.reading.sources import SOURCES, Dialogue, Source, get_source
from steel_megatron.data.reading.text_batch import TextBatch
from steel_megatron.errors import DataError
from steel_megatron.jobs.folder import is_job
from steel_megatron.log import get_logger

__all__ = [
    "CODE_SUFFIXES",
    "Document",
    "Input",
    "SkippedRow",
    "documents_of",
    "expand_inputs",
    "get_source",
    "has_keys",
    "parse_inputs",
    "plain_texts",
    "read_documents",
    "text_batches",
]

_log = get_logger(__name__)

_SKIPPED_FOLDERS = ("__pycache__",)
_QUARANTINED = 2000
"""Characters of a row that are kept to show what was skipped."""


@dataclass(frozen=True)
class Document:
    """One text and where it came from."""

    text: str
    """The text; valid Unicode, not empty."""
    source: str
    """Path of the file."""
    row: int
    """Row in the file, counted from 1."""
    dialogue: bool = False
    """Whether the text is in the dialogue template, whose marks are control tokens."""


@dataclass(frozen=True)
class SkippedRow:
    """A row that gave no document."""

    source: str
    """Path of the file."""
    row: int
    """Row in the file, counted from 1."""
    reason: str
    """Why it was left out; ``empty`` for a text without any visible character."""
    offset: int = 0
    """Byte of the (decompressed) file at which it begins, or at which it is broken; 0 for parquet."""
    raw: str = ""
    """How the row begins, as it is stored."""


@dataclass(frozen=True)
class Input:
    """A file to read, and as what."""

    path: Path
    source: str
    """Name of a source."""


def parse_inputs(inputs: Sequence[str], own: Callable[[Path], bool] | None = None) -> list[Input]:
    """Turn files, folders and glob patterns, each alone or as ``SOURCE=PATTERN``, into a list of files.

    The order is that of ``inputs``, and within a folder or a pattern sorted by path, so it does not depend on the
    file system. A file that is named twice, in whichever way, is read once, under its first name. Folders are
    searched through all levels for files of a known format; hidden files, ``__pycache__`` and the folders of unfinished
    jobs are left out, and links to folders are not followed.

    Args:
        inputs: paths or patterns (``*``, ``?``, ``[...]``, and ``**`` for any depth); without a source's name, rows
            are read by their text key.
        own: whether the caller itself writes a file; such files are left out of folders and patterns.

    Raises:
        DataError: an input matches nothing, a file is of no known format or named with two sources, or one that the
            caller itself writes, or there is no such source.
    """
    if isinstance(inputs, str):
        raise DataError(f"the inputs are one string, {inputs!r}, where a list is expected: [{inputs}]")
    files: dict[tuple[int, ...] | str, Input] = {}
    for given in inputs:
        name, pattern = "text", given
        if "=" in given and not os.path.exists(given):
            name, pattern = given.split("=", 1)
            if name not in SOURCES:
                raise DataError(f"input {given!r}: there is no source {name!r}; known are {', '.join(SOURCES)}")
        for path in _not_own(_matching(pattern, given), pattern, own):
            first = files.setdefault(_identity(path), Input(path, name))
            if first.source != name:
                raise DataError(f"{path} is named as {first.source} and as {name}; a file has one source")
            if first.path != path:
                _log.info(f"{path} is {first.path}, which is read already")
    if not files:
        raise DataError("no input was given; name at least one file, folder or pattern")
    return [*files.values()]


def _identity(path: Path) -> tuple[int, ...] | str:
    """The same for all names of a file."""
    try:
        found = path.stat()
    except OSError:  # reported when it is read
        return os.path.realpath(path)
    # Some network file systems number their files carelessly: not by the number alone.
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _not_own(paths: Sequence[Path], pattern: str, own: Callable[[Path], bool] | None) -> Iterator[Path]:
    """Files without those that the job itself writes."""
    for path in paths:
        if own is None or not own(path):
            yield path
        elif os.path.isfile(pattern):
            raise DataError(f"{path} is a file that this very job writes; name other inputs, or another output")
        else:
            _log.info(f"{path} is left out of the inputs: this very job writes it")


def _without_unfinished(paths: Iterable[Path]) -> Iterator[Path]:
    """Files without those in the folder of an unfinished job: what is there is the input of that job once more."""
    left_out: set[Path] = set()
    for path in paths:
        found = next((folder for folder in path.parents if folder.name.endswith(".partial") and is_job(folder)), None)
        if found is None:
            yield path
        elif found not in left_out:
            left_out.add(found)
            _log.info(f"{found} is left out of the inputs: an unfinished job works there")


def expand_inputs(inputs: Sequence[str]) -> list[Path]:
    """The files of :func:`parse_inputs`, where their sources do not matter."""
    return [found.path for found in parse_inputs(inputs)]


def _matching(pattern: str, given: str) -> list[Path]:
    searched = not os.path.exists(pattern)
    matches = sorted(glob.glob(pattern, recursive=True)) if searched else [pattern]
    found: list[Path] = []
    for match in map(Path, matches):
        if match.is_dir():
            found.extend(_files_below(match))
        elif not match.name.endswith(KNOWN_SUFFIXES):
            raise DataError(f"{match} is of no known format; a file name must end in {', '.join(KNOWN_SUFFIXES)}")
        else:
            found.append(match)
    if searched or os.path.isdir(pattern):
        found = list(_without_unfinished(found))
    if not found:
        what = f"holds no file that ends in {', '.join(KNOWN_SUFFIXES)}" if matches else "matches no file"
        raise DataError(f"input {given!r} {what}")
    return found


def _files_below(folder: Path) -> list[Path]:
    def refuse(error: OSError) -> None:
        raise DataError(f"cannot read folder {error.filename}: {error.strerror}") from error

    found = []
    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in _SKIPPED_FOLDERS]
        found += [Path(parent, name) for name in names if name.endswith(KNOWN_SUFFIXES) and name[0] != "."]
    return sorted(found)


def documents_of(
    chunk: RawChunk,
    source: Source,
    on_bad_row: BadRowPolicy = "stop",
    on_skip: Callable[[SkippedRow], None] | None = None,
) -> Iterator[Document]:
    """The documents of one chunk.

    Args:
        chunk: the chunk.
        source: what its rows mean.
        on_bad_row: what to do with a bad row, as for :func:`read_documents`.
        on_skip: called with each row that is left out.

    Raises:
        DataError: a bad row under ``stop``; the message names file, row and byte offset.
    """
    for row, offset, raw, value in parse_chunk(chunk):
        dialogue = False
        try:
            text: object = value if isinstance(value, (str, BadRow)) and chunk.kind == "file" else _read(source, value)
            if isinstance(text, BadRow):
                raise text
            if isinstance(text, Dialogue):
                text, dialogue = text.text, True
            assert isinstance(text, str), type(text)
            _check_unicode(text)
        except BadRow as problem:
            at = offset + problem.offset
            if on_bad_row == "stop":
                where = f"row {row}" if chunk.kind == "arrow" else f"row {row}, byte {at}"
                raise DataError(
                    f"{chunk.path}, {where}: {problem}; repair the row, or skip such rows with on_bad_row = skip"
                ) from None
            reason = str(problem)
        else:
            if text and not text.isspace():
                yield Document(text, chunk.path, row, dialogue)
                continue
            reason, at = "empty", offset
        if on_skip is not None:
            on_skip(SkippedRow(chunk.path, row, reason, at, _beginning(raw, value)))


class PlainTexts(NamedTuple):
    """What :func:`plain_texts` read of a chunk."""

    texts: TextBatch
    """The texts that are certain."""
    rows: np.ndarray
    """Their rows in the file, from 1, int64 [texts]."""
    left: list[tuple[int, int, int]]
    """Row, begin and end in the chunk of each line that is left to a parser."""


def plain_texts(chunk: RawChunk, source: Source) -> PlainTexts | None:
    """The texts of a chunk of JSON lines, as far as their rows are plain, which most are.

    What is left is of rows that are bad or empty or not so plain that a glance can tell what a parser would say. None
    where much is left, where the source makes more of a row than the string under a key, and where the package was
    built without its helpers.
    """
    plain = source.plain_key()
    if helpers is None or plain is None or chunk.kind != "lines":
        return None
    key, *others = (name.encode(errors="surrogatepass") for name in (plain[0], *plain[1]))
    found = helpers.texts_of_lines(chunk.payload, chunk.first_row, key, others)
    return None if found is None else PlainTexts(TextBatch(*found[:2]), *found[2:])


def text_batches(
    chunk: RawChunk,
    source: Source,
    on_bad_row: BadRowPolicy = "stop",
    on_skip: Callable[[SkippedRow], None] | None = None,
) -> Iterator[tuple[TextBatch, np.ndarray, bool]]:
    """What :func:`documents_of` gives, several documents together.

    Args:
        chunk: the chunk.
        source: what its rows mean.
        on_bad_row: what to do with a bad row, as for :func:`read_documents`.
        on_skip: called with each row that is left out.

    Yields:
        texts, their rows in the file, from 1, int64 [texts], and whether they are dialogues.

    Raises:
        DataError: a bad row under ``stop``; the message names file, row and byte offset.
    """
    plain = plain_texts(chunk, source)
    if plain is None:
        found = documents_of(chunk, source, on_bad_row, on_skip)
        for dialogue, group in itertools.groupby(found, operator.attrgetter("dialogue")):
            documents = list(group)
            rows = np.array([document.row for document in documents], dtype=np.int64)
            yield TextBatch.of([document.text for document in documents]), rows, dialogue
        return
    texts, rows, left = plain
    done = 0
    for row, begin, end in left:
        before = int(np.searchsorted(rows, row))
        if before > done:
            yield texts.part(done, before), rows[done:before], False
        done = before
        line = replace(
            chunk, payload=chunk.payload[begin:end], rows=1, first_row=row, first_offset=chunk.first_offset + begin
        )
        for document in documents_of(line, source, on_bad_row, on_skip):
            yield TextBatch.of([document.text]), np.array([row]), document.dialogue
    if done < len(texts):
        yield texts.part(done, len(texts)), rows[done:], False


def _read(source: Source, value: object) -> object:
    if isinstance(value, BadRow):
        return value
    if not isinstance(value, dict):
        return BadRow(f"a JSON {type(value).__name__} where an object was expected")
    return source.text(value)


def _beginning(raw: bytes, value: object) -> str:
    if not raw and isinstance(value, dict):  # a row of a table
        return json.dumps(value, ensure_ascii=False, default=str)[:_QUARANTINED]
    return raw[: 4 * _QUARANTINED].decode(errors="replace")[:_QUARANTINED]


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"the text holds a lone surrogate (U+{ord(text[error.start]):04X})") from None


def read_documents(
    path: Path | str,
    text_key: str = "text",
    on_bad_row: BadRowPolicy = "stop",
    on_skip: Callable[[SkippedRow], None] | None = None,
    on_bytes: Callable[[int], None] | None = None,
    source: str = "text",
) -> Iterator[Document]:
    """Read one file as a stream of documents, in the memory of one chunk.

    Blank lines are no rows of their own (they count in the numbering); a byte order mark, CRLF line ends and a
    missing last newline are fine. An empty text is skipped under both policies.

    Args:
        path: a file of a known format.
        text_key: which value of a row is the text, for the source ``text``.
        on_bad_row: what to do with a row that is no text: broken JSON, no object, the key missing, its value null
            or no string, invalid UTF-8, lone surrogates. ``stop`` raises; ``skip`` reports and continues.
        on_skip: called with each row that is left out.
        on_bytes: called with the number of further bytes of the file (as stored, so compressed ones) that were read.
        source: name of the source.

    Raises:
        DataError: a bad row under ``stop`` (with file, row and byte offset), a file that cannot be read, or one that
            is truncated or damaged beyond single rows (under both policies: what is lost is not known).
    """
    reader = get_source(source, text_key)
    for chunk in read_chunks(path, columns=reader.columns, on_bytes=on_bytes):
        yield from documents_of(chunk, reader, on_bad_row, on_skip)
