"""Exact and near duplicates across all sources, from signatures alone.

A document's signature is a hash of its normalised text and a SimHash of its shingles. Signatures are made document by
document, in any number of processes; :func:`find_duplicates` needs all of them at once, some 200 bytes a
document, and never a text. Of documents that are alike the first in input order is kept.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from steel_megatron.errors import ConfigError

SIGNATURE = np.dtype([("file", "<u8"), ("row", "<u8"), ("high", "<u8"), ("low", "<u8"), ("simhash", "<u8")])
"""The document's file by its number, and its row there; 128 bits of the hash of its normalised text; its SimHash."""

VERDICT = np.dtype([("kind", "u1"), ("distance", "u1"), ("original", "<i8")])
"""One of KEPT, EXACT, NEAR; bits by which its SimHash differs from the original's; the original's index."""
KEPT, EXACT, NEAR = 0, 1, 2

_PAIRS_AT_ONCE = 1 << 20
_CJK = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"


@dataclass(frozen=True, kw_only=True)
class ExactDeduplicator:
    """Drops documents whose normalised text an earlier one had."""

    name: ClassVar[str] = "document_deduplicator"
    lowercase: bool = True
    ignore_non_character: bool = True
    """Compare letters and digits only."""
    _other: ClassVar = re.compile(r"[\W_]+")

    def hash(self, text: str) -> tuple[int, int]:
        """128 bits of a text, as two numbers. A text without any letter is compared as it is."""
        normalised = text.lower() if self.lowercase else text
        if self.ignore_non_character:
            normalised = self._other.sub("", normalised) or normalised
        digest = hashlib.blake2b(normalised.encode(), digest_size=16).digest()
        return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


@dataclass(frozen=True, kw_only=True)
class SimhashDeduplicator:
    """Drops documents whose SimHash (Charikar 2002, 64 bits) is near an earlier one's, directly or over others."""

    name: ClassVar[str] = "document_simhash_deduplicator"
    tokenization: Literal["mixed", "space", "character"] = "mixed"
    window_size: int = 6
    lowercase: bool = True
    ignore_punctuation: bool = False
    num_blocks: int = 6
    hamming_distance: int = 4
    _tokens: ClassVar = {
        # A CJK character is a token: Chinese writes no spaces, and has no six words between them.
        "mixed": re.compile(rf"[{_CJK}]|[^\s{_CJK}]+"),
        "space": re.compile(r"\S+"),
        "character": re.compile(r".", re.DOTALL),
    }
    _punctuation: ClassVar = re.compile(r"[^\w\s]|_")

    def __post_init__(self) -> None:
        if self.window_size < 1:
            raise ConfigError(f"window_size is {self.window_size}; it must be at least 1")
        if not 1 <= self.num_blocks <= 16:
            raise ConfigError(f"num_blocks is {self.num_blocks}; it must be within [1, 16]")
        if not 0 <= self.hamming_distance < self.num_blocks:
            raise ConfigError(
                f"hamming_distance is {self.hamming_distance}; it must be within [0, num_blocks - 1] = "
                f"[0, {self.num_blocks - 1}]"
            )

    def hash(self, text: str) -> int:
        """The SimHash of a text: per bit, what most of its shingles have.

        A text of fewer tokens than the window is one shingle, so that short texts are near only if they are equal.
        """
        if self.lowercase:
            text = text.lower()
        bare = self._punctuation.sub("", text) if self.ignore_punctuation else text
        tokens = self._tokens[self.tokenization].findall(bare) or [text]
        count = max(len(tokens) - self.window_size + 1, 1)
        digests = b"".join(
            hashlib.blake2b(" ".join(tokens[i : i + self.window_size]).encode(), digest_size=8).digest()
            for i in range(count)
        )
        ones = np.unpackbits(np.frombuffer(digests, np.uint8).reshape(-1, 8), axis=1).sum(axis=0, dtype=np.int64)
        return int.from_bytes(np.packbits(ones * 2 > count).tobytes(), "little")


def find_duplicates(
    signatures: np.ndarray, exact: ExactDeduplicator | None, near: SimhashDeduplicator | None
) -> np.ndarray:
    """Decide about every document.

    Args:
        signatures: [documents] SIGNATURE, in input order.
        exact: whether equal texts are duplicates.
        near: whether near ones are, and how near.

    Returns:
        [documents] VERDICT.
    """
    documents = np.arange(len(signatures))
    equal_to = _first_equal(signatures) if exact else documents
    near_to = documents
    if near and len(signatures):
        hashes, of_document = np.unique(signatures["simhash"], return_inverse=True)
        components = _components(hashes, near.num_blocks, near.hamming_distance)[of_document]
        firsts = np.full(len(hashes), len(signatures))
        np.minimum.at(firsts, components, documents)
        near_to = firsts[components]
    originals = near_to[equal_to]
    while not np.array_equal(further := near_to[equal_to[originals]], originals):  # the original of an original
        originals = further
    verdicts = np.zeros(len(signatures), dtype=VERDICT)
    verdicts["kind"] = np.where(equal_to != documents, EXACT, np.where(originals != documents, NEAR, KEPT))
    verdicts["original"] = originals
    verdicts["distance"] = np.bitwise_count(signatures["simhash"] ^ signatures["simhash"][originals])
    return verdicts


def _first_equal(signatures: np.ndarray) -> np.ndarray:
    """For each document the first with the same text, [documents]."""
    order = np.lexsort((signatures["low"], signatures["high"]))  # stable: equal ones stay in input order
    high, low = signatures["high"][order], signatures["low"][order]
    begins = np.ones(len(order), dtype=bool)
    begins[1:] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
    first = np.empty(len(order), dtype=np.int64)
    first[order] = order[np.flatnonzero(begins)][np.cumsum(begins) - 1]
    return first


def _components(hashes: np.ndarray, num_blocks: int, distance: int) -> np.ndarray:
    """For each of different hashes the smallest index in its connected component, [hashes]."""
    parents = np.arange(len(hashes))
    for left, right in near_pairs(hashes, num_blocks, distance):
        _unite(parents, left, right)
    return _roots(parents, np.arange(len(hashes)))


def near_pairs(hashes: np.ndarray, num_blocks: int, distance: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All pairs of hashes that differ in at most ``distance`` bits, some of them more than once.

    Of ``num_blocks`` blocks of bits, at least ``num_blocks - distance`` are equal in such a pair: for each choice of
    that many blocks, hashes that have them equal are compared.

    Args:
        hashes: [hashes] uint64.

    Yields:
        indices, [pairs] and [pairs].
    """
    edges = [64 * block // num_blocks for block in range(num_blocks + 1)]
    blocks = [(1 << end) - (1 << begin) for begin, end in itertools.pairwise(edges)]
    for chosen in itertools.combinations(blocks, num_blocks - distance):
        keys = hashes & np.uint64(sum(chosen))
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        places, step = np.arange(len(keys)), 1
        while len(places):
            places = places[: np.searchsorted(places, len(keys) - step)]
            places = places[keys[places] == keys[places + step]]
            for begin in range(0, len(places), _PAIRS_AT_ONCE):
                some = places[begin : begin + _PAIRS_AT_ONCE]
                left, right = order[some], order[some + step]
                close = np.bitwise_count(hashes[left] ^ hashes[right]) <= distance
                if close.any():
                    yield left[close], right[close]
            step += 1


def _roots(parents: np.ndarray, of: np.ndarray) -> np.ndarray:
    roots = parents[of]
    while (parents[roots] != roots).any():
        roots = parents[roots]
    parents[of] = roots
    return roots


def _unite(parents: np.ndarray, left: np.ndarray, right: np.ndarray) -> None:
    """Put pairs into one component each; a root is the smallest index of its component."""
    while len(left):
        left, right = _roots(parents, left), _roots(parents, right)
        apart = left != right
        left, right = np.minimum(left[apart], right[apart]), np.maximum(left[apart], right[apart])
        np.minimum.at(parents, right, left)
