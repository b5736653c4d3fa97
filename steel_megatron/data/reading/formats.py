"""Files -> chunks of raw rows: streaming, in bounded memory, resumable from any chunk.

A row is one line of JSON lines, one element of a JSON array, one row of a parquet file, or the whole of a text or
source-code file. :func:`read_chunks` only cuts a file into pieces of about a megabyte, which is cheap;
:func:`parse_chunk` turns a piece into values, which is not, and can be done by another process.
"""

from __future__ import annotations

import bisect
import codecs
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import orjson

from steel_megatron.data.reading.compression import DAMAGE, decompressed, opened_at
from steel_megatron.data.reading.json_array import elements
from steel_megatron.errors import DataError

COMPRESSIONS = ("", ".gz", ".zst")
LINE_SUFFIXES = tuple(".jsonl" + packed for packed in COMPRESSIONS)
"""One JSON value per line."""
JSON_SUFFIXES = tuple(".json" + packed for packed in COMPRESSIONS)
"""One JSON array, or one value per line in spite of the name."""
PARQUET_SUFFIX = ".parquet"
CODE_SUFFIXES = (".py", ".cpp", ".cc", ".hpp", ".h", ".java")
"""Source code: one document per file."""
WHOLE_FILE_SUFFIXES = (".txt", *CODE_SUFFIXES)
"""Files that are one document each."""
KNOWN_SUFFIXES = (*LINE_SUFFIXES, *JSON_SUFFIXES, PARQUET_SUFFIX, *WHOLE_FILE_SUFFIXES)

CHUNK_BYTES = 1 << 20
_BYTE_ORDER_MARK = codecs.BOM_UTF8
WHOLE_FILE_BYTES = 1 << 30
"""The largest file that is one document. It is in memory several times over, while it is encoded."""
_PARQUET_BUFFER = 1 << 18
_PARQUET_ROWS = 256
"""Rows that are decoded at a time, at most: a table that repeats itself says little about how large they become."""
_TAIL = 1 << 16
"""Bytes before the end of a chunk in which the end of a line is looked for; and how many are looked through at once."""


@dataclass(frozen=True)
class FileOffset:
    """A position in a file from which reading can resume."""

    row: int = 0
    """Rows before it."""
    offset: int = 0
    """Bytes before it, decompressed; 0 for parquet."""


@dataclass(frozen=True)
class RawChunk:
    """Some rows of a file, not parsed yet."""

    path: str
    kind: Literal["lines", "arrow", "file"]
    """What ``payload`` is: JSON lines; an Arrow stream; a file's content."""
    payload: bytes
    rows: int
    """Rows in it; blank lines count."""
    first_row: int
    """Number of its first row in the file, from 1."""
    first_offset: int
    """Bytes of the file before it, decompressed; 0 for parquet."""
    end: FileOffset
    """Where the next chunk begins."""


class BadRow(Exception):
    """A row that cannot be a document; the message is the reason, ``offset`` the byte within the row."""

    def __init__(self, reason: str, offset: int = 0) -> None:
        super().__init__(reason)
        self.offset = offset


def has_keys(path: Path) -> bool:
    """Whether the file's rows are objects, so that a text is picked from them by its key."""
    return not path.name.endswith(WHOLE_FILE_SUFFIXES)


def check_size(path: Path, size: int) -> None:
    """Raise a DataError when a file that is one document has more bytes than a document may."""
    if path.name.endswith(WHOLE_FILE_SUFFIXES) and size > WHOLE_FILE_BYTES:
        raise DataError(
            f"{path} has {size:,} bytes; a file of its kind is one document, of at most {WHOLE_FILE_BYTES:,}: cut it, "
            "or make a .jsonl file with a row for each document of it"
        )


def read_chunks(
    path: Path | str,
    start: FileOffset = FileOffset(),
    chunk_bytes: int = CHUNK_BYTES,
    columns: Sequence[str] | None = None,
    on_bytes: Callable[[int], None] | None = None,
) -> Iterator[RawChunk]:
    """Cut a file into chunks of at least one row and about ``chunk_bytes``.

    Where a chunk ends depends on where it begins and on the file alone: reading that resumes at the ``end`` of a
    chunk gives the same chunks as reading on would have.

    Args:
        path: a file of a known format.
        start: where to begin; the ``end`` of an earlier chunk.
        chunk_bytes: how much is read at a time; a longer row is a chunk of its own.
        columns: the columns that are needed of a parquet file; None for all.
        on_bytes: called with the number of further bytes of the file (as stored, so compressed ones) that were read.

    Raises:
        DataError: the file cannot be read, is truncated or damaged, or has none of the columns.
    """
    path = Path(path)
    done = start.row
    try:
        with path.open("rb") as raw:
            progress = _ReadProgress(raw, on_bytes)
            for chunk in _chunks(path, raw, start, chunk_bytes, columns, progress):
                progress()
                done = chunk.end.row
                yield chunk
            progress.rest()
    except DAMAGE as error:
        raise DataError(f"{path} is truncated or damaged after row {done}: {error}") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


class _ReadProgress:
    """Reports how far a file has been read."""

    def __init__(self, raw: BinaryIO, on_bytes: Callable[[int], None] | None) -> None:
        self._raw, self._on_bytes, self._reported = raw, on_bytes, 0

    def __call__(self, position: int | None = None) -> None:
        position = self._raw.tell() if position is None else position
        if self._on_bytes is not None and position > self._reported:
            self._on_bytes(position - self._reported)
            self._reported = position

    def rest(self) -> None:
        self(self._raw.seek(0, 2))


def _chunks(
    path: Path,
    raw: BinaryIO,
    start: FileOffset,
    chunk_bytes: int,
    columns: Sequence[str] | None,
    progress: _ReadProgress,
) -> Iterator[RawChunk]:
    if path.name.endswith(WHOLE_FILE_SUFFIXES):
        if start.row == 0:
            check_size(path, os.fstat(raw.fileno()).st_size)
            yield RawChunk(str(path), "file", raw.read(), 1, 1, 0, FileOffset(1))
    elif path.name.endswith(PARQUET_SUFFIX):
        yield from _parquet_chunks(path, raw, start, chunk_bytes, columns, progress)
    elif path.name.endswith(JSON_SUFFIXES) and _is_array(path, raw):
        yield from _array_chunks(path, raw, start, chunk_bytes)
    else:
        yield from _line_chunks(path, raw, start, chunk_bytes)


def _is_array(path: Path, raw: BinaryIO) -> bool:
    """Whether a ``.json`` file is one array: its first visible byte decides."""
    stream, head = decompressed(path, raw), b""
    while not head.strip() and (block := stream.read(4096)):
        head = (head + block).removeprefix(_BYTE_ORDER_MARK)
    return head.lstrip()[:1] == b"["


def _line_chunks(path: Path, raw: BinaryIO, start: FileOffset, chunk_bytes: int) -> Iterator[RawChunk]:
    """Whole lines: up to the last line end within ``chunk_bytes``, or the first one after it."""
    stream = opened_at(path, raw, start.offset)
    buffer = bytearray()

    def chunk(payload: bytes) -> RawChunk:
        nonlocal start
        rows = _count_line_ends(payload) + (payload[-1:] != b"\n")
        begin, start = start, FileOffset(start.row + rows, start.offset + len(payload))
        return RawChunk(str(path), "lines", payload, rows, begin.row + 1, begin.offset, start)

    while True:
        if stream is raw:
            if size := _whole_lines(raw, start.offset, chunk_bytes):
                yield chunk(raw.read(size))
                continue
            buffer.clear()  # the file stands where the last chunk ended
        while len(buffer) < chunk_bytes and (block := stream.read(chunk_bytes - len(buffer))):
            buffer += block
        cut = len(buffer) if len(buffer) < chunk_bytes else buffer.rfind(b"\n", 0, chunk_bytes) + 1
        searched = chunk_bytes
        while cut == 0 and buffer:  # a line longer than a chunk
            cut = buffer.find(b"\n", searched) + 1
            searched = max(searched, len(buffer))
            if cut == 0:
                block = stream.read(chunk_bytes)
                buffer += block
                cut = 0 if block else len(buffer)
        if cut == 0:
            return
        payload = bytes(memoryview(buffer)[:cut])
        del buffer[:cut]
        yield chunk(payload)


def _count_line_ends(content: bytes) -> int:
    """``content.count(b"\\n")``, four times as fast."""
    values = np.frombuffer(content, dtype=np.uint8)
    return sum(int(np.count_nonzero(values[at : at + _TAIL] == ord("\n"))) for at in range(0, len(values), _TAIL))


def _whole_lines(raw: BinaryIO, offset: int, chunk_bytes: int) -> int:
    """Bytes of the lines from an offset on that end within ``chunk_bytes``; the file stands at the offset afterwards.

    0 where none ends shortly before, or the file does. Who knows where to stop reads into place, and copies nothing.
    """
    tail = min(_TAIL, chunk_bytes)
    raw.seek(offset + chunk_bytes - tail)
    found = raw.read(tail)
    raw.seek(offset)
    return chunk_bytes - tail + found.rfind(b"\n") + 1 if len(found) == tail and b"\n" in found else 0


def _array_chunks(path: Path, raw: BinaryIO, start: FileOffset, chunk_bytes: int) -> Iterator[RawChunk]:
    """The elements of one JSON array as JSON lines, with blanks between them so that offsets are the file's."""
    payload, rows, first_offset = bytearray(), 0, start.offset

    def chunk(end_offset: int) -> RawChunk:
        end = FileOffset(start.row + rows, end_offset)
        return RawChunk(str(path), "lines", bytes(payload), rows, start.row + 1, first_offset, end)

    for offset, element in elements(path, opened_at(path, raw, start.offset), start.row, start.offset, chunk_bytes):
        if payload:
            payload += b" " * (offset - first_offset - len(payload) - 1) + b"\n"
        if len(payload) >= chunk_bytes:
            yield (done := chunk(offset))
            start, rows = done.end, 0
            payload.clear()
        if not payload:
            first_offset = offset
        payload += element
        rows += 1
    if rows:
        yield chunk(first_offset + len(payload))


def _parquet_chunks(
    path: Path,
    raw: BinaryIO,
    start: FileOffset,
    chunk_bytes: int,
    columns: Sequence[str] | None,
    progress: _ReadProgress,
) -> Iterator[RawChunk]:
    """Batches of rows, row group by row group, as Arrow streams."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise DataError(
            f"reading {path} needs pyarrow, which is not installed: pip install 'steel-megatron[data]'"
        ) from None
    try:
        # With a buffer, a row group is read as it is decoded; without, whole.
        file = parquet.ParquetFile(raw, pre_buffer=False, buffer_size=_PARQUET_BUFFER)
        names = file.schema_arrow.names
        wanted = None if columns is None else [name for name in columns if name in names]
        if columns and not wanted:
            raise DataError(f"{path} has no column {' or '.join(map(repr, columns))}; it has {', '.join(names)}")
        first = 0
        for group in range(file.num_row_groups):
            facts = file.metadata.row_group(group)
            rows_at_once = max(1, min(_PARQUET_ROWS, chunk_bytes * facts.num_rows // max(1, facts.total_byte_size)))
            if first + facts.num_rows <= start.row:
                first += facts.num_rows
                continue
            for batch in file.iter_batches(rows_at_once, row_groups=[group], columns=wanted):
                batch, first = _plain(batch.slice(max(0, start.row - first))), first + batch.num_rows
                while batch.num_rows:
                    taken = _rows_within(batch, chunk_bytes)
                    sink = pyarrow.BufferOutputStream()
                    with pyarrow.ipc.new_stream(sink, batch.schema) as writer:
                        writer.write_batch(batch.slice(0, taken))
                    end, payload = FileOffset(start.row + taken), sink.getvalue().to_pybytes()
                    yield RawChunk(str(path), "arrow", payload, taken, start.row + 1, 0, end)
                    progress()
                    start, batch = end, batch.slice(taken)
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the file system, not of the format
            raise
        raise DataError(f"{path} is truncated or damaged after row {start.row}: {error}") from error


def _plain(batch: Any) -> Any:
    """A batch with its values themselves where it has numbers of values that all its parts would have to carry."""
    columns = [column.dictionary_decode() if hasattr(column, "dictionary") else column for column in batch.columns]
    return type(batch).from_arrays(columns, batch.schema.names)


def _rows_within(batch: Any, size: int) -> int:
    """How many of the first rows have no more bytes together, in memory; one in any case."""
    rows: int = batch.num_rows
    if batch.nbytes <= size:
        return rows
    return max(1, bisect.bisect_right(range(1, rows), size, key=lambda count: batch.slice(0, count).nbytes))


def parse_chunk(chunk: RawChunk) -> Iterator[tuple[int, int, bytes, object]]:
    """The rows of a chunk: (row from 1, byte offset, the row as stored if it is a line, its value).

    The value is what the JSON says (an object: a dictionary, whose strings may hold lone surrogates), a dictionary for
    a parquet row, a string for a whole file, or a :class:`BadRow`.
    Blank lines are left out; a byte order mark, CRLF line ends and a missing last newline are fine.
    """
    if chunk.kind == "file":
        yield 1, 0, chunk.payload, _text_of_file(chunk.payload)
    elif chunk.kind == "arrow":
        import pyarrow

        table = pyarrow.ipc.open_stream(chunk.payload).read_all()
        try:
            values = table.to_pylist()
        except ValueError:  # a value that Python cannot hold; the other rows can be read all the same
            values = [_value_of_arrow(table.slice(index, 1)) for index in range(table.num_rows)]
        for row, value in enumerate(values, start=chunk.first_row):
            yield row, 0, b"", value
    else:
        loads, offset = orjson.loads, chunk.first_offset
        for row, line in enumerate(chunk.payload.split(b"\n"), start=chunk.first_row):
            begin, offset = offset, offset + len(line) + 1
            if row == 1 and line.startswith(_BYTE_ORDER_MARK):
                line, begin = line[len(_BYTE_ORDER_MARK) :], begin + len(_BYTE_ORDER_MARK)
            try:
                yield row, begin, line, loads(line)
            except orjson.JSONDecodeError:
                if line.strip():
                    yield row, begin, line, _second_look(line.rstrip(b"\r"))


def _value_of_arrow(row: Any) -> object:
    try:
        return row.to_pylist()[0]
    except ValueError as error:
        return BadRow(f"not valid UTF-8 or out of range ({error})")


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


def _text_of_file(content: bytes) -> object:
    """The text of a whole file; its line ends become ``\\n``."""
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        return BadRow(f"not valid UTF-8 (byte 0x{error.object[error.start]:02x}: {error.reason})", error.start)
