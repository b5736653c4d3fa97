"""Documents that are exactly the same as others: the same token ids, whatever their dtype.

Compared are 128-bit BLAKE2b digests of the ids as little-endian uint32. Memory holds the digests of the new corpus
(about 50 bytes per document while they are sorted) and of a chunk of another one, never tokens.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from steel_megatron.data.indexed.dataset import IndexedCorpus

_DIGEST = 16
"""Bytes of a digest."""
_CHUNK_DOCUMENTS, _CHUNK_TOKENS = 1 << 16, 1 << 22
"""At most so much is read at a time, but one document at least."""


def document_digests(corpus: IndexedCorpus) -> Iterator[np.ndarray]:
    """The digests of all documents in order, by chunks: texts of 16 bytes [n]."""
    begin, from_token = 0, 0
    while begin < corpus.documents:
        ends = np.cumsum(corpus.sizes[begin : begin + _CHUNK_DOCUMENTS], dtype=np.int64)
        count = max(1, int(np.searchsorted(ends, _CHUNK_TOKENS, side="right")))
        bounds = [0, *ends[:count].tolist()]
        ids = np.ascontiguousarray(corpus.flat[from_token : from_token + bounds[-1]].astype("<u4")).data
        digests = (
            hashlib.blake2b(ids[start:stop], digest_size=_DIGEST).digest() for start, stop in itertools.pairwise(bounds)
        )
        yield np.frombuffer(b"".join(digests), dtype=f"S{_DIGEST}")
        begin, from_token = begin + count, from_token + bounds[-1]


class Duplicates(NamedTuple):
    """Documents of a corpus that are in other corpora, or earlier in itself."""

    bits: np.ndarray
    """Which ones, as :func:`drop_bits` has them."""
    documents: int
    tokens: int
    like: tuple[int, ...]
    """The numbers of the other corpora that have some of them: of each document, the first that has it."""


def duplicate_documents(new: IndexedCorpus, others: Sequence[tuple[IndexedCorpus, np.ndarray | None]]) -> Duplicates:
    """The documents of a corpus that are in other corpora, or earlier in itself; never empty ones.

    Args:
        new: the corpus.
        others: what it is compared with, each with the bits of its documents that do not count.
    """
    digests = np.concatenate(list(document_digests(new)))
    unique, first, inverse = np.unique(digests, return_index=True, return_inverse=True)
    duplicate = np.ones(len(digests), dtype=bool)
    duplicate[first] = False
    elsewhere = new.sizes[first] == 0  # an empty one is nobody's
    like = []
    for number, (corpus, ignored) in enumerate(others):
        begin, found = 0, False
        for part in document_digests(corpus):
            kept = part if ignored is None else part[~bits_of(ignored, begin, begin + len(part))]
            at = np.minimum(np.searchsorted(unique, kept), len(unique) - 1)
            hits = at[unique[at] == kept]
            found |= not elsewhere[hits].all()
            elsewhere[hits] = True
            begin += len(part)
        like += [number] * found
    duplicate |= elsewhere[inverse]
    duplicate &= new.sizes > 0
    tokens = int(new.sizes[duplicate].sum(dtype=np.int64))
    return Duplicates(drop_bits(duplicate), int(duplicate.sum()), tokens, tuple(like))


def drop_bits(mask: np.ndarray) -> np.ndarray:
    """A bit for each document, from the lowest of each byte on: bool [documents] -> uint8 [documents / 8, up]."""
    return np.packbits(mask, bitorder="little")


def bits_of(bits: np.ndarray, begin: int, end: int) -> np.ndarray:
    """The bits of a range of documents.

    Args:
        bits: uint8 [documents / 8, up], as :func:`drop_bits` gives them.
        begin: first document of the range.
        end: the document after the last.

    Returns:
        bool [end - begin].
    """
    whole = np.unpackbits(bits[begin // 8 : -(-end // 8)], bitorder="little").view(bool)
    return whole[begin % 8 : begin % 8 + end - begin]
