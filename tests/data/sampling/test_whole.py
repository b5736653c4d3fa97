"""Whole documents in samples, placed by best fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from steel_megatron.data.indexed.dataset import open_indexed
from steel_megatron.data.indexed.exact_duplicates import drop_bits
from steel_megatron.data.indexed.labels import LABEL, SECOND
from steel_megatron.data.sampling.whole import WholeEpoch, best_fit, whole_samples
from steel_megatron.errors import DataError
from tests.data.corpora import write

LENGTH = 12


def epoch_of(folder: Path, documents: list[list[int]], labels: list[list[int]], number: int = 0) -> WholeEpoch:
    corpus = open_indexed(write(folder / "ids", documents, overwrite=True))
    flags = open_indexed(write(folder / "labels", labels, overwrite=True))
    return WholeEpoch(corpus, flags, LENGTH, (1, 2, number))


def documents_of(seed: int, count: int = 60) -> list[list[int]]:
    sizes = np.random.default_rng(seed).integers(0, LENGTH + 1, count)
    return [[100 * number + place for place in range(size)] for number, size in enumerate(sizes.tolist())]


def test_best_fit_takes_the_fullest_sample_that_has_room() -> None:
    assert best_fit(np.array([6, 5, 4, 3, 2]), 10).tolist() == [0, 1, 0, 1, 1]
    assert best_fit(np.array([], dtype=np.int64), 10).tolist() == []


def test_an_epoch_holds_every_document_once_and_whole(tmp_path: Path) -> None:
    documents = documents_of(0)
    labels = [[LABEL * (place % 2) for place, _ in enumerate(document)] for document in documents]
    orders = set()
    for number in range(3):
        epoch = epoch_of(tmp_path, documents, labels, number)
        assert len(epoch) == whole_samples(epoch.corpus, LENGTH) < 40
        found: list[int] = []
        for at in range(len(epoch)):
            sample = epoch.whole(at)
            assert all(len(values) == LENGTH + 1 for values in sample)
            end = 0
            for document in [span.document for span in epoch.spans(at)]:
                own = slice(end, end + len(documents[document]))
                assert sample.tokens[own].tolist() == documents[document]
                assert sample.labels[own].tolist() == labels[document]
                assert set(sample.starts[own]) == {end} and set(sample.documents[own]) == {document}
                found.append(document)
                end = own.stop
            assert end <= LENGTH  # the last token is an input as well
            assert not sample.labels[end:].any() and set(sample.starts[end:]) == {end}
            assert set(sample.documents[end:]) == {-1}
        assert sorted(found) == [number for number, document in enumerate(documents) if document]
        orders.add(tuple(found))
    assert len(orders) == 3


def test_the_second_text_of_a_pair_begins_anew(tmp_path: Path) -> None:
    epoch = epoch_of(tmp_path, [[1, 2, 3, 4, 5]], [[0, LABEL, SECOND, LABEL, LABEL]])
    assert epoch.whole(0).starts.tolist() == [0, 0, 2, 2, 2, *[5] * 8]


def test_dropped_documents_are_in_no_sample(tmp_path: Path) -> None:
    documents = documents_of(1)
    epoch = epoch_of(tmp_path, documents, documents)
    dropped = drop_bits(np.arange(len(documents)) % 2 == 0)
    half = WholeEpoch(epoch.corpus, epoch.labels, LENGTH, (1, 2, 3), dropped)
    numbers = {span.document for at in range(len(half)) for span in half.spans(at)}
    assert numbers and all(number % 2 for number in numbers)
    assert len(half) == whole_samples(epoch.corpus, LENGTH, dropped) < len(epoch)


def test_a_document_that_is_too_long_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"document 1 has 13 tokens, more than the 12 .* --max_tokens 12"):
        epoch_of(tmp_path, [[1], list(range(13))], [[1], [1] * 13])
