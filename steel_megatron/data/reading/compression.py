"""Compressed content as a stream: gzip, zstd, xz, bzip2 and lz4, by the ends of their names or their first bytes."""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable
from typing import Any, Protocol

import zstandard

from steel_megatron.errors import DataError

_SKIPPED_BYTES = 1 << 20
"""Read at once when seeking."""
_STORED_BYTES = 1 << 12
"""Decompressed at once; text that repeats itself may become ten thousand times as long."""


class Damaged(Exception):
    """Stored content is truncated or damaged; the message says how."""


class Readable(Protocol):
    """What a stream must be able to do."""

    def read(self, size: int, /) -> bytes:
        """Up to ``size`` bytes; none at the end."""


def _lz4() -> Any:
    try:
        from lz4.frame import LZ4FrameDecompressor
    except ModuleNotFoundError:  # of a stream; of files it is known before
        raise DataError("reading lz4 needs lz4, which is not installed: pip install 'steel-megatron[data]'") from None
    return LZ4FrameDecompressor()


_DECOMPRESSORS: dict[str, Callable[[], Any]] = {
    ".gz": lambda: zlib.decompressobj(wbits=31),
    ".zst": lambda: zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj(),
    ".xz": lzma.LZMADecompressor,
    ".bz2": bz2.BZ2Decompressor,
    ".lz4": _lz4,
}
COMPRESSIONS = tuple(_DECOMPRESSORS)
"""What the names of compressed files end in."""
_MAGIC = {
    b"\x1f\x8b": ".gz",
    b"\x28\xb5\x2f\xfd": ".zst",
    b"\xfd7zXZ\x00": ".xz",
    b"BZh": ".bz2",
    b"\x04\x22\x4d\x18": ".lz4",
}
_LONGEST_MAGIC = max(map(len, _MAGIC))
_PADDED = (".gz", ".xz")
"""Zero bytes may follow a frame of these."""


class Content:
    """The decompressed content of an input, from its beginning on.

    Args:
        raw: the stored content, from its beginning on.
        compression: one of :data:`COMPRESSIONS`, empty for none, None for what the first bytes say.
        seekable: whether ``raw`` can seek, at little cost.
    """

    def __init__(self, raw: Any, compression: str | None, seekable: bool) -> None:
        self._stream: Readable = raw
        self._head = b""
        self.offset = 0
        """Bytes before the next one."""
        if compression is None:
            head = self.peek(_LONGEST_MAGIC)
            compression = next((name for magic, name in _MAGIC.items() if head.startswith(magic)), "")
            seekable = False
            if compression:
                self._stream, self._head = _Frames(_Joined(head, raw), compression), b""
        elif compression:
            self._stream = _Frames(raw, compression)
        self.file: Any = raw if seekable and not compression else None
        """The file itself where it is not compressed and can seek; it must stand at ``offset`` for :meth:`read`."""

    def peek(self, size: int) -> bytes:
        """The next bytes, which stay the next ones; fewer at the end."""
        while len(self._head) < size and (block := self._stream.read(size - len(self._head))):
            self._head += block
        return self._head[:size]

    def read(self, size: int) -> bytes:
        """Up to ``size`` bytes; none at the end.

        Raises:
            Damaged: the content is truncated or damaged.
        """
        if self._head:
            taken, self._head = self._head[:size], self._head[size:]
        else:
            taken = self._stream.read(size)
        self.offset += len(taken)
        return taken

    def move_to(self, offset: int) -> None:
        """Go to a byte of the content, which is not before :attr:`offset`, or anywhere in a file that can seek.

        Raises:
            Damaged: the content ends before.
        """
        if self.file is not None:
            self._head = b""
            self.file.seek(offset)
            self.offset = offset
            return
        while self.offset < offset:
            if not self.read(min(offset - self.offset, _SKIPPED_BYTES)):
                raise Damaged("the file is shorter than it was")


class _Joined:
    """Bytes that were read already, and what follows them."""

    def __init__(self, head: bytes, rest: Readable) -> None:
        self._head, self._rest = head, rest

    def read(self, size: int) -> bytes:
        if not self._head:
            return self._rest.read(size)
        taken, self._head = self._head[:size], self._head[size:]
        return taken


class _Frames:
    """Reads one or more compressed frames (members, streams); it notices when the last one is cut off."""

    def __init__(self, raw: Readable, compression: str) -> None:
        self._raw, self._compression = raw, compression
        self._frame: Any = None
        self._ready = memoryview(b"")

    def read(self, size: int) -> bytes:
        """Up to ``size`` bytes; none at the end."""
        while not self._ready:
            stored = self._raw.read(_STORED_BYTES)
            if not stored:
                if self._frame is not None:
                    raise Damaged(f"the file ends within a {self._compression[1:]} frame")
                return b""
            self._ready = memoryview(b"".join(self._decompressed(stored)))
        taken, self._ready = self._ready[:size], self._ready[size:]
        return bytes(taken)

    def _decompressed(self, stored: bytes) -> list[bytes]:
        parts = []
        while stored:
            if self._frame is None:
                if self._compression in _PADDED and not (stored := stored.lstrip(b"\0")):
                    break
                self._frame = _DECOMPRESSORS[self._compression]()
            try:
                parts.append(self._frame.decompress(stored))
            except (zlib.error, lzma.LZMAError, zstandard.ZstdError, OSError, RuntimeError, ValueError) as error:
                raise Damaged(str(error)) from error  # which of them depends on the library
            stored = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = None
        return parts
