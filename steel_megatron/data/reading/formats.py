"""Files of every form -> chunks of raw rows: streaming, in bounded memory, resumable from any chunk.

A row is one line of JSON lines, one element of a JSON array, one record of a table or an archive, or the whole of a
text or source-code file. :func:`read_chunks` only cuts a file into pieces of about a megabyte, which is cheap;
:func:`parse_chunk` turns a piece into values, which is not, and can be done by another process.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import orjson

from steel_megatron.data.reading import chunks
from steel_megatron.data.reading.archives import tar_chunks, warc_chunks
from steel_megatron.data.reading.chunks import (
    BEGIN,
    BYTE_ORDER_MARK,
    CHUNK_BYTES,
    BadRow,
    FileOffset,
    RawChunk,
    too_long,
)
from steel_megatron.data.reading.compression import Content, Damaged
from steel_megatron.data.reading.csv_records import csv_chunks
from steel_megatron.data.reading.forms import JSON, Form, compression_of, form_of
from steel_megatron.data.reading.html import decoded_page, page_text
from steel_megatron.data.reading.lines import array_chunks, is_array, line_chunks
from steel_megatron.data.reading.storage import StoredFile, open_input
from steel_megatron.data.reading.tables import arrow_chunks, parquet_chunks, values_of
from steel_megatron.errors import DataError


def check_size(path: str, size: int) -> None:
    """Raise a DataError when a file that is one document has more bytes than a document may."""
    form = form_of(path)
    if form is not None and form.kind in ("file", "html") and size > chunks.LONGEST_ROW:
        raise DataError(
            f"{path} has {size:,} bytes; a file of its kind is one document, of at most {chunks.LONGEST_ROW:,}: cut "
            "it, or make a .jsonl file with a row for each document of it"
        )


def read_chunks(
    path: Path | str,
    start: FileOffset = BEGIN,
    chunk_bytes: int = CHUNK_BYTES,
    columns: Sequence[str] | None = None,
    on_bytes: Callable[[int], None] | None = None,
    peek: bool = False,
) -> Iterator[RawChunk]:
    """Cut a file into chunks of at least one row and about ``chunk_bytes``.

    Where a chunk ends depends on where it begins and on the file alone: reading that resumes at the ``end`` of a
    chunk gives the same chunks as reading on would have.

    Args:
        path: a file of a known form, a remote address, or a stream (``-`` for standard input), which is JSON if its
            name does not say otherwise.
        start: where to begin; the ``end`` of an earlier chunk.
        chunk_bytes: how much is read at a time; a longer row is a chunk of its own.
        columns: the columns that are needed of a table; None for all.
        on_bytes: called with the number of further bytes of the file (as stored, so compressed ones) that were read.
        peek: of a stream, read only the beginning, and leave it to be read again.

    Raises:
        DataError: the file cannot be read, is truncated or damaged, or has none of the columns.
    """
    path = str(path)
    done = start.row
    try:
        with closing(open_input(path, peek)) as file:
            reported = 0
            for chunk in _chunks(path, form_of(path) or JSON, file, start, chunk_bytes, columns):
                if on_bytes is not None and (position := file.tell()) > reported:
                    on_bytes(position - reported)
                    reported = position
                done = chunk.end.row
                yield chunk
            if on_bytes is not None and (size := max(file.size, file.tell())) > reported:
                on_bytes(size - reported)
    except Damaged as error:
        raise DataError(f"{path} is truncated or damaged after row {done}: {error}") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def _chunks(
    path: str, form: Form, file: StoredFile, start: FileOffset, chunk_bytes: int, columns: Sequence[str] | None
) -> Iterator[RawChunk]:
    if form.kind in ("parquet", "arrow"):
        if not file.seekable:
            raise DataError(
                f"{path} is a stream, and a {form.kind} file is read from its end: store it in a file first"
            )
        yield from (parquet_chunks if form.kind == "parquet" else arrow_chunks)(
            path, file.raw, start, chunk_bytes, columns
        )
        return
    content = Content(file.raw, compression_of(path) if form_of(path) else None, file.local)
    if form.kind in ("file", "html"):
        if start.row == 0:
            yield _whole(path, form, content)
    elif form.kind == "csv":
        yield from csv_chunks(path, content, start, chunk_bytes, columns)
    elif form.kind == "tar":
        yield from tar_chunks(path, content, start, chunk_bytes, columns)
    elif form.kind == "warc":
        yield from warc_chunks(path, content, start, chunk_bytes)
    elif form.kind == "json" and is_array(content):
        yield from array_chunks(path, content, start, chunk_bytes)
    else:
        yield from line_chunks(path, content, start, chunk_bytes)


def _whole(path: str, form: Form, content: Content) -> RawChunk:
    """A file that is one document."""
    parts = []
    while content.offset <= chunks.LONGEST_ROW and (block := content.read(1 << 24)):
        parts.append(block)
    check_size(path, content.offset)
    return RawChunk(path, "html" if form.kind == "html" else "file", b"".join(parts), 1, 1, 0, FileOffset(1))


def parse_chunk(chunk: RawChunk) -> Iterator[tuple[int, int, bytes, object]]:
    """The rows of a chunk: (row from 1, byte offset, the row as stored if it is a line, its value).

    The value is what the JSON says (an object: a dictionary, whose strings may hold lone surrogates), a dictionary for
    a row of a table or an archive, a string for a whole file, or a :class:`BadRow`.
    Blank lines are left out; byte order marks at the beginning of lines, CRLF line ends and a missing last newline are
    fine.
    """
    if chunk.kind in ("file", "html"):
        yield 1, 0, chunk.payload, _text_of_file(chunk)
    elif chunk.kind == "long":
        yield (
            chunk.first_row,
            chunk.first_offset,
            chunk.payload,
            BadRow(too_long(chunk.end.offset - chunk.first_offset)),
        )
    elif chunk.kind == "arrow":
        for row, value in enumerate(values_of(chunk.payload), start=chunk.first_row):
            yield row, 0, b"", value
    else:
        loads, offset = orjson.loads, chunk.first_offset
        for row, line in enumerate(chunk.payload.split(b"\n"), start=chunk.first_row):
            begin, offset = offset, offset + len(line) + 1
            if line.startswith(BYTE_ORDER_MARK):  # also in the middle, where files were put together
                line, begin = line[len(BYTE_ORDER_MARK) :], begin + len(BYTE_ORDER_MARK)
            try:
                yield row, begin, line, loads(line)
            except orjson.JSONDecodeError:
                if line.strip():
                    yield row, begin, line, _second_look(line.rstrip(b"\r"))


def _second_look(line: bytes) -> object:
    """What Python's own parser says of a line that the fast one refuses: it explains, and takes more."""
    try:
        decoded = line.decode()
    except UnicodeDecodeError as error:
        return BadRow(f"not valid UTF-8 (byte 0x{line[error.start]:02x}: {error.reason})", error.start)
    try:
        return json.loads(decoded)
    except json.JSONDecodeError as error:
        return BadRow(f"broken JSON ({error.msg})", len(decoded[: error.pos].encode()))
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits; brackets nested as deep
        return BadRow(f"JSON beyond any use ({error})")


def _text_of_file(chunk: RawChunk) -> object:
    """The text of a whole file; its line ends become ``\\n``."""
    try:
        if chunk.kind == "html":
            return page_text(decoded_page(chunk.payload))
        return chunk.payload.decode("utf-8-sig").replace("\r\n", "\n")
    except BadRow as problem:
        return problem
    except UnicodeDecodeError as error:
        return BadRow(f"not valid UTF-8 (byte 0x{error.object[error.start]:02x}: {error.reason})", error.start)
