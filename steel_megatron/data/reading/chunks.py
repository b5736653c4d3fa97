"""Chunks: some rows of a file, not parsed yet, as they go from the one that reads to those that parse."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

CHUNK_BYTES = 1 << 20
LONGEST_ROW = 1 << 30
"""Bytes of the longest row, or file that is one document. It is in memory several times over, while it is encoded."""
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class FileOffset:
    """A position in a file from which reading can resume."""

    row: int = 0
    """Rows before it."""
    offset: int = 0
    """Bytes before it, decompressed; 0 for a table that is read by the number of its rows."""


BEGIN = FileOffset()


@dataclass(frozen=True)
class RawChunk:
    """Some rows of a file, not parsed yet."""

    path: str
    kind: Literal["lines", "arrow", "file", "html", "long"]
    """What ``payload`` is: JSON lines; an Arrow stream; a file's content, as text or as HTML; the beginning of a row
    that is too long."""
    payload: bytes
    rows: int
    """Rows in it; blank lines count."""
    first_row: int
    """Number of its first row in the file, from 1."""
    first_offset: int
    """Bytes of the file before it, decompressed; 0 for tables and archives."""
    end: FileOffset
    """Where the next chunk begins."""


class BadRow(Exception):
    """A row that cannot be a document; the message is the reason, ``offset`` the byte within the row."""

    def __init__(self, reason: str, offset: int = 0) -> None:
        super().__init__(reason)
        self.offset = offset


class NoDocument(BadRow):
    """A row that is not broken and yet no document, such as an image in a crawl: it is skipped under any policy."""


def too_long(size: int) -> str:
    """What is said of a row of so many bytes."""
    return f"a row of {size:,} bytes; the longest that is read has {LONGEST_ROW:,}"
