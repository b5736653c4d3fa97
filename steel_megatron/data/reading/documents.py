"""Raw corpora of every format -> a stream of :class:`Document`.

:mod:`~steel_megatron.data.reading.formats` knows files and rows; a :class:`Source` knows what the rows of one corpus
mean. What cannot be read as text is either an error that names the file, the row and the byte, or is skipped and
reported with its reason; nothing disappears silently.
"""

from __future__ import annotations

import itertools
import json
import operator
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from steel_megatron.config import BadRowPolicy
from steel_megatron.data.native import helpers
from steel_megatron.data.reading.chunks import BadRow, NoDocument, RawChunk
from steel_megatron.data.reading.formats import parse_chunk, read_chunks
from steel_megatron.data.reading.sources import Dialogue, Source, get_source
from steel_megatron.data.reading.text_batch import TextBatch
from steel_megatron.errors import DataError

Made = TypeVar("Made")

_FIRST_ROWS = 100
"""Rows whose columns are looked at."""
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

    def document(value: object) -> tuple[str, bool] | None:
        text: object = value if chunk.kind in ("file", "html") else source.text_of(value)
        dialogue = isinstance(text, Dialogue)
        if isinstance(text, Dialogue):
            text = text.text
        assert isinstance(text, str), type(text)
        check_unicode(text)
        return (text, dialogue) if text and not text.isspace() else None

    for row, (text, dialogue) in converted(chunk, document, on_bad_row, on_skip):
        yield Document(text, chunk.path, row, dialogue)


def converted(
    chunk: RawChunk,
    convert: Callable[[object], Made | None],
    on_bad_row: BadRowPolicy = "stop",
    on_skip: Callable[[SkippedRow], None] | None = None,
) -> Iterator[tuple[int, Made]]:
    """The rows of one chunk, from 1 in the file, and what is made of them.

    Args:
        chunk: the chunk.
        convert: makes something of a row's value; None for an empty row, a BadRow for one that cannot be used.
        on_bad_row: what to do with a bad row, as for :func:`read_documents`.
        on_skip: called with each row that is left out.

    Raises:
        DataError: a bad row under ``stop``; the message names file, row and byte offset.
    """
    for row, offset, raw, value in parse_chunk(chunk):
        try:
            if isinstance(value, BadRow):
                raise value
            made = convert(value)
        except BadRow as problem:
            at = offset + problem.offset
            if on_bad_row == "stop" and not isinstance(problem, NoDocument):
                where = f"row {row}" if chunk.kind == "arrow" else f"row {row}, byte {at}"
                raise DataError(
                    f"{chunk.path}, {where}: {problem}; repair the row, or skip such rows with on_bad_row = skip"
                ) from None
            reason = str(problem)
        else:
            if made is not None:
                yield row, made
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


def _beginning(raw: bytes, value: object) -> str:
    if not raw and isinstance(value, dict):  # a row of a table
        return json.dumps(value, ensure_ascii=False, default=str)[:_QUARANTINED]
    return raw[: 4 * _QUARANTINED].decode(errors="replace")[:_QUARANTINED]


def check_unicode(text: str) -> None:
    """Raise a BadRow if a text holds a lone surrogate."""
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
        path: a file of a known form, an address, or ``-``.
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


def unused_columns(path: Path | str, source: Source) -> list[str]:
    """The columns of the first rows of a file that its source does not read; none where nothing can be told."""
    found: dict[str, None] = {}
    with suppress(DataError):
        for chunk in itertools.islice(read_chunks(path, peek=True), 1):
            for _, _, _, value in itertools.islice(parse_chunk(chunk), _FIRST_ROWS):
                if isinstance(value, dict):
                    with suppress(BadRow):
                        found |= dict.fromkeys(source.unused(value))
    return list(found)
