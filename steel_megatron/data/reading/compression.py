"""Compressed files as streams: gzip and zstd, by the ends of their names."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import Any, BinaryIO, cast

import zstandard

_SKIPPED_BYTES = 1 << 20
"""Decompressed at once when seeking."""
_STORED_BYTES = 1 << 12
"""Of a zstd file, decompressed at once; text that repeats itself may become ten thousand times as long."""
DAMAGE = (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError)
"""What a stream raises that is truncated or damaged."""


def decompressed(path: Path, raw: BinaryIO) -> BinaryIO:
    """The content of a file from its beginning; the file itself if it is not compressed."""
    raw.seek(0)
    if path.suffix == ".gz":
        return cast(BinaryIO, gzip.GzipFile(fileobj=raw))
    if path.suffix == ".zst":
        return cast(BinaryIO, _ZstandardFile(raw))
    return raw


def opened_at(path: Path, raw: BinaryIO, offset: int) -> BinaryIO:
    """The (decompressed) content from a byte on.

    Args:
        path: the file; the end of its name says how it is compressed.
        raw: the same file, open for reading.
        offset: byte of the decompressed content to begin with.

    Raises:
        EOFError: a compressed file ends before that byte.
    """
    stream = decompressed(path, raw)
    if stream is raw:
        raw.seek(offset)
        return raw
    while offset > 0:
        block = stream.read(min(offset, _SKIPPED_BYTES))
        if not block:
            raise EOFError("the file is shorter than it was")
        offset -= len(block)
    return stream


class _ZstandardFile:
    """Reads one or more zstd frames; unlike the library's own reader, it notices when the last one is cut off."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._frame: Any = None
        self._ready = memoryview(b"")

    def read(self, size: int) -> bytes:
        """Up to ``size`` bytes; none at the end."""
        while not self._ready:
            stored = self._raw.read(_STORED_BYTES)
            if not stored:
                if self._frame is not None:
                    raise EOFError("the file ends within a zstd frame")
                return b""
            parts = []
            while stored:
                if self._frame is None:
                    self._frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
                parts.append(self._frame.decompress(stored))
                stored = self._frame.unused_data if self._frame.eof else b""
                if self._frame.eof:
                    self._frame = None
            self._ready = memoryview(b"".join(parts))
        taken, self._ready = self._ready[:size], self._ready[size:]
        return bytes(taken)
