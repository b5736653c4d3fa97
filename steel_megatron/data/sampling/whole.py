"""One epoch of a corpus whose documents stay whole: best-fit packing, for conversations and preference pairs.

A sample is ``sequence_length + 1`` tokens, as everywhere, but holds whole documents only, in its first
``sequence_length``: every token of a document is an input, as it is where the document has a sequence to itself. What
is left is padding, a document of its own without labels. Documents are placed from the longest to the shortest, each
into the fullest sample that has room for it (best-fit decreasing). How many samples an epoch has depends on the lengths
alone; which of the documents of one length goes where, and the order of the samples, depend on the epoch.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import NamedTuple

import numpy as np

from steel_megatron.data.indexed.dataset import IndexedCorpus
from steel_megatron.data.indexed.exact_duplicates import bits_of
from steel_megatron.data.indexed.labels import SECOND
from steel_megatron.data.sampling.packing import PackedSpan, documents_of
from steel_megatron.data.sampling.permutation import Permutation
from steel_megatron.errors import DataError


class WholeSample(NamedTuple):
    """One sample of whole documents."""

    tokens: np.ndarray
    """Token ids, int64 [sequence_length + 1]; zeros where there is padding."""
    starts: np.ndarray
    """For each token the position of the first one of its text, int64 [sequence_length + 1]."""
    labels: np.ndarray
    """Bits such as :data:`~steel_megatron.data.indexed.labels.LABEL` of each token, int64 [sequence_length + 1]."""
    documents: np.ndarray
    """The number of each token's document in its corpus, int64 [sequence_length + 1]; -1 for padding."""


def padding(size: int) -> WholeSample:
    """A sample of so many tokens without any document."""
    zeros = np.zeros(size, dtype=np.int64)
    return WholeSample(zeros, zeros, zeros, zeros - 1)


class WholeEpoch:
    """The samples of one epoch of a corpus with labels.

    Args:
        corpus: the corpus.
        labels: what is to be done with its tokens; of the same documents.
        sequence_length: tokens that a sample predicts.
        key: 64-bit numbers: seed, identity of the corpus, number of the epoch.
        dropped: documents to leave out, as bits of :func:`~steel_megatron.data.indexed.exact_duplicates.drop_bits`;
            None for none.

    Raises:
        DataError: a document is longer than a sample.
    """

    def __init__(
        self,
        corpus: IndexedCorpus,
        labels: IndexedCorpus,
        sequence_length: int,
        key: tuple[int, ...],
        dropped: np.ndarray | None = None,
    ) -> None:
        self.corpus, self.labels, self.sequence_length = corpus, labels, sequence_length
        order = Permutation(corpus.documents, (*key, 0)).many(np.arange(corpus.documents))
        longest_first = order[np.argsort(-corpus.sizes[order].astype(np.int64), kind="stable")]
        kept = longest_first[~_left_out(corpus, dropped)[longest_first]]
        places = best_fit(_checked(corpus, kept, sequence_length), sequence_length)
        self.samples = int(places.max(initial=-1)) + 1
        by_sample = np.argsort(places, kind="stable")
        self._documents = kept[by_sample]
        self._ends = np.searchsorted(places[by_sample], np.arange(self.samples), side="right")
        self._order = Permutation(self.samples, (*key, 1))

    def __len__(self) -> int:
        return self.samples

    def spans(self, number: int) -> list[PackedSpan]:
        """The documents that sample ``number`` of the shuffled order consists of."""
        at = self._order(number)
        first = int(self._ends[at - 1]) if at else 0
        numbers = self._documents[first : self._ends[at]].tolist()
        return [PackedSpan(document, 0, int(self.corpus.sizes[document])) for document in numbers]

    def whole(self, number: int) -> WholeSample:
        """Sample ``number`` of the shuffled order."""
        sample = WholeSample(*(values.copy() for values in padding(self.sequence_length + 1)))
        begin = 0
        for document, _, length in self.spans(number):
            own = slice(begin, begin + length)
            sample.tokens[own], sample.documents[own] = self.corpus.document(document), document
            sample.labels[own], sample.starts[own] = self.labels.document(document), begin
            begin += length
        sample.starts[begin:] = begin
        second = np.flatnonzero(sample.labels & SECOND)
        sample.starts[second] = second
        return sample._replace(starts=np.maximum.accumulate(sample.starts))

    def tokens(self, number: int) -> np.ndarray:
        """The ids of sample ``number`` of the shuffled order: int64 [sequence_length + 1]."""
        return self.whole(number).tokens

    def with_starts(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The ids of a sample, and the position of the first token of each one's text: int64 [sequence_length + 1]."""
        sample = self.whole(number)
        return sample.tokens, sample.starts

    def documents_of(self, samples: int) -> np.ndarray:
        """The documents in the first samples of the order.

        Returns:
            their bits, as of :func:`~steel_megatron.data.indexed.exact_duplicates.drop_bits`.
        """
        return documents_of(self.corpus, map(self.spans, range(samples)))


def whole_samples(corpus: IndexedCorpus, sequence_length: int, dropped: np.ndarray | None = None) -> int:
    """How many samples an epoch of whole documents has.

    Args:
        corpus: the corpus.
        sequence_length: tokens that a sample predicts.
        dropped: as for :class:`WholeEpoch`.

    Raises:
        DataError: a document is longer than a sample.
    """
    kept = np.flatnonzero(~_left_out(corpus, dropped))
    sizes = np.sort(_checked(corpus, kept, sequence_length))[::-1]
    return int(best_fit(sizes, sequence_length).max(initial=-1)) + 1


def best_fit(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """Place documents, in the order given, each into the fullest sample that has room.

    Args:
        sizes: tokens of each, at most ``capacity`` [documents].
        capacity: tokens of a sample.

    Returns:
        the sample of each, from 0, int64 [documents].
    """
    places = np.empty(len(sizes), dtype=np.int64)
    by_room: dict[int, list[int]] = {}
    rooms: list[int] = []  # the keys of by_room, in order
    count = 0
    for number, size in enumerate(sizes.tolist()):
        at = bisect_left(rooms, size)
        if at == len(rooms):
            place, room = count, capacity
            count += 1
        else:
            room = rooms[at]
            place = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[at]
        places[number] = place
        left = room - size
        if left not in by_room:
            by_room[left] = []
            insort(rooms, left)
        by_room[left].append(place)
    return places


def _left_out(corpus: IndexedCorpus, dropped: np.ndarray | None) -> np.ndarray:
    """Which documents are in no sample, bool [documents]."""
    empty: np.ndarray = corpus.sizes == 0
    return empty if dropped is None else empty | bits_of(dropped, 0, corpus.documents)


def _checked(corpus: IndexedCorpus, documents: np.ndarray, sequence_length: int) -> np.ndarray:
    """The sizes of documents, each of which fits into a sample: int64 [documents]."""
    sizes = corpus.sizes[documents].astype(np.int64)
    if len(sizes) and int(sizes.max()) > sequence_length:
        longest = documents[int(sizes.argmax())]
        raise DataError(
            f"{corpus.prefix}: document {longest} has {int(sizes.max()):,} tokens, more than the {sequence_length:,} "
            "of a sequence, and documents with labels are never cut; prepare them with --max_tokens "
            f"{sequence_length}, or raise model.sequence_length"
        )
    return sizes
