"""Indexed corpora -> training samples, in an order that depends on nothing but data and seed.

A sample is ``sequence_length + 1`` tokens: inputs and, shifted by one, targets. It is cut from the concatenation of
documents, and the next one begins at its last token, so that every token is predicted once (Megatron's convention).

How many processes share the work is decided afterwards, by :func:`micro_batches`; the samples of a global batch are
the same for any number.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from steel_megatron.data.indexed import IndexedCorpus, open_indexed
from steel_megatron.errors import ConfigError, DataError


class Samples(Protocol):
    """Numbered samples."""

    def sample(self, number: int) -> np.ndarray:
        """The ids of one sample, int64 [sequence_length + 1]."""
        ...


class _Concatenation:
    """Documents of several corpora laid end to end in a given order."""

    def __init__(self, corpora: Sequence[IndexedCorpus], order: np.ndarray) -> None:
        self._corpora = corpora
        self._first_document = np.cumsum([0] + [corpus.documents for corpus in corpora])
        self._order = order  # numbers of documents, counted over all corpora
        sizes = np.concatenate([corpus.sizes for corpus in corpora])[order]
        self._ends = np.cumsum(sizes, dtype=np.int64)

    def read(self, start: int, length: int) -> np.ndarray:
        """Tokens ``start`` to ``start + length`` as int64."""
        tokens = np.empty(length, dtype=np.int64)
        place = int(np.searchsorted(self._ends, start, side="right"))
        filled = 0
        while filled < length:
            document = int(self._order[place])
            corpus = int(np.searchsorted(self._first_document, document, side="right")) - 1
            within = document - int(self._first_document[corpus])
            size = int(self._corpora[corpus].sizes[within])
            offset = start + filled - (int(self._ends[place]) - size)
            taken = min(size - offset, length - filled)
            tokens[filled : filled + taken] = self._corpora[corpus].tokens_of(within, offset, taken)
            filled += taken
            place += 1
        return tokens


def document_starts(tokens: np.ndarray, eod_id: int) -> np.ndarray:
    """For every token, the position of the first token of its document; a document ends with its end-of-document id.

    Args:
        tokens: int64 [B, T].
        eod_id: the id.

    Returns:
        int64 [B, T].
    """
    begins = np.zeros_like(tokens)
    begins[:, 1:] = np.where(tokens[:, :-1] == eod_id, np.arange(1, tokens.shape[1]), 0)
    starts: np.ndarray = np.maximum.accumulate(begins, axis=1)
    return starts


def end_of_document_id(corpora: Sequence[IndexedCorpus]) -> int:
    """The id with which the documents of all these corpora end.

    Raises:
        DataError: a corpus does not say, its documents were written without, or they differ.
    """
    ids: dict[int, str] = {}
    for corpus in corpora:
        manifest = corpus.manifest or {}
        eod_id = manifest.get("tokenizer", {}).get("eod_id")
        if not isinstance(eod_id, int) or not manifest.get("append_eod"):
            raise DataError(
                f"{corpus.prefix} has no manifest that says which id ends its documents, which data.reset_at_eod "
                "needs; make it by preprocess with append_eod"
            )
        ids[eod_id] = corpus.prefix
    if len(ids) != 1:
        raise DataError(f"documents end with different ids: {', '.join(f'{id} in {at}' for id, at in ids.items())}")
    return next(iter(ids))


def _open(prefixes: Sequence[str | Path], sequence_length: int, vocab_size: int) -> tuple[list[IndexedCorpus], int]:
    """The corpora and how many whole samples they hold."""
    if sequence_length < 1:
        raise ConfigError(f"sequence_length is {sequence_length}; it must be at least 1")
    if not prefixes:
        raise DataError("no corpus was given; name at least one prefix of .bin and .idx files")
    corpora = [open_indexed(prefix, vocab_size) for prefix in prefixes]
    tokens = sum(corpus.tokens for corpus in corpora)
    samples = (tokens - 1) // sequence_length
    if samples == 0:
        raise DataError(
            f"{', '.join(corpus.prefix for corpus in corpora)}: {tokens:,} tokens make no sample of sequence_length + "
            f"1 = {sequence_length + 1:,} tokens; shorten the sequence or take more text"
        )
    return corpora, samples


def _permutation(count: int, seed: int, epoch: int, purpose: int) -> np.ndarray:
    """A random order of ``range(count)``.

    Sorted by raw numbers of a counter-based generator: those stay the same in every version of numpy, which the
    methods of ``numpy.random.Generator`` do not promise, and a resumed run must see the same order.
    """
    key, counter = np.array([seed, epoch], dtype=np.uint64), np.array([0, 0, 0, purpose], dtype=np.uint64)
    keys = np.random.Philox(key=key, counter=counter).random_raw(count)
    return np.argsort(keys, kind="stable").astype(np.int64 if count > np.iinfo(np.int32).max else np.int32)


@dataclass(frozen=True)
class _Epoch:
    """One pass over all documents in an order of its own."""

    number: int
    text: _Concatenation
    sample_order: np.ndarray


class SampleStream:
    """Shuffled samples without end, epoch after epoch.

    In each epoch the documents are laid end to end in a new order, cut into samples, and the samples shuffled; the
    last, incomplete one is dropped. Which tokens sample ``n`` has is a function of the corpora, the seed, the sequence
    length and ``n`` alone. Memory holds the index of one epoch.

    Args:
        prefixes: corpora, in this order.
        sequence_length: tokens that a sample predicts.
        seed: of the orders, from 0 on.
        vocab_size: every token id must be below it.

    Raises:
        DataError: a corpus cannot be used, or all together are shorter than one sample.
    """

    def __init__(self, prefixes: Sequence[str | Path], sequence_length: int, seed: int, vocab_size: int) -> None:
        if not 0 <= seed < 2**64:
            raise ConfigError(f"seed is {seed}; it must be at least 0 and below 2**64")
        self.sequence_length = sequence_length
        self.seed = seed
        self.corpora, self.samples_per_epoch = _open(prefixes, sequence_length, vocab_size)
        self._epoch = self._make_epoch(0)

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of everything the order of samples depends on; wherever the corpora lie."""
        content = [_content_fingerprint(corpus) for corpus in self.corpora]
        return hashlib.sha256(json.dumps([content, self.sequence_length, self.seed]).encode()).hexdigest()

    def sample(self, number: int) -> np.ndarray:
        """The ids of sample ``number``, counted from 0 over all epochs: int64 [sequence_length + 1]."""
        assert number >= 0, number
        epoch, place = divmod(number, self.samples_per_epoch)
        if epoch != self._epoch.number:
            self._epoch = self._make_epoch(epoch)
        start = int(self._epoch.sample_order[place]) * self.sequence_length
        return self._epoch.text.read(start, self.sequence_length + 1)

    def _make_epoch(self, number: int) -> _Epoch:
        documents = sum(corpus.documents for corpus in self.corpora)
        document_order = _permutation(documents, self.seed, number, purpose=0)
        sample_order = _permutation(self.samples_per_epoch, self.seed, number, purpose=1)
        return _Epoch(number, _Concatenation(self.corpora, document_order), sample_order)


def _content_fingerprint(corpus: IndexedCorpus) -> str:
    """What a corpus holds: its recorded checksums, or for one without a manifest the sizes of its documents."""
    if corpus.manifest is not None:
        return f"{corpus.manifest['sha256']['bin']}:{corpus.manifest['sha256']['idx']}"
    digest = hashlib.sha256(f"{corpus.dtype}:{corpus.documents}:{corpus.tokens}".encode())
    digest.update(np.ascontiguousarray(corpus.sizes, dtype=np.int64).data)
    return digest.hexdigest()


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
        self.sequence_length = sequence_length
        self.corpora, self._count = _open(prefixes, sequence_length, vocab_size)
        self._text = _Concatenation(self.corpora, np.arange(sum(corpus.documents for corpus in self.corpora)))

    def __len__(self) -> int:
        return self._count

    def sample(self, number: int) -> np.ndarray:
        """The ids of sample ``number``, from 0 to ``len(self) - 1``: int64 [sequence_length + 1]."""
        if not 0 <= number < self._count:
            raise IndexError(f"sample {number} of {self._count}")
        return self._text.read(number * self.sequence_length, self.sequence_length + 1)


def micro_batches(
    stream: Samples,
    first_sample: int,
    global_batch_size: int,
    micro_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
) -> list[np.ndarray]:
    """One rank's share of a global batch.

    The global batch is the samples ``first_sample`` to ``first_sample + global_batch_size``, whatever the ranks. Each
    step of gradient accumulation takes the next ``micro_batch_size * data_parallel_size`` of them, in order of rank.

    Returns:
        ``global_batch_size / (micro_batch_size * data_parallel_size)`` arrays
        int64 [micro_batch_size, sequence_length + 1].

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
    return [
        np.stack([stream.sample(start + index) for index in range(micro_batch_size)])
        for start in range(mine, mine + global_batch_size, step)
    ]
