"""The byte layout of the files of an indexed corpus.

Layout of ``.idx``: 9 bytes magic, uint64 version (1), uint8 dtype code, uint64 number of sequences S, uint64
number of document boundaries D, then int32 [S] lengths in tokens, int64 [S] positions in bytes, int64 [D] document
boundaries in sequences. Written here, a document is one sequence (D = S + 1); read, it may be several.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from steel_megatron.errors import DataError
from steel_megatron.files import disk_errors, with_suffix

BIN, IDX, ROWS, MANIFEST = SUFFIXES = (".bin", ".idx", ".rows.npy", ".json")
"""The files of a corpus, in the order in which they appear."""
NAMES = {BIN: "bin", IDX: "idx", ROWS: "rows"}
"""What the manifest calls them."""
MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
"""Megatron's codes of the dtypes that can hold token ids."""
ROWS_HEADER_BYTES = 128

_CHUNK = 1 << 20
"""Elements handled at a time when a file is scanned."""


def rows_header(documents: int) -> bytes:
    """The beginning of ``.rows.npy``: numpy's format, version 1.0, for int64 [documents]."""
    about = f"{{'descr': '<i8', 'fortran_order': False, 'shape': ({documents},), }}"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", ROWS_HEADER_BYTES - 10) + about.ljust(117).encode() + b"\n"


def partial(path: Path) -> Path:
    """The name of a file while it is written."""
    return with_suffix(path, ".partial")


def mapped(file: IO[bytes], dtype: np.dtype[Any], offset: int, count: int) -> np.ndarray:
    """A read-only array over a part of an open file; the mapping lives as long as the array or any view of it.

    Args:
        file: open for reading, in binary.
        dtype: of the elements.
        offset: byte at which the array begins.
        count: number of elements.

    Returns:
        the elements [count].
    """
    if count == 0:
        return np.empty(0, dtype)
    return np.memmap(file, dtype, "r", offset, (count,)).view(np.ndarray)


@dataclass(frozen=True)
class Index:
    """What a ``.idx`` file says; its parts fit each other. The arrays are read-only views of the mapped file."""

    dtype: np.dtype[Any]
    """How tokens are stored."""
    lengths: np.ndarray
    """Tokens of each sequence, int32 [S]."""
    positions: np.ndarray
    """Byte at which each begins, int64 [S]."""
    boundaries: np.ndarray
    """Sequence with which each document begins, and S, int64 [D]."""
    tokens: int
    """Tokens of all sequences."""
    bytes: int
    """Bytes of the file."""

    def documents(self) -> tuple[np.ndarray, np.ndarray]:
        """Byte at which each document begins, int64 [D - 1], and its tokens [D - 1]."""
        if len(self.boundaries) == len(self.lengths) + 1 and _counts_up(self.boundaries):
            return self.positions, self.lengths
        starts = np.append(self.positions, self.tokens * self.dtype.itemsize)[self.boundaries]
        return starts[:-1], np.diff(starts) // self.dtype.itemsize


def read_index(path: Path) -> Index:
    """Map a ``.idx`` file and check that its parts fit each other.

    Raises:
        DataError: it is missing, truncated, extended, damaged, of a kind that is not supported, or has no document.
    """
    with disk_errors("read", path, DataError), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        dtype, sequences, boundaries = _read_header(path, file.read(HEADER.size), size)
        at = HEADER.size
        lengths = mapped(file, np.dtype(np.int32), at, sequences)
        positions = mapped(file, np.dtype(np.int64), at + 4 * sequences, sequences)
        ends = mapped(file, np.dtype(np.int64), at + 12 * sequences, boundaries)
    covered = _check_sequences(path, lengths, positions, dtype.itemsize)
    _check_boundaries(path, ends, sequences)
    return Index(dtype, lengths, positions, ends, covered // dtype.itemsize, size)


def _read_header(path: Path, header: bytes, size: int) -> tuple[np.dtype[Any], int, int]:
    """The dtype, the number of sequences and that of document boundaries."""
    if len(header) < HEADER.size:
        raise DataError(f"{path} is truncated: {size} bytes, where the header alone has {HEADER.size}")
    magic, version, code, sequences, boundaries = HEADER.unpack(header)
    if magic != MAGIC or version != 1:
        raise DataError(f"{path} is no index of version 1 (it begins with {magic!r}, version {version})")
    if code not in DTYPES:
        raise DataError(f"{path} has dtype code {code}; token ids have one of {sorted(DTYPES)}")
    expected = HEADER.size + 12 * sequences + 8 * boundaries
    if size == expected + sequences and sequences:
        raise DataError(f"{path} has a mode for each sequence (a multimodal corpus), which is not supported")
    if size != expected:
        raise DataError(
            f"{path} has {size:,} bytes where its header ({sequences:,} sequences, {boundaries:,} document "
            f"boundaries) asks for {expected:,}; it is truncated, extended or damaged"
        )
    if sequences == 0 or boundaries < 2:
        raise DataError(f"{path} holds no document")
    return np.dtype(DTYPES[code]), sequences, boundaries


def _counts_up(ends: np.ndarray) -> bool:
    chunks = range(0, len(ends), _CHUNK)
    return all(np.array_equal(part := ends[at : at + _CHUNK], np.arange(at, at + len(part))) for at in chunks)


def _check_sequences(path: Path, lengths: np.ndarray, positions: np.ndarray, itemsize: int) -> int:
    """Check that lengths and positions agree; returns the bytes they cover."""
    total = 0
    for at in range(0, len(lengths), _CHUNK):
        sizes = lengths[at : at + _CHUNK].astype(np.int64) * itemsize
        if sizes.min() < 0:
            bad = at + int(np.argmax(sizes < 0))
            raise DataError(f"{path} is damaged: sequence {bad} has length {lengths[bad]}")
        stops = total + np.cumsum(sizes)
        wrong = positions[at : at + _CHUNK] != stops - sizes
        if wrong.any():
            bad = int(np.argmax(wrong))
            raise DataError(
                f"{path} is damaged: sequence {at + bad} is at byte {positions[at + bad]} where the lengths before it "
                f"put it at {stops[bad] - sizes[bad]}"
            )
        total = int(stops[-1])
    return total


def _check_boundaries(path: Path, ends: np.ndarray, sequences: int) -> None:
    """Check that document boundaries run from the first sequence to the last."""
    falling = any(np.any(np.diff(ends[at : at + _CHUNK + 1]) < 0) for at in range(0, len(ends), _CHUNK))
    if ends[0] != 0 or ends[-1] != sequences or falling:
        raise DataError(
            f"{path} is damaged: document boundaries run from {ends[0]} to {ends[-1]}"
            f"{', not in order,' if falling else ''} where {sequences} sequences need 0 to {sequences}"
        )
