"""SHA-256 of files by blocks of fixed size: damage is located, and several threads can hash at once.

hashlib and numpy release the interpreter's lock.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from steel_megatron.errors import DataError
from steel_megatron.files import disk_errors

BLOCK_BYTES = 1 << 26
"""Size of a block (64 MiB); the last one of a file is shorter."""

_PIECE = 1 << 20
"""Bytes read at a time: small enough that the second look at them finds them in the processor's cache."""


class BlockHasher:
    """Hashes a file while it is written.

    Args:
        block_bytes: size of a block.
    """

    def __init__(self, block_bytes: int = BLOCK_BYTES) -> None:
        self.block_bytes = block_bytes
        self._done: list[str] = []
        self._hash = hashlib.sha256()
        self._filled = 0

    def update(self, content: memoryview) -> None:
        """Append bytes."""
        while len(content):
            part = content[: self.block_bytes - self._filled]
            self._hash.update(part)
            self._filled += len(part)
            content = content[len(part) :]
            if self._filled == self.block_bytes:
                self._done.append(self._hash.hexdigest())
                self._hash, self._filled = hashlib.sha256(), 0

    @property
    def blocks(self) -> list[str]:
        """Hex digests of all blocks of what was appended."""
        return [*self._done, self._hash.hexdigest()] if self._filled else list(self._done)


@dataclass(frozen=True)
class Block:
    """What :func:`scan_blocks` found in one block."""

    digest: str
    """SHA-256, hex."""
    low: int
    """The smallest value."""
    high: int
    """The largest value."""


def scan_blocks(
    path: Path,
    size: int,
    block_bytes: int = BLOCK_BYTES,
    dtype: np.dtype[Any] | None = None,
    on_bytes: Callable[[int], None] | None = None,
    workers: int | None = None,
) -> list[Block]:
    """Read the first ``size`` bytes of a file block by block, in several threads.

    Args:
        path: the file.
        size: its bytes; a multiple of the dtype's size, as ``block_bytes`` is.
        block_bytes: size of a block.
        dtype: what it holds, to find the extremes; None to leave them at 0.
        on_bytes: called, in the calling thread, with the bytes of each block that is done.
        workers: threads; None for one per processor, up to 8.

    Raises:
        DataError: the file cannot be read, or is shorter by now.
    """
    blocks = []
    with disk_errors("read", path, DataError), path.open("rb") as file:

        def scan(start: int) -> Block:
            return _scan_block(path, file.fileno(), start, min(start + block_bytes, size), dtype)

        pool = ThreadPoolExecutor(workers or default_workers())
        try:
            for start, block in [(start, pool.submit(scan, start)) for start in range(0, size, block_bytes)]:
                blocks.append(block.result())
                if on_bytes:
                    on_bytes(min(block_bytes, size - start))
        finally:
            pool.shutdown(cancel_futures=True)
    return blocks


def default_workers() -> int:
    """Threads that read a file: the processors this process may use, up to 8."""
    return min(8, len(os.sched_getaffinity(0)))


def _scan_block(path: Path, descriptor: int, start: int, stop: int, dtype: np.dtype[Any] | None) -> Block:
    digest = hashlib.sha256()
    buffer = bytearray(min(_PIECE, stop - start))
    low = high = None
    while start < stop:
        wanted = memoryview(buffer)[: stop - start]
        taken = 0
        while taken < len(wanted):
            count = os.preadv(descriptor, [wanted[taken:]], start + taken)
            if count == 0:
                raise DataError(f"{path} ends at byte {start + taken:,}; it was cut short while it was read")
            taken += count
        digest.update(wanted)
        if dtype is not None:
            values = np.frombuffer(wanted, dtype)
            least, most = int(values.min()), int(values.max())
            low, high = min(least, least if low is None else low), max(most, most if high is None else high)
        start += taken
    return Block(digest.hexdigest(), low or 0, high or 0)
