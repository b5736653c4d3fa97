"""Tables (parquet, Arrow) and rows that are made one by one -> chunks that are Arrow streams."""

from __future__ import annotations

import bisect
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import orjson

from steel_megatron.data.reading.chunks import BadRow, FileOffset, NoDocument, RawChunk
from steel_megatron.data.reading.compression import Damaged
from steel_megatron.data.reading.html import crawled_row
from steel_megatron.errors import DataError

_PARQUET_BUFFER = 1 << 18
_ROWS = 256
"""Rows that are decoded at a time, at most: a table that repeats itself says little about how large they become."""
_FILE_MAGIC = b"ARROW1"
_STREAM_END = b"\xff\xff\xff\xff\x00\x00\x00\x00"
BAD, JSON, CRAWLED = b"bad", b"json", b"crawled"
"""In the metadata of a chunk's schema, in JSON: why rows are bad, and whether that is no fault, by their number in the
chunk; the columns that hold JSON; whether the rows are of a crawl."""
_ROW_BYTES = 64
"""What a row counts for in addition to its values."""


def parquet_chunks(
    path: str, raw: Any, start: FileOffset, chunk_bytes: int, columns: Sequence[str] | None
) -> Iterator[RawChunk]:
    """Batches of rows, row group by row group.

    Args:
        path: the file, for messages.
        raw: the file, open for reading, which can seek.
        start: where to begin; the ``end`` of an earlier chunk.
        chunk_bytes: about as many bytes are in a chunk; a longer row is one of its own.
        columns: the columns that are needed; None for all.
    """
    from pyarrow import parquet

    def batches() -> Iterator[tuple[int, Any]]:
        # With a buffer, a row group is read as it is decoded; without, whole.
        file = parquet.ParquetFile(raw, pre_buffer=False, buffer_size=_PARQUET_BUFFER)
        wanted = wanted_columns(path, file.schema_arrow.names, columns)
        first = 0
        for group in range(file.num_row_groups):
            facts = file.metadata.row_group(group)
            rows_at_once = max(1, min(_ROWS, chunk_bytes * facts.num_rows // max(1, facts.total_byte_size)))
            if first + facts.num_rows <= start.row:
                first += facts.num_rows
                continue
            for batch in file.iter_batches(rows_at_once, row_groups=[group], columns=wanted):
                yield first, batch
                first += batch.num_rows

    yield from _batch_chunks(path, batches(), start, chunk_bytes)


def arrow_chunks(
    path: str, raw: Any, start: FileOffset, chunk_bytes: int, columns: Sequence[str] | None
) -> Iterator[RawChunk]:
    """The batches of an Arrow file or stream, as ``datasets`` and others save them.

    Args:
        path: the file, for messages.
        raw: the file, open for reading, which can seek.
        start: where to begin; the ``end`` of an earlier chunk.
        chunk_bytes: about as many bytes are in a chunk; a longer row is one of its own.
        columns: the columns that are needed; None for all.
    """
    import pyarrow

    def batches() -> Iterator[tuple[int, Any]]:
        in_file = raw.read(len(_FILE_MAGIC)) == _FILE_MAGIC
        if not in_file:  # whoever wrote all of a stream closed it: else an end at a batch's end would not be seen
            raw.seek(-min(len(_STREAM_END), raw.seek(0, 2)), 2)
            if not raw.read().endswith(_STREAM_END[4:]):
                raise Damaged("the Arrow stream has no end")
        raw.seek(0)
        reader = pyarrow.ipc.open_file(raw) if in_file else pyarrow.ipc.open_stream(raw)
        wanted = wanted_columns(path, reader.schema.names, columns)
        first = 0
        for batch in map(reader.get_batch, range(reader.num_record_batches)) if in_file else reader:
            if first + batch.num_rows > start.row:
                yield first, batch if wanted is None else batch.select(wanted)
            first += batch.num_rows

    yield from _batch_chunks(path, batches(), start, chunk_bytes)


def wanted_columns(path: str, names: Sequence[str], columns: Sequence[str] | None) -> list[str] | None:
    """The columns of a table that are needed, in its order; None for all.

    Args:
        path: the table.
        names: its columns.
        columns: what sources need: a column, or, behind a dot or a bracket, what is in its values. None for all.

    Raises:
        DataError: it has none of them, or two of one name.
    """
    wanted = [name for name in names if columns is None or any(holds(name, column) for column in columns)]
    if columns and not wanted:
        raise DataError(f"{path} has no column {' or '.join(map(repr, columns))}; it has {', '.join(names)}")
    twice = next((name for name in wanted if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{path} has two columns of the name {twice!r}; rename one, as nobody can tell which is meant")
    return None if columns is None else wanted


def holds(name: str, column: str) -> bool:
    """Whether a column is the one that is named, or has it in its values: ``data`` holds ``data.text``."""
    return name == column or column.startswith((f"{name}.", f"{name}["))


def _batch_chunks(
    path: str, batches: Iterator[tuple[int, Any]], start: FileOffset, chunk_bytes: int
) -> Iterator[RawChunk]:
    """Batches, each with the number of rows before it, in pieces of about a size."""
    import pyarrow

    try:
        for first, batch in batches:
            batch = _plain(batch.slice(max(0, start.row - first)))
            while batch.num_rows:
                taken = _rows_within(batch, chunk_bytes)
                end = FileOffset(start.row + taken)
                yield RawChunk(path, "arrow", _stream_of(batch.slice(0, taken)), taken, start.row + 1, 0, end)
                start, batch = end, batch.slice(taken)
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the file system, not of the format
            raise
        raise Damaged(str(error)) from error


def _stream_of(batch: Any) -> bytes:
    import pyarrow

    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    found: bytes = sink.getvalue().to_pybytes()
    return found


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


Cell = str | bytes | None
MadeRow = tuple[Mapping[str, Cell] | BadRow, FileOffset]
"""A row, or why there is none, and where the next one begins."""


def made_chunks(
    path: str,
    rows: Iterable[MadeRow],
    start: FileOffset,
    chunk_bytes: int,
    json_columns: tuple[str, ...] = (),
    crawled: bool = False,
) -> Iterator[RawChunk]:
    """Chunks of rows that are made one by one.

    Args:
        path: the file.
        rows: the rows, from ``start`` on.
        start: where they begin.
        chunk_bytes: a chunk ends behind the row with which it has as many.
        json_columns: ends of the names of columns whose values are JSON.
        crawled: whether they are of a crawl, and may be HTML.
    """
    import pyarrow

    held: list[Mapping[str, Cell]] = []
    bad: dict[int, tuple[str, bool]] = {}
    size = 0

    def chunk(end: FileOffset) -> RawChunk:
        kind, names = pyarrow.large_binary(), list(dict.fromkeys(name for row in held for name in row)) or ["-"]
        arrays = [pyarrow.array([_bytes(row.get(name)) for row in held], kind) for name in names]
        parsed = [name for name in names if json_columns and name.endswith(json_columns)]
        about = {BAD: json.dumps(bad), JSON: json.dumps(parsed), CRAWLED: json.dumps(crawled)}
        schema = pyarrow.schema([(name, kind) for name in names], metadata=about)
        payload = _stream_of(pyarrow.RecordBatch.from_arrays(arrays, schema=schema))
        return RawChunk(path, "arrow", payload, end.row - start.row, start.row + 1, 0, end)

    for row, end in rows:
        if isinstance(row, BadRow):
            bad[len(held)] = str(row), isinstance(row, NoDocument)
            row = {}
        held.append(row)
        size += sum(len(value) for value in row.values() if value is not None) + _ROW_BYTES
        if size >= chunk_bytes:
            yield chunk(end)
            held, bad, size, start = [], {}, 0, end
    if held:
        yield chunk(end)


def _bytes(value: Cell) -> bytes | None:
    return value.encode("utf-8", "surrogateescape") if isinstance(value, str) else value


def values_of(payload: bytes) -> Iterator[object]:
    """The values of the rows of a chunk: dictionaries, or :class:`BadRow`.

    Binary values are strings where they are UTF-8, and otherwise stay bytes.
    """
    import pyarrow

    table = pyarrow.ipc.open_stream(payload).read_all()
    about = table.schema.metadata or {}
    bad = json.loads(about.get(BAD, b"{}"))
    parsed, crawled = json.loads(about.get(JSON, b"[]")), about.get(CRAWLED) == b"true"
    binary = any("binary" in str(kind) for kind in table.schema.types)
    fixed = [field.name for field in table.schema if pyarrow.types.is_fixed_size_binary(field.type)]
    try:
        values = table.to_pylist()
    except ValueError:  # a value that Python cannot hold; the other rows can be read all the same
        values = [_value_of(table.slice(index, 1)) for index in range(table.num_rows)]
    for number, value in enumerate(values):
        if str(number) in bad:
            reason, fine = bad[str(number)]
            yield NoDocument(reason) if fine else BadRow(reason)
        elif isinstance(value, dict):
            for name in fixed:
                value[name] = value[name] and value[name].rstrip(b"\0")  # what it is filled up with
            try:
                found = _decoded(value if not crawled else crawled_row(value)) if binary else value
                yield found if not parsed else _parsed(found, parsed)
            except BadRow as problem:
                yield problem
        else:
            yield value


def _value_of(row: Any) -> object:
    try:
        return row.to_pylist()[0]
    except ValueError as error:
        return BadRow(f"not valid UTF-8 or out of range ({error})")


def _decoded(value: Any) -> Any:
    """A value with strings in place of bytes that are UTF-8."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value
    if isinstance(value, dict):
        return {name: _decoded(inner) for name, inner in value.items()}
    return [_decoded(inner) for inner in value] if isinstance(value, list) else value


def _parsed(row: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """A row with what the JSON in some of its columns says.

    Raises:
        BadRow: it is broken.
    """
    for name in names:
        if row[name] is not None:
            try:
                row[name] = orjson.loads(row[name])
            except orjson.JSONDecodeError as error:
                raise BadRow(f"broken JSON under {name!r} ({error.msg})") from None
    return row
