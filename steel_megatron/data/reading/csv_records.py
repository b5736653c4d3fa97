"""CSV and TSV files -> chunks of records."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator, Mapping, Sequence

from steel_megatron.data.reading import chunks
from steel_megatron.data.reading.chunks import BYTE_ORDER_MARK, BadRow, FileOffset, RawChunk
from steel_megatron.data.reading.compression import Content, Damaged
from steel_megatron.data.reading.tables import Cell, MadeRow, made_chunks, wanted_columns
from steel_megatron.errors import DataError

_DELIMITERS = ",;\t|"
_BLOCK = 1 << 16


def csv_chunks(
    path: str, content: Content, start: FileOffset, chunk_bytes: int, columns: Sequence[str] | None
) -> Iterator[RawChunk]:
    """The records of a CSV file, under the names in its first line.

    What separates fields is the one of comma, semicolon, tab and bar that the first line has most of. A record that
    has more or fewer fields than there are names, or quotes that RFC 4180 does not know, is a bad row. Blank lines are
    no records.

    Args:
        path: the file, for messages.
        content: its decompressed content.
        start: where to begin; the ``end`` of an earlier chunk.
        chunk_bytes: about as many bytes are in a chunk; a longer row is one of its own.
        columns: the columns that are needed; None for all.

    Raises:
        Damaged: the file ends within quotes.
        DataError: it has none of the columns, or two of one name, or a record is too long.
    """
    first = content.peek(_BLOCK).partition(b"\n")[0].decode(errors="replace")
    delimiter = max(_DELIMITERS, key=first.count)
    lines = _Lines(path, content)
    header = next(csv.reader(lines, delimiter=delimiter, strict=True), [])
    wanted = wanted_columns(path, header, columns) if header else []
    if start.offset:
        lines.move_to(start.offset)
    yield from made_chunks(path, _records(lines, delimiter, header, wanted, start.row), start, chunk_bytes)


def _records(
    lines: _Lines, delimiter: str, header: Sequence[str], wanted: Sequence[str] | None, row: int
) -> Iterator[MadeRow]:
    csv.field_size_limit(sys.maxsize)  # of the module, for all; here records have a limit of their own
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        lines.begin_record(row + 1)
        made: Mapping[str, Cell] | BadRow
        try:
            fields = next(reader, None)
        except csv.Error as error:
            if lines.ended:
                raise Damaged(f"the file ends within the quotes of the record at byte {lines.begin}") from error
            made = BadRow(f"broken CSV ({error})")
        else:
            if fields is None:
                return
            if not fields:
                continue
            made = {name: value for name, value in zip(header, fields, strict=False) if not wanted or name in wanted}
            if len(fields) != len(header):
                made = BadRow(f"{len(fields)} fields where the first line names {len(header)}")
        row += 1
        yield made, FileOffset(row, lines.offset)


class _Lines(Iterator[str]):
    """The lines of a file, with how many bytes they have; bytes that are no UTF-8 are lone surrogates."""

    def __init__(self, path: str, content: Content) -> None:
        self._path, self._content, self._buffer = path, content, bytearray()
        self.offset = 0
        """Bytes of the lines so far."""
        self.ended = False
        """Whether there are no more."""
        self.begin_record(1)

    def begin_record(self, row: int) -> None:
        """The next line is the first of a record; a byte order mark there is none of its text."""
        self.row, self.begin = row, self.offset
        while not self.ended and len(self._buffer) < len(BYTE_ORDER_MARK):
            self._fill()
        if self._buffer.startswith(BYTE_ORDER_MARK):
            self._take(len(BYTE_ORDER_MARK))

    def move_to(self, offset: int) -> None:
        """Go on at a byte of the file that is not before the next line."""
        if self._content.file is not None:
            self._content.move_to(offset)
            self._buffer.clear()
            self.offset, self.ended = offset, False
            return
        while self.offset < offset:
            if not self._buffer:
                self._fill()
            if self.ended:
                raise Damaged("the file is shorter than it was")
            self._take(min(offset - self.offset, len(self._buffer)))

    def __next__(self) -> str:
        searched = 0
        while (size := self._buffer.find(b"\n", searched) + 1) == 0 and not self.ended:
            searched = len(self._buffer)
            if self.offset + searched - self.begin > chunks.LONGEST_ROW:
                raise DataError(
                    f"{self._path}, record {self.row}, byte {self.begin}: the record has more than "
                    f"{chunks.LONGEST_ROW:,} bytes, or its quotes are never closed; repair it"
                )
            self._fill()
        if size == 0 and not self._buffer:
            raise StopIteration
        return self._take(size or len(self._buffer)).decode("utf-8", "surrogateescape")

    def _fill(self) -> None:
        block = self._content.read(_BLOCK)
        self._buffer += block
        self.ended = not block

    def _take(self, size: int) -> bytes:
        taken = bytes(memoryview(self._buffer)[:size])
        del self._buffer[:size]
        self.offset += size
        return taken
