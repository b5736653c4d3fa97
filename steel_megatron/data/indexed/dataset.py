"""Megatron's indexed format: the files, safe reading, verifying. :mod:`~steel_megatron.data.indexed.writer` writes it.

A corpus is a few files with one prefix. ``.bin`` holds the tokens of all documents one after the other; ``.idx``
the length and position of each; both byte for byte as megatron-core writes them, so corpora move both ways. The
library's manifest, ``.json``, has counts, checksums, and the tokenizer the ids belong to; it appears last. A corpus
that megatron-core wrote has none and is read all the same. ``.rows.npy``, where there is one, has the row of its
input file that each document came from.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from steel_megatron.data.indexed.checksums import BLOCK_BYTES, Block, scan_blocks
from steel_megatron.data.indexed.format import (
    BIN,
    IDX,
    MANIFEST,
    NAMES,
    ROWS,
    ROWS_HEADER_BYTES,
    mapped,
    partial,
    read_index,
    rows_header,
)
from steel_megatron.data.indexed.manifest import content_of, read_manifest
from steel_megatron.errors import DataError
from steel_megatron.files import disk_errors, with_suffix

_CHUNK = 1 << 20
"""Elements handled at a time when tokens are scanned."""


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The dtype that Megatron stores ids of a vocabulary in: uint16 below 65,500 ids, else int32."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


@dataclass(frozen=True)
class Origin:
    """Where a document came from."""

    path: str
    """The input file."""
    source: str
    """Name of the source it was read as."""
    row: int
    """Its row in the file, from 1."""


class IndexedCorpus:
    """A corpus on disk whose files were checked against each other; made by :func:`open_indexed`.

    Arrays handed out are read-only views of the mapped file and stay valid after the corpus is gone.
    """

    def __init__(
        self, prefix: str, flat: np.ndarray, positions: np.ndarray, sizes: np.ndarray, files: dict[str, int]
    ) -> None:
        self.prefix = prefix
        """Path without a suffix."""
        self.files = files
        """Bytes of each file by its suffix; without the manifest."""
        self.flat = flat
        """All tokens, one document after the other [tokens]."""
        self.sizes = sizes
        """Tokens of each document [documents]."""
        self.manifest: dict[str, Any] | None = None
        """The manifest; None for a corpus that another program wrote."""
        self.rows: np.ndarray | None = None
        """The row of each document in its input file, from 1, int64 [documents]; None where nobody recorded it."""
        self._positions = positions  # bytes
        self._shift = flat.itemsize.bit_length() - 1
        self._input_ends: np.ndarray | None = None

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

    def path(self, suffix: str) -> Path:
        """The corpus' file with one of :data:`~steel_megatron.data.indexed.format.SUFFIXES`."""
        return with_suffix(self.prefix, suffix)

    def document(self, index: int) -> np.ndarray:
        """The ids of one document [its tokens]."""
        return self.tokens_of(index, 0, int(self.sizes[index]))

    def tokens_of(self, document: int, offset: int, length: int) -> np.ndarray:
        """Some consecutive ids of a document.

        Args:
            document: number of the document, from 0.
            offset: first token, counted from 0 within the document.
            length: number of tokens.

        Returns:
            the ids [length], a view of the mapped file.

        Raises:
            IndexError: there is no such document, or it does not have these tokens.
        """
        size = self.sizes.item(document)
        if document < 0 or offset < 0 or length < 0 or offset + length > size:
            raise IndexError(f"tokens {offset} to {offset + length} of document {document}, which has {size}")
        start = (self._positions.item(document) >> self._shift) + offset
        return self.flat[start : start + length]

    def origin(self, document: int) -> Origin | None:
        """Where a document came from; None where nobody recorded it.

        Raises:
            IndexError: there is no such document.
        """
        if not 0 <= document < self.documents:
            raise IndexError(f"document {document} of {self.prefix}, which has {self.documents}")
        if self.rows is None:
            return None
        assert self.manifest is not None
        inputs = self.manifest["inputs"]
        if self._input_ends is None:
            self._input_ends = np.cumsum([entry["documents"] for entry in inputs])
        entry = inputs[int(np.searchsorted(self._input_ends, document, side="right"))]
        return Origin(str(entry.get("path", "")), str(entry.get("source", "")), int(self.rows[document]))


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
    manifest_path = with_suffix(prefix, MANIFEST)
    if not manifest_path.exists() and partial(manifest_path).exists():
        raise DataError(
            f"{prefix} was interrupted while it was completed ({partial(manifest_path)} is left); make it again"
        )
    index = read_index(with_suffix(prefix, IDX))
    bin_path, total = with_suffix(prefix, BIN), index.tokens * index.dtype.itemsize
    with disk_errors("read", bin_path, DataError), bin_path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size != total:
            raise DataError(
                f"{bin_path} has {size:,} bytes where its index asks for {total:,} ({index.tokens:,} tokens of "
                f"{index.dtype}); it is truncated, extended or belongs to another index"
            )
        flat = mapped(file, index.dtype, 0, index.tokens)
    positions, sizes = index.documents()
    if total == 0:
        raise DataError(f"{prefix} holds {len(sizes):,} documents without a single token")
    corpus = IndexedCorpus(prefix, flat, positions, sizes, {BIN: total, IDX: index.bytes})
    if manifest_path.exists():
        _add_manifest(corpus)
    if vocab_size is not None:
        _check_ids(corpus, vocab_size)
    return corpus


def _add_manifest(corpus: IndexedCorpus) -> None:
    found = {"documents": corpus.documents, "tokens": corpus.tokens, "dtype": corpus.dtype.name}
    size = ROWS_HEADER_BYTES + 8 * corpus.documents
    sizes = {"bin": corpus.files[BIN], "idx": corpus.files[IDX], "rows": size}
    corpus.manifest = read_manifest(corpus.path(MANIFEST), found, sizes)
    if "rows" not in corpus.manifest["blocks"]:
        return
    path = corpus.path(ROWS)
    with disk_errors("read", path, DataError), path.open("rb") as file:
        actual = os.fstat(file.fileno()).st_size
        if actual != size or file.read(ROWS_HEADER_BYTES) != rows_header(corpus.documents):
            raise DataError(
                f"{path} ({actual:,} bytes) is no array of int64 [{corpus.documents}] ({size:,} bytes), one row "
                "number for each document; it is truncated, extended or damaged"
            )
        corpus.rows = mapped(file, np.dtype(np.int64), ROWS_HEADER_BYTES, corpus.documents)
    corpus.files[ROWS] = size


def _check_ids(corpus: IndexedCorpus, vocab_size: int) -> None:
    if corpus.manifest is None or corpus.manifest["max_id"] >= vocab_size:
        refuse_ids(corpus, vocab_size)


def refuse_other_tokenizer(corpus: IndexedCorpus, fingerprint: str) -> None:
    """Raise a DataError if a corpus records the fingerprint of another tokenizer."""
    recorded = (corpus.manifest or {}).get("tokenizer", {}).get("fingerprint")
    if recorded not in (None, fingerprint):
        raise DataError(
            f"{corpus.prefix} was made with another tokenizer: fingerprint {recorded}, this one has {fingerprint}"
        )


def refuse_ids(corpus: IndexedCorpus, vocab_size: int | None) -> None:
    """Scan a corpus and raise a DataError at the first id that is negative or not below ``vocab_size``."""
    top = np.iinfo(corpus.dtype).max if vocab_size is None else vocab_size - 1
    for at in range(0, corpus.tokens, _CHUNK):
        ids = corpus.flat[at : at + _CHUNK]
        if int(ids.max()) > top or int(ids.min()) < 0:
            bad = at + int(np.argmax((ids > top) | (ids < 0)))
            document = int(np.searchsorted(corpus._positions, bad * corpus.dtype.itemsize, side="right")) - 1
            raise DataError(
                f"{corpus.prefix} holds token id {corpus.flat[bad]} (in document {document}), but the vocabulary has "
                f"ids 0 to {top}; the corpus was made with another tokenizer, or damaged"
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


def verify(
    prefix: str | Path,
    vocab_size: int | None = None,
    on_bytes: Callable[[int], None] | None = None,
    workers: int | None = None,
) -> Verification:
    """Read a whole corpus and check its structure, its ids and the checksums of its manifest.

    Args:
        prefix: path without a suffix.
        vocab_size: every id must be below it; None to take what the manifest says of the tokenizer.
        on_bytes: called with the bytes of each block that was read.
        workers: threads; None for one per processor, up to 8.

    Raises:
        DataError: as :func:`open_indexed`, or a file differs from its checksums; the message names file and bytes.
    """
    corpus = open_indexed(prefix)
    manifest = corpus.manifest or {}
    if vocab_size is None:
        vocab_size = manifest.get("tokenizer", {}).get("vocab_size")
    low = high = 0
    for suffix in corpus.files:
        blocks = scan_file(corpus, suffix, corpus.dtype if suffix == BIN else None, on_bytes, workers)
        if suffix == BIN:
            low, high = min(block.low for block in blocks), max(block.high for block in blocks)
    if low < 0 or (vocab_size is not None and high >= vocab_size):
        refuse_ids(corpus, vocab_size)
    if manifest and high != manifest["max_id"]:
        raise DataError(
            f"manifest {corpus.path(MANIFEST)} is damaged: max_id is {manifest['max_id']}, the largest id is {high}"
        )
    return Verification(corpus.documents, corpus.tokens, high, bool(manifest))


def scan_file(
    corpus: IndexedCorpus,
    suffix: str,
    dtype: np.dtype[Any] | None = None,
    on_bytes: Callable[[int], None] | None = None,
    workers: int | None = None,
) -> list[Block]:
    """Read one of a corpus' files and compare it with its checksums, if there are any; see :func:`scan_blocks`.

    Args:
        corpus: the corpus.
        suffix: which file: a key of ``corpus.files``.
        dtype: what it holds, to find the extremes; None to leave them at 0.
        on_bytes: called, in the calling thread, with the bytes of each block that was read.
        workers: threads; None for one per processor, up to 8.

    Returns:
        digest and extremes of each block, in order.

    Raises:
        DataError: the file cannot be read, or differs; the message names it and the bytes.
    """
    manifest = corpus.manifest or {}
    path, size, block_bytes = corpus.path(suffix), corpus.files[suffix], manifest.get("block_bytes", BLOCK_BYTES)
    blocks = scan_blocks(path, size, block_bytes, dtype, on_bytes, workers)
    if manifest:
        check_digests(corpus, suffix, [block.digest for block in blocks])
    return blocks


def check_digests(corpus: IndexedCorpus, suffix: str, actual: Sequence[str]) -> None:
    """Compare the digests of a file with those in the manifest.

    Args:
        corpus: a corpus that has a manifest.
        suffix: which file: a key of ``corpus.files``.
        actual: SHA-256 of each of its blocks, in hex, in order.

    Raises:
        DataError: the file differs; the message names the bytes of the first block that does.
    """
    assert corpus.manifest is not None
    recorded, block_bytes = corpus.manifest["blocks"][NAMES[suffix]], corpus.manifest["block_bytes"]
    changed = [number for number, pair in enumerate(zip(actual, recorded, strict=True)) if pair[0] != pair[1]]
    if changed:
        first = changed[0] * block_bytes
        raise DataError(
            f"{corpus.path(suffix)} has changed since it was written: {len(changed)} of {len(recorded)} blocks differ, "
            f"the first at bytes {first:,} to {min(first + block_bytes, corpus.files[suffix]) - 1:,} (SHA-256 "
            f"{actual[changed[0]]}, recorded is {recorded[changed[0]]})"
        )


def content_hash(corpus: IndexedCorpus) -> str:
    """The identity of a corpus' tokens and documents, whatever its path: its manifest's, or what that would be.

    Without a manifest both files are read in full.

    Raises:
        DataError: a file cannot be read.
    """
    if corpus.manifest is not None:
        return str(corpus.manifest["content"])
    digests = {NAMES[suffix]: [block.digest for block in scan_file(corpus, suffix)] for suffix in (BIN, IDX)}
    return content_of(corpus.dtype.name, digests)
