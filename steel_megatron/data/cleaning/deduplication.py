"""Exact and near duplicates across all sources, from signatures alone.

A document's signature is a hash of its normalised text and a SimHash of its shingles. Signatures are made document by
document, in any number of processes; :func:`find_duplicates` needs all of them at once, some 300 bytes a
document, and never a text. Of documents that are alike the first in input order is kept.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from steel_megatron.errors import ConfigError

SIGNATURE = np.dtype([("file", "<u8"), ("row", "<u8"), ("high", "<u8"), ("low", "<u8"), ("simhash", "<u8")])
"""The document's file by its number, and its row there; 128 bits of the hash of its normalised text; its SimHash."""

VERDICT = np.dtype([("kind", "u1"), ("distance", "u1"), ("original", "<i8")])
"""One of KEPT, EXACT, NEAR; bits by which its SimHash differs from the original's; the original's index."""
KEPT, EXACT, NEAR = 0, 1, 2

BYTES_A_DOCUMENT = 320
"""Memory that :func:`find_duplicates` and its caller need for each document."""

_PAIRS_AT_ONCE = 1 << 20
_FIRST_STEPS, _MORE_STEPS = 16, 8
_MANY_PAIRS = 512
"""Comparisons a hash, in one bucket, above which cutting the bucket again takes less time."""
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
        components = near_components(hashes, near.num_blocks, near.hamming_distance)[of_document]
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


def near_components(hashes: np.ndarray, num_blocks: int, distance: int) -> np.ndarray:
    """Connected components of hashes, where those that differ in at most ``distance`` bits are connected.

    Args:
        hashes: [hashes] uint64, no two equal.
        num_blocks: in how many blocks their bits are cut, more than ``distance``.
        distance: bits.

    Returns:
        for each hash the smallest index in its component, [hashes].
    """
    components = _Components(hashes, num_blocks, distance)
    components.link(np.arange(len(hashes)), range(64))
    return components.roots(np.arange(len(hashes)))


class _Components:
    """The components as they grow.

    Of ``num_blocks`` blocks of bits, at least ``num_blocks - distance`` are equal in a near pair: for each choice of
    that many blocks, hashes that have them equal (a bucket) are compared. Two things keep that from being quadratic
    in documents made from one template, whose hashes share many bits: what is in one component already is not
    compared, and a bucket with too much left to compare is cut again, by the bits that may still differ in it.
    """

    def __init__(self, hashes: np.ndarray, num_blocks: int, distance: int) -> None:
        self._hashes, self._num_blocks, self._distance = hashes, num_blocks, distance
        self._parents = np.arange(len(hashes))

    def roots(self, of: np.ndarray) -> np.ndarray:
        """The smallest index in the component of each of some hashes."""
        roots = self._parents[of]
        while not np.array_equal(further := self._parents[roots], roots):
            roots = further
        self._parents[of] = roots
        return roots

    def link(self, places: np.ndarray, bits: Sequence[int]) -> None:
        """Unite all that are near among some hashes, which are equal but for some bits."""
        edges = [len(bits) * block // self._num_blocks for block in range(self._num_blocks + 1)]
        blocks = [bits[begin:end] for begin, end in itertools.pairwise(edges)]
        for chosen in itertools.combinations(blocks, self._num_blocks - self._distance):
            equal = set(itertools.chain(*chosen))
            free = [bit for bit in bits if bit not in equal]
            left, steps = places, _FIRST_STEPS
            while len(left):
                left = self._link_equal(left, sum(1 << bit for bit in equal), free, steps)
                steps *= _MORE_STEPS

    def _link_equal(self, places: np.ndarray, mask: int, free: Sequence[int], steps: int) -> np.ndarray:
        """Unite what is near and has the masked bits equal; give back the buckets that are not done.

        Each hash is compared with ``steps`` others, so that hashes that are near many soon are in one component.
        """
        places, keys = self._in_buckets(places, np.uint64(mask))
        begins = _begins(keys)
        sizes = np.diff(begins, append=len(keys))
        ends = np.repeat(begins + sizes, sizes)
        runs = _begins(keys, self.roots(places))  # of one component in one bucket
        members = np.diff(runs, append=len(keys))
        first = np.repeat(runs + members, members)
        # Each is to be compared with those from first, where its own component ends, to the end of its bucket.
        if steps > _FIRST_STEPS and len(free) >= 2 * self._num_blocks and len(begins):
            pairs = np.add.reduceat(ends - first, begins)
            for bucket in np.flatnonzero(pairs > _MANY_PAIRS * sizes):
                inside = slice(begins[bucket], begins[bucket] + sizes[bucket])
                self.link(places[inside], free)
                first[inside] = ends[inside]
        left = np.zeros(len(begins), dtype=bool)
        left[np.searchsorted(begins, self._compare(places, first, ends, steps), side="right") - 1] = True
        return places[np.repeat(left, sizes)]

    def _in_buckets(self, places: np.ndarray, mask: np.uint64) -> tuple[np.ndarray, np.ndarray]:
        """Those that share their bucket with others, by bucket and in it by component, the largest first; its keys."""
        keys = self._hashes[places] & mask
        order = np.argsort(keys, kind="stable")
        places, keys = places[order], keys[order]
        sizes = np.diff(_begins(keys), append=len(keys))
        shared = np.repeat(sizes > 1, sizes)
        places, keys = places[shared], keys[shared]
        roots = self.roots(places)
        _, of_place, members = np.unique(roots, return_inverse=True, return_counts=True)
        order = np.lexsort((of_place, -members[of_place], keys))
        return places[order], keys[order]

    def _compare(self, places: np.ndarray, first: np.ndarray, ends: np.ndarray, steps: int) -> np.ndarray:
        """Compare each place with ``steps`` others from ``first`` on; which ones have more left, as indices."""
        hashes = self._hashes[places]
        active = np.flatnonzero(first < ends)
        for step in range(steps):
            if not len(active):
                break
            for begin in range(0, len(active), _PAIRS_AT_ONCE):
                some = active[begin : begin + _PAIRS_AT_ONCE]
                others = first[some] + step
                close = np.bitwise_count(hashes[some] ^ hashes[others]) <= self._distance
                self._unite(places[some[close]], places[others[close]])
            active = active[first[active] + step + 1 < ends[active]]
        return active

    def _unite(self, left: np.ndarray, right: np.ndarray) -> None:
        """Put pairs into one component each; a root is the smallest index of its component."""
        while len(left):
            left, right = self.roots(left), self.roots(right)
            apart = left != right
            left, right = np.minimum(left[apart], right[apart]), np.maximum(left[apart], right[apart])
            np.minimum.at(self._parents, right, left)


def _begins(*columns: np.ndarray) -> np.ndarray:
    """Where a row differs from the row before, the first one included."""
    changes = np.zeros(len(columns[0]), dtype=bool)
    changes[:1] = True
    for column in columns:
        changes[1:] |= column[1:] != column[:-1]
    return np.flatnonzero(changes)
