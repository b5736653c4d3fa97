"""Indexed corpora -> training samples, in an order that depends on nothing but the ledger and the position in it.

A sample is ``sequence_length + 1`` tokens: inputs and, shifted by one, targets. It is cut from concatenated documents,
and the next one begins at its last token, so that every token is predicted once (Megatron's convention).

:func:`micro_batches` divides the work among processes; the samples of a global batch are the same for any number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import numpy as np

from steel_megatron.data.indexed.dataset import IndexedCorpus, Origin, open_indexed
from steel_megatron.data.indexed.labels import has_labels, open_labels
from steel_megatron.data.ledger.ledger import Ledger, OpenCorpora
from steel_megatron.data.sampling.packing import PackedEpoch, samples_of
from steel_megatron.data.sampling.whole import WholeEpoch, WholeSample, padding
from steel_megatron.errors import ConfigError, DataError


class SampleArrays(NamedTuple):
    """Some samples: int64 [samples, sequence_length + 1] each."""

    tokens: np.ndarray
    """Token ids."""
    starts: np.ndarray | None = None
    """For each token the position in the sample of the first one of its document; None if not asked for."""
    labels: np.ndarray | None = None
    """Bits of :data:`~steel_megatron.data.indexed.labels.LABEL`; None where all tokens are predicted."""
    documents: np.ndarray | None = None
    """The number of each token's document, see :func:`document_key`, -1 for padding; None without labels."""


_DOCUMENTS = 1 << 40
"""More documents than a corpus has."""


def document_key(corpus: int, document: int | np.ndarray) -> Any:
    """One number for a document and its corpus.

    Args:
        corpus: number of the corpus: in the ledger, or among those of a validation.
        document: number of the document in it, or several [documents]; -1 stays -1.

    Returns:
        the number, or numbers [documents].
    """
    return np.where(np.asarray(document) < 0, -1, corpus * _DOCUMENTS + document)


def document_of(key: int) -> tuple[int, int]:
    """Corpus and document of a :func:`document_key`."""
    return divmod(key, _DOCUMENTS)


class Samples(Protocol):
    """Numbered samples."""

    @property
    def labelled(self) -> bool:
        """Whether only some of the tokens are predicted: then they are :class:`LabelledSamples`."""
        ...

    def sample(self, number: int) -> np.ndarray:
        """The ids of one sample, int64 [sequence_length + 1]."""
        ...

    def sample_with_starts(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The ids of one sample, and for each the position in the sample of its document's first token: int64
        [sequence_length + 1] both."""
        ...


class LabelledSamples(Samples, Protocol):
    """Numbered samples of whole documents."""

    @property
    def corpora(self) -> Sequence[IndexedCorpus]:
        """The corpora that they are read from."""
        ...

    def whole(self, number: int) -> WholeSample:
        """One sample of whole documents with labels; documents by :func:`document_key`."""
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
        self._epochs: dict[int, tuple[int, PackedEpoch | WholeEpoch]] = {}
        self.labelled = ledger.history.labelled

    @property
    def corpora(self) -> list[IndexedCorpus]:
        """Those that are read from the last sync on, or pending."""
        return [self._corpora[number] for number in self.ledger.history.in_use()]

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

    def whole(self, number: int) -> WholeSample:
        """One sample of whole documents with labels; only padding if the ledger skips it."""
        if self.ledger.history.skips(number):
            return padding(self.ledger.history.sequence_length + 1)
        corpus, epoch, position = self.ledger.history.schedule.locate(number)
        packed = self._packed(corpus, epoch)
        assert isinstance(packed, WholeEpoch)
        sample = packed.whole(position)
        return sample._replace(documents=document_key(corpus, sample.documents))

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

    def _packed(self, corpus: int, epoch: int) -> PackedEpoch | WholeEpoch:
        latest = self._epochs.get(corpus)
        if latest is None or latest[0] != epoch:
            latest = epoch, self.ledger.packed(corpus, epoch, self._corpora[corpus], self._cache)
            self._epochs[corpus] = latest
        return latest[1]


class WholeSamples:
    """The samples of corpora with labels in a fixed order; for validation.

    Args:
        corpora: the corpora, in this order.
        sequence_length: tokens that a sample predicts.
        first: number of the first corpus, for :func:`document_key`.

    Raises:
        DataError: labels cannot be used, or a document is longer than a sample.
    """

    labelled = True

    def __init__(self, corpora: Sequence[IndexedCorpus], sequence_length: int, first: int = 0) -> None:
        self.corpora, self.first = corpora, first
        self._epochs = [WholeEpoch(corpus, open_labels(corpus), sequence_length, (0, 0, 0)) for corpus in corpora]
        self._ends = np.cumsum([len(epoch) for epoch in self._epochs])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def whole(self, number: int) -> WholeSample:
        """One sample of whole documents with labels."""
        corpus = int(np.searchsorted(self._ends, number, side="right"))
        before = int(self._ends[corpus - 1]) if corpus else 0
        sample = self._epochs[corpus].whole(number - before)
        return sample._replace(documents=document_key(self.first + corpus, sample.documents))

    def sample(self, number: int) -> np.ndarray:
        """The ids of sample ``number``: int64 [sequence_length + 1]."""
        return self.whole(number).tokens

    def sample_with_starts(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The ids of a sample, and the position of the first token of each one's text: int64 [sequence_length + 1]."""
        return self.whole(number)[:2]


def validation_samples(
    prefixes: Sequence[str | Path], sequence_length: int, vocab_size: int, first: int = 0
) -> SequentialSamples | WholeSamples:
    """The samples of a validation: of whole documents where the corpora have labels.

    Args:
        prefixes, sequence_length, vocab_size: as for :class:`SequentialSamples`.
        first: as for :class:`WholeSamples`.

    Raises:
        DataError: a corpus cannot be used, or only some have labels.
    """
    corpora = [open_indexed(prefix, vocab_size) for prefix in prefixes]
    labelled = [has_labels(corpus) for corpus in corpora]
    if not any(labelled):
        return SequentialSamples(prefixes, sequence_length, vocab_size)
    if not all(labelled):
        raise DataError(
            f"{corpora[labelled.index(False)].prefix} has no labels, {corpora[labelled.index(True)].prefix} has; "
            "validate them as two sets"
        )
    return WholeSamples(corpora, sequence_length, first)


class SequentialSamples:
    """Samples in the order of the documents, each token predicted at most once; for validation.

    Args:
        prefixes: corpora, in this order.
        sequence_length: tokens that a sample predicts.
        vocab_size: every token id must be below it.

    Raises:
        DataError: a corpus cannot be used, or all together are shorter than one sample.
    """

    labelled = False

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


def read_samples(stream: Samples, numbers: Sequence[int], with_starts: bool) -> SampleArrays:
    """Some samples as arrays.

    Args:
        stream: the samples.
        numbers: which of them, at least one.
        with_starts: whether to return the document starts as well.

    Returns:
        the arrays, [len(numbers), sequence_length + 1] each; those with labels have starts in any case.
    """
    if stream.labelled:
        labelled = cast(LabelledSamples, stream)
        return SampleArrays(*map(np.stack, zip(*(labelled.whole(number) for number in numbers), strict=True)))
    if not with_starts:
        return SampleArrays(np.stack([stream.sample(number) for number in numbers]))
    tokens, starts = zip(*(stream.sample_with_starts(number) for number in numbers), strict=True)
    return SampleArrays(np.stack(tokens), np.stack(starts))
