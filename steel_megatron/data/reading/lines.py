"""JSON lines and JSON arrays -> chunks of whole rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from steel_megatron.data.reading import chunks
from steel_megatron.data.reading.chunks import BYTE_ORDER_MARK, FileOffset, RawChunk
from steel_megatron.data.reading.compression import Content
from steel_megatron.data.reading.json_array import elements

_TAIL = 1 << 16
"""Bytes before the end of a chunk in which the end of a line is looked for; and how many are looked through at once."""
_SHOWN = 1 << 13
"""Bytes of a row that is too long, to show how it begins."""


def is_array(content: Content) -> bool:
    """Whether content that is about to be read is one array: its first visible byte decides."""
    size, head = 0, b""
    while not head and size == len(content.peek(size)):
        size += 4096
        head = content.peek(size).removeprefix(BYTE_ORDER_MARK).lstrip()
    return head[:1] == b"["


def line_chunks(path: str, content: Content, start: FileOffset, chunk_bytes: int) -> Iterator[RawChunk]:
    """Whole lines: up to the last line end within ``chunk_bytes``, or the first one after it.

    Args:
        path: the file, for messages.
        content: its decompressed content.
        start: where to begin; the ``end`` of an earlier chunk.
        chunk_bytes: about as many bytes are in a chunk; a longer row is one of its own.
    """
    content.move_to(start.offset)
    buffer = bytearray()

    def chunk(payload: bytes, size: int | None = None) -> RawChunk:
        nonlocal start
        rows = 1 if size is not None else _count_line_ends(payload) + (payload[-1:] != b"\n")
        offset = start.offset + (len(payload) if size is None else size)
        begin, start = start, FileOffset(start.row + rows, offset)
        kind: Any = "lines" if size is None else "long"
        return RawChunk(path, kind, payload, rows, begin.row + 1, begin.offset, start)

    while True:
        if content.file is not None:
            if size := _whole_lines(content.file, start.offset, chunk_bytes):
                yield chunk(content.file.read(size))
                continue
            buffer.clear()  # the file stands where the last chunk ended
            content.move_to(start.offset)
        while len(buffer) < chunk_bytes and (block := content.read(chunk_bytes - len(buffer))):
            buffer += block
        cut = len(buffer) if len(buffer) < chunk_bytes else buffer.rfind(b"\n", 0, chunk_bytes) + 1
        if cut == 0 and buffer:  # a line longer than a chunk
            cut, size = _long_line(content, buffer, chunk_bytes, start.offset)
            if size > chunks.LONGEST_ROW:
                yield chunk(bytes(buffer[:_SHOWN]), size)
                del buffer[:cut]
                continue
        if cut == 0:
            return
        payload = bytes(memoryview(buffer)[:cut])
        del buffer[:cut]
        yield chunk(payload)


def _long_line(content: Content, buffer: bytearray, chunk_bytes: int, offset: int) -> tuple[int, int]:
    """Read on to the end of the line that a buffer begins with.

    The buffer does not come to hold more than a row may have and a chunk; of a file that can seek, and a row that is
    too long, no more than it has.

    Args:
        content: what follows the buffer.
        buffer: the line's beginning; more than a chunk of it.
        chunk_bytes: how much is read at a time.
        offset: of the line, in the content.

    Returns:
        bytes of the buffer that belong to the line, and bytes of the line.
    """
    if content.file is not None and (size := _line_size(content.file, offset)) > chunks.LONGEST_ROW:
        return len(buffer), size
    if content.file is not None:
        content.move_to(offset + len(buffer))
    searched, dropped = chunk_bytes, 0
    while (cut := buffer.find(b"\n", searched) + 1) == 0:
        if len(buffer) + dropped > chunks.LONGEST_ROW:  # only its beginning and its size are wanted
            dropped += max(0, len(buffer) - _SHOWN)
            del buffer[_SHOWN:]
        searched = len(buffer)
        if not (block := content.read(chunk_bytes)):
            cut = len(buffer)
            break
        buffer += block
    return cut, dropped + cut


def _line_size(raw: Any, offset: int) -> int:
    """Bytes of the line that begins at an offset, without keeping it."""
    raw.seek(offset)
    size = 0
    while block := raw.read(1 << 20):
        if (found := block.find(b"\n")) >= 0:
            return size + found + 1
        size += len(block)
    return size


def _count_line_ends(content: bytes) -> int:
    """``content.count(b"\\n")``, four times as fast."""
    values = np.frombuffer(content, dtype=np.uint8)
    return sum(int(np.count_nonzero(values[at : at + _TAIL] == ord("\n"))) for at in range(0, len(values), _TAIL))


def _whole_lines(raw: Any, offset: int, chunk_bytes: int) -> int:
    """Bytes of the lines from an offset on that end within ``chunk_bytes``; the file stands at the offset afterwards.

    0 where none ends shortly before, or the file does. Who knows where to stop reads into place, and copies nothing.
    """
    tail = min(_TAIL, chunk_bytes)
    raw.seek(offset + chunk_bytes - tail)
    found = raw.read(tail)
    raw.seek(offset)
    return chunk_bytes - tail + found.rfind(b"\n") + 1 if len(found) == tail and b"\n" in found else 0


def array_chunks(path: str, content: Content, start: FileOffset, chunk_bytes: int) -> Iterator[RawChunk]:
    """The elements of one JSON array as JSON lines, with blanks between them so that offsets are the file's.

    Args:
        path: the file, for messages.
        content: its decompressed content.
        start: where to begin; the ``end`` of an earlier chunk.
        chunk_bytes: about as many bytes are in a chunk; a longer row is one of its own.
    """
    content.move_to(start.offset)
    payload, rows, first_offset = bytearray(), 0, start.offset

    def chunk(end_offset: int) -> RawChunk:
        end = FileOffset(start.row + rows, end_offset)
        return RawChunk(path, "lines", bytes(payload), rows, start.row + 1, first_offset, end)

    for offset, element in elements(path, content, start.row, start.offset, chunk_bytes):
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
