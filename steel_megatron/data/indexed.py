"""Megatron's indexed format: the files, safe reading, verifying. :mod:`~steel_megatron.data.indexed_writer` writes it.

A corpus is three files with one prefix. ``.bin`` holds the tokens of all documents one after the other; ``.idx``
the length and position of each; both byte for byte as megatron-core writes them, so corpora move both ways. The
third, ``.json``, is the library's manifest: counts, checksums, and the tokenizer the ids belong to. It appears last;
a corpus that megatron-core wrote has none and is read all the same.

Layout of ``.idx``: 9 bytes magic, uint64 version (1), uint8 dtype code, uint64 number of sequences S, uint64
number of document boundaries D, then int32 [S] lengths in tokens, int64 [S] positions in bytes, int64 [D] document
boundaries in sequences. Written here, a document is one sequence (D = S + 1); read, it may be several.
"""

from __future__ import annotations

import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from steel_megatron.errors import DataError
from steel_megatron.files import disk_errors, sha256_of, with_suffix
from steel_megatron.log import get_logger

FORMAT = "steel-megatron-indexed-1"
"""Name and version of the manifest."""
SUFFIXES = (".bin", ".idx", ".json")
"""The files of a corpus."""
MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
"""Megatron's codes of the dtypes that can hold token ids."""

_CHUNK = 1 << 20
"""Elements handled at a time when a file is scanned."""
logger = get_logger(__name__)


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The dtype that Megatron stores ids of a vocabulary in: uint16 below 65,500 ids, else int32."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


def partial(path: Path) -> Path:
    """The name of a file while it is written."""
    return with_suffix(path, ".partial")


def mapped(path: Path, dtype: np.dtype[Any], offset: int, count: int) -> np.ndarray:
    """A read-only array over a part of a file; the mapping lives as long as the array or any view of it."""
    if count == 0:
        return np.empty(0, dtype)
    return np.memmap(path, dtype, "r", offset, (count,)).view(np.ndarray)


class IndexedCorpus:
    """A corpus on disk whose files were checked against each other; made by :func:`open_indexed`.

    Arrays handed out are read-only views of the mapped file and stay valid after the corpus is gone.
    """

    def __init__(self, prefix: str, flat: np.ndarray, positions: np.ndarray, sizes: np.ndarray) -> None:
        self.prefix = prefix
        """Path without a suffix."""
        self.flat = flat
        """All tokens, one document after the other [tokens]."""
        self.sizes = sizes
        """Tokens of each document [documents]."""
        self.manifest: dict[str, Any] | None = None
        """The manifest; None for a corpus that another program wrote."""
        self._positions = positions  # bytes

    @property
    def documents(self) -> int:
        """Number of documents."""
        return len(self.sizes)

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return len(self.flat)

    @property
    def dtype(self) -> np.dtype[Any]:
        """How ids are stored."""
        return self.flat.dtype

    def document(self, index: int) -> np.ndarray:
        """The ids of one document [its tokens]."""
        return self.tokens_of(index, 0, int(self.sizes[index]))

    def tokens_of(self, document: int, offset: int, length: int) -> np.ndarray:
        """``length`` ids of a document from its token ``offset`` on.

        Raises:
            IndexError: the document does not have them.
        """
        size = int(self.sizes[document])
        if offset < 0 or length < 0 or offset + length > size:
            raise IndexError(f"tokens {offset} to {offset + length} of document {document}, which has {size}")
        start = int(self._positions[document]) // self.dtype.itemsize + offset
        return self.flat[start : start + length]


def open_indexed(prefix: str | Path, vocab_size: int | None = None) -> IndexedCorpus:
    """Open a corpus after checking that its files fit each other.

    Args:
        prefix: path without a suffix.
        vocab_size: every id must be below it; None to leave ids unchecked. The ids are scanned unless the manifest
            records the largest one.

    Raises:
        DataError: a file is missing, truncated, extended or damaged, the corpus is empty, or an id is too large.
    """
    prefix = os.fspath(prefix)
    bin_path, idx_path, manifest_path = (with_suffix(prefix, suffix) for suffix in SUFFIXES)
    if not manifest_path.exists() and partial(manifest_path).exists():
        raise DataError(
            f"{prefix} was interrupted while it was completed ({partial(manifest_path)} is left); make it again"
        )
    with disk_errors("read", idx_path, DataError):
        idx_size = idx_path.stat().st_size
        with idx_path.open("rb") as file:
            header = file.read(HEADER.size)
    with disk_errors("read", bin_path, DataError):
        bin_size = bin_path.stat().st_size
    corpus = _open_arrays(prefix, idx_path, header, idx_size, bin_path, bin_size)
    if manifest_path.exists():
        corpus.manifest = _read_manifest(manifest_path, corpus)
    if vocab_size is not None:
        _check_ids(corpus, vocab_size)
    return corpus


def _open_arrays(
    prefix: str, idx_path: Path, header: bytes, idx_size: int, bin_path: Path, bin_size: int
) -> IndexedCorpus:
    if len(header) < HEADER.size:
        raise DataError(f"{idx_path} is truncated: {idx_size} bytes, where the header alone has {HEADER.size}")
    magic, version, code, sequences, boundaries = HEADER.unpack(header)
    if magic != MAGIC or version != 1:
        raise DataError(f"{idx_path} is no index of version 1 (it begins with {magic!r}, version {version})")
    if code not in DTYPES:
        raise DataError(f"{idx_path} has dtype code {code}; token ids have one of {sorted(DTYPES)}")
    expected = HEADER.size + 12 * sequences + 8 * boundaries
    if idx_size == expected + sequences and sequences:
        raise DataError(f"{idx_path} has a mode for each sequence (a multimodal corpus), which is not supported")
    if idx_size != expected:
        raise DataError(
            f"{idx_path} has {idx_size:,} bytes where its header ({sequences:,} sequences, {boundaries:,} document "
            f"boundaries) asks for {expected:,}; it is truncated, extended or damaged"
        )
    if sequences == 0 or boundaries < 2:
        raise DataError(f"{prefix} holds no document")
    dtype = np.dtype(DTYPES[code])
    at = HEADER.size
    lengths = mapped(idx_path, np.dtype(np.int32), at, sequences)
    positions = mapped(idx_path, np.dtype(np.int64), at + 4 * sequences, sequences)
    ends = mapped(idx_path, np.dtype(np.int64), at + 12 * sequences, boundaries)
    total = _check_index(idx_path, lengths, positions, ends, dtype.itemsize)
    if total != bin_size:
        raise DataError(
            f"{bin_path} has {bin_size:,} bytes where its index asks for {total:,} ({total // dtype.itemsize:,} tokens "
            f"of {dtype}); it is truncated, extended or belongs to another index"
        )
    if total == 0:
        raise DataError(f"{prefix} holds {boundaries - 1:,} documents without a single token")
    sizes = lengths
    if boundaries != sequences + 1 or not _counts_up(ends):  # documents of several sequences
        starts = np.append(positions, total)[ends]
        positions, sizes = starts[:-1], np.diff(starts) // dtype.itemsize
    return IndexedCorpus(prefix, mapped(bin_path, dtype, 0, total // dtype.itemsize), positions, sizes)


def _counts_up(ends: np.ndarray) -> bool:
    chunks = range(0, len(ends), _CHUNK)
    return all(np.array_equal(part := ends[at : at + _CHUNK], np.arange(at, at + len(part))) for at in chunks)


def _check_index(path: Path, lengths: np.ndarray, positions: np.ndarray, ends: np.ndarray, itemsize: int) -> int:
    """Check that lengths, positions and document boundaries agree; returns the bytes they cover."""
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
    falling = any(np.any(np.diff(ends[at : at + _CHUNK + 1]) < 0) for at in range(0, len(ends), _CHUNK))
    if ends[0] != 0 or ends[-1] != len(lengths) or falling:
        raise DataError(
            f"{path} is damaged: document boundaries run from {ends[0]} to {ends[-1]}"
            f"{', not in order,' if falling else ''} where {len(lengths)} sequences need 0 to {len(lengths)}"
        )
    return total


def _read_manifest(path: Path, corpus: IndexedCorpus) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"manifest {path} cannot be read: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DataError(f"{path} is no manifest of format {FORMAT!r}; move it away if it belongs to something else")
    found = {"documents": corpus.documents, "tokens": corpus.tokens, "dtype": corpus.dtype.name}
    for name, value in found.items():
        if manifest.get(name) != value:
            raise DataError(
                f"{corpus.prefix} is not what its manifest describes: {name} is {value}, recorded is "
                f"{manifest.get(name)}; files of two corpora were mixed up"
            )
    checksums = manifest.get("sha256")
    if (
        not isinstance(checksums, dict)
        or set(checksums) != {"bin", "idx"}
        or not isinstance(manifest.get("max_id"), int)
    ):
        raise DataError(f"manifest {path} is damaged: sha256 is {checksums}, max_id is {manifest.get('max_id')!r}")
    return manifest


def _check_ids(corpus: IndexedCorpus, vocab_size: int) -> None:
    if corpus.manifest is not None and corpus.manifest["max_id"] < vocab_size:
        return
    for at in range(0, corpus.tokens, _CHUNK):
        ids = corpus.flat[at : at + _CHUNK]
        if int(ids.max()) >= vocab_size or int(ids.min()) < 0:
            bad = at + int(np.argmax((ids >= vocab_size) | (ids < 0)))
            document = int(np.searchsorted(corpus._positions, bad * corpus.dtype.itemsize, side="right")) - 1
            raise DataError(
                f"{corpus.prefix} holds token id {corpus.flat[bad]} (in document {document}), but the vocabulary has "
                f"ids 0 to {vocab_size - 1}; the corpus was made with another tokenizer"
            )


@dataclass(frozen=True)
class Verification:
    """What :func:`verify` found in order."""

    documents: int
    tokens: int
    max_id: int
    """The largest token id."""
    checksums: bool
    """Whether checksums were compared; a corpus without a manifest has none."""


def verify(prefix: str | Path, vocab_size: int | None = None) -> Verification:
    """Read a whole corpus and check its structure, its ids and the checksums of its manifest.

    Raises:
        DataError: as :func:`open_indexed`, or a file differs from its checksum.
    """
    corpus = open_indexed(prefix)
    if corpus.manifest is not None:
        for name, recorded in corpus.manifest["sha256"].items():
            path = with_suffix(corpus.prefix, f".{name}")
            with disk_errors("read", path, DataError):
                actual = sha256_of(path)
            if actual != recorded:
                raise DataError(f"{path} has changed since it was written: SHA-256 {actual}, recorded is {recorded}")
    max_id = max(int(corpus.flat[at : at + _CHUNK].max()) for at in range(0, corpus.tokens, _CHUNK))
    if vocab_size is not None:
        _check_ids(corpus, vocab_size)
    return Verification(corpus.documents, corpus.tokens, max_id, corpus.manifest is not None)
