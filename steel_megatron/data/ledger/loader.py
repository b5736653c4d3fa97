"""Indexed corpora -> training samples, in an order that depends on nothing but the ledger and the position in it.

A sample is ``sequence_length + 1`` tokens: inputs and, shifted by one, targets. It is cut from concatenated documents,
and the next one begins at its last token, so that every token is predicted once (Megatron's convention).

:func:`micro_batches` divides the work among processes; the samples of a global batch are the same for any number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from steel_megatron.data.indexed.dataset import Origin, open_indexed
from steel_megatron.data.ledger.ledger import Ledger, OpenCorpora
from steel_megatron.data.sampling.packing import PackedEpoch, samples_of
from steel_megatron.errors import ConfigError, DataError


class Samples(Protocol):
    """Numbered samples."""

    def sample(self, number: int) -> np.ndarray:
        """The ids of one sample, int64 [sequence_length + 1]."""
        ...

    def sample_with_starts(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The ids of one sample, and for each the position in the sample of its document's first token: int64
        [sequence_length + 1] both."""
        ...


@dataclass(frozen=True)
class DocumentSpan:
    """A contiguous span of a document in a sample."""

    corpus: str
    """Name of the corpus in the ledger."""
    document: int
    """Number of the document in its corpus."""
    origin: Origin | None
    """The file and row it came from; None if not recorded."""
    offset: int
    """The document's token with which the span begins."""
    ids: tuple[int, ...]
    """The token ids of the span."""


class LedgerSamples:
    """The training samples of a ledger, numbered in the order in which a run reads them.

    The tokens of sample ``n`` depend on the ledger and ``n`` alone. For each corpus, the index of the epoch used last
    is kept.

    Args:
        ledger: the ledger.
        vocab_size: every token id must be below it; None to leave ids unchecked.
        cache: folder for the indices of samples, shared by processes; None to keep them in memory.

    Raises:
        DataError: a corpus cannot be used, or differs from the ledger's record.
    """

    def __init__(self, ledger: Ledger, vocab_size: int | None = None, cache: Path | None = None) -> None:
        self._arguments = ledger, vocab_size, cache
        self.ledger = ledger
        self._corpora = OpenCorpora(ledger, vocab_size)
        self._cache = cache
        self._epochs: dict[int, tuple[int, PackedEpoch]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return LedgerSamples, self._arguments  # another process maps the files itself

    def sample(self, number: int) -> np.ndarray:
        """The ids of sample ``number``, from 0: int64 [sequence_length + 1]; zeros if the ledger skips it.

        Raises:
            DataError: the ledger has no such sample.
        """
        if self.ledger.history.skips(number):
            return self._in_place_of_skipped()
        corpus, epoch, position = self.ledger.history.schedule.locate(number)
        return self._packed(corpus, epoch).tokens(position)

    def sample_with_starts(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The ids of a sample, and for each the position in the sample of its document's first token."""
        if self.ledger.history.skips(number):
            return self._in_place_of_skipped(), self._in_place_of_skipped()
        corpus, epoch, position = self.ledger.history.schedule.locate(number)
        return self._packed(corpus, epoch).with_starts(position)

    def documents(self, number: int) -> list[DocumentSpan]:
        """The spans of documents that a sample consists of, in order.

        Raises:
            DataError: the ledger has no such sample.
        """
        number_of_corpus, epoch, position = self.ledger.history.schedule.locate(number)
        name, corpus = self.ledger.history.corpora[number_of_corpus].name, self._corpora[number_of_corpus]
        return [
            DocumentSpan(
                name,
                span.document,
                corpus.origin(span.document),
                span.offset,
                tuple(corpus.tokens_of(*span).tolist()),
            )
            for span in self._packed(number_of_corpus, epoch).spans(position)
        ]

    def numbers_of_documents(self, begin: int, end: int) -> dict[str, list[int]]:
        """The numbers of the documents that the samples ``begin`` to before ``end`` consist of, by corpus.

        Raises:
            DataError: the ledger has no such sample.
        """
        found: dict[str, set[int]] = {}
        for number in range(begin, end):
            corpus, epoch, position = self.ledger.history.schedule.locate(number)
            own = found.setdefault(self.ledger.history.corpora[corpus].name, set())
            own.update(span.document for span in self._packed(corpus, epoch).spans(position))
        return {name: sorted(numbers) for name, numbers in sorted(found.items())}

    def _in_place_of_skipped(self) -> np.ndarray:
        return np.zeros(self.ledger.history.sequence_length + 1, dtype=np.int64)

    def prepare(self, begin: int, end: int) -> None:
        """Make the indices that samples ``begin`` to before ``end`` need."""
        corpora, epochs, _ = self.ledger.history.schedule.locate_range(begin, end)
        for corpus, epoch in sorted(set(zip(corpora.tolist(), epochs.tolist(), strict=True)), reverse=True):
            self._packed(corpus, epoch)

    def _packed(self, corpus: int, epoch: int) -> PackedEpoch:
        latest = self._epochs.get(corpus)
        if latest is None or latest[0] != epoch:
            latest = epoch, self.ledger.packed(corpus, epoch, self._corpora[corpus], self._cache)
            self._epochs[corpus] = latest
        return latest[1]


class SequentialSamples:
    """Samples in the order of the documents, each token predicted at most once; for validation.

    Args:
        prefixes: corpora, in this order.
        sequence_length: tokens that a sample predicts.
        vocab_size: every token id must be below it.

    Raises:
        DataError: a corpus cannot be used, or all together are shorter than one sample.
    """

    def __init__(self, prefixes: Sequence[str | Path], sequence_length: int, vocab_size: int) -> None:
        if sequence_length < 1:
            raise ConfigError(f"sequence_length is {sequence_length}; it must be at least 1")
        if not prefixes:
            raise DataError("no corpus was given; name at least one prefix of .bin and .idx files")
        self.sequence_length = sequence_length
        self.corpora = [open_indexed(prefix, vocab_size) for prefix in prefixes]
        self._ends = np.cumsum(np.concatenate([corpus.sizes for corpus in self.corpora]), dtype=np.int64)
        self._firsts = np.cumsum([0, *(corpus.tokens for corpus in self.corpora)])
        tokens = int(self._firsts[-1])
        self._count = samples_of(tokens, sequence_length)
        if self._count == 0:
            raise DataError(
                f"{', '.join(corpus.prefix for corpus in self.corpora)}: {tokens:,} tokens make no sample of "
                f"sequence_length + 1 = {sequence_length + 1:,} tokens; shorten the sequence or use more text"
            )

    def __len__(self) -> int:
        return self._count

    def sample(self, number: int) -> np.ndarray:
        """The ids of sample ``number``, from 0 to ``len(self) - 1``: int64 [sequence_length + 1]."""
        if not 0 <= number < self._count:
            raise IndexError(f"sample {number} of {self._count}")
        start, stop = number * self.sequence_length, (number + 1) * self.sequence_length + 1
        spans = [
            corpus.flat[max(start - first, 0) : max(stop - first, 0)]
            for corpus, first in zip(self.corpora, self._firsts.tolist(), strict=False)
        ]
        return np.concatenate(spans, dtype=np.int64)

    def sample_with_starts(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The ids of a sample, and for each the position in the sample of its document's first token."""
        tokens = self.sample(number)
        start = number * self.sequence_length
        first, last = np.searchsorted(self._ends, (start, start + len(tokens)), side="right")
        begins = self._ends[first:last] - start  # of all documents but the first
        starts = np.zeros(len(tokens), dtype=np.int64)
        inside = begins[begins < len(tokens)]
        starts[inside] = inside
        return tokens, np.maximum.accumulate(starts)


def micro_batches(
    first_sample: int, global_batch_size: int, micro_batch_size: int, data_parallel_rank: int, data_parallel_size: int
) -> list[range]:
    """One rank's share of a global batch.

    The global batch is the samples ``first_sample`` to before ``first_sample + global_batch_size``, for any number of
    ranks. Each step of gradient accumulation takes the next ``micro_batch_size * data_parallel_size`` of them, in order
    of rank.

    Args:
        first_sample: number of the global batch's first sample.
        global_batch_size: samples of an optimizer step, over all ranks.
        micro_batch_size: samples that a rank computes at a time.
        data_parallel_rank: this rank, from 0.
        data_parallel_size: number of data-parallel ranks.

    Returns:
        the numbers of the samples of each of the rank's micro batches, in order.

    Raises:
        ConfigError: the sizes do not divide.
    """
    assert 0 <= data_parallel_rank < data_parallel_size, (data_parallel_rank, data_parallel_size)
    step = micro_batch_size * data_parallel_size
    if micro_batch_size < 1 or global_batch_size < 1 or global_batch_size % step:
        raise ConfigError(
            f"global_batch_size = {global_batch_size} must be a multiple of micro_batch_size * data_parallel_size = "
            f"{micro_batch_size} * {data_parallel_size} = {step}"
        )
    mine = first_sample + data_parallel_rank * micro_batch_size
    return [range(start, start + micro_batch_size) for start in range(mine, mine + global_batch_size, step)]


def read_samples(stream: Samples, numbers: Sequence[int], with_starts: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """Some samples as arrays.

    Args:
        stream: the samples.
        numbers: which of them, at least one.
        with_starts: whether to return the document starts as well.

    Returns:
        the ids, and for each the position in the sample of its document's first token, or None if not asked for: int64
        [len(numbers), sequence_length + 1] both.
    """
    if not with_starts:
        return np.stack([stream.sample(number) for number in numbers]), None
    tokens, starts = zip(*(stream.sample_with_starts(number) for number in numbers), strict=True)
    return np.stack(tokens), np.stack(starts)
