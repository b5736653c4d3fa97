"""Samples: equal to a plain reference, each token used once, the same for any number of processes."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steel_megatron.data.indexed_writer import IndexedWriter
from steel_megatron.data.loader import SampleStream, SequentialSamples, micro_batches
from steel_megatron.errors import ConfigError, DataError


def write(prefix: Path, documents: list[list[int]], dtype: type = np.int32) -> str:
    with IndexedWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(document)
        writer.finalize({})
    return str(prefix)


def distinct_documents(lengths: list[int], first: int = 0) -> list[list[int]]:
    """Documents whose tokens are all different, so that a token tells where it is from."""
    ends = np.cumsum([first, *lengths])
    return [list(range(start, end)) for start, end in itertools.pairwise(ends)]


@pytest.fixture
def prefixes(tmp_path: Path) -> list[str]:
    first = distinct_documents([3, 0, 17, 1, 40, 8, 2])
    second = distinct_documents([5, 60, 1, 0, 13], first=71)
    return [write(tmp_path / "a", first), write(tmp_path / "b", second)]


def order_by_philox(count: int, seed: int, epoch: int, purpose: int) -> list[int]:
    """The documented order: positions sorted by the raw numbers of Philox(key = (seed, epoch))."""
    counter = np.array([0, 0, 0, purpose], dtype=np.uint64)
    raw = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64), counter=counter).random_raw(count)
    return [place for _, place in sorted(zip(raw.tolist(), range(count), strict=True))]


def reference_sample(documents: list[list[int]], sequence_length: int, seed: int, number: int) -> list[int]:
    total = sum(map(len, documents))
    per_epoch = (total - 1) // sequence_length
    epoch, place = number // per_epoch, number % per_epoch
    text = [token for index in order_by_philox(len(documents), seed, epoch, 0) for token in documents[index]]
    start = order_by_philox(per_epoch, seed, epoch, 1)[place] * sequence_length
    return text[start : start + sequence_length + 1]


@pytest.mark.parametrize("seed", [0, 7, 2**64 - 1])
@pytest.mark.parametrize("sequence_length", [1, 8, 33, 149])
def test_samples_equal_the_reference(prefixes: list[str], sequence_length: int, seed: int) -> None:
    documents = distinct_documents([3, 0, 17, 1, 40, 8, 2]) + distinct_documents([5, 60, 1, 0, 13], first=71)
    stream = SampleStream(prefixes, sequence_length, seed, vocab_size=150)
    assert stream.samples_per_epoch == 149 // sequence_length
    for number in range(2 * stream.samples_per_epoch + 1):
        sample = stream.sample(number)
        assert sample.dtype == np.int64 and sample.shape == (sequence_length + 1,)
        assert sample.tolist() == reference_sample(documents, sequence_length, seed, number)


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=20).filter(lambda lengths: sum(lengths) > 12),
    sequence_length=st.integers(1, 11),
    seed=st.integers(0, 2**32),
)
def test_every_token_of_an_epoch_is_predicted_once(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], sequence_length: int, seed: int
) -> None:
    prefix = write(tmp_path_factory.mktemp("x") / "x", distinct_documents(lengths))
    stream = SampleStream([prefix], sequence_length, seed, vocab_size=sum(lengths))
    for epoch in range(2):
        first = epoch * stream.samples_per_epoch
        targets = Counter(
            token for number in range(first, first + stream.samples_per_epoch) for token in stream.sample(number)[1:]
        )
        assert set(targets.values()) == {1}
        # Unused are the first token of the epoch and the rest that makes no whole sample.
        assert sum(lengths) - len(targets) == 1 + (sum(lengths) - 1) % sequence_length


def test_order_is_a_function_of_the_number_alone(prefixes: list[str]) -> None:
    forward, backward = (SampleStream(prefixes, 16, 3, 150) for _ in range(2))
    samples = [forward.sample(number) for number in range(40)]
    for number in reversed(range(40)):
        assert np.array_equal(backward.sample(number), samples[number])
    other_seed = SampleStream(prefixes, 16, 4, 150)
    assert any(not np.array_equal(other_seed.sample(number), samples[number]) for number in range(9))
    per_epoch = forward.samples_per_epoch
    assert [s.tolist() for s in samples[:per_epoch]] != [s.tolist() for s in samples[per_epoch : 2 * per_epoch]]


def test_order_is_pinned(prefixes: list[str]) -> None:
    """A run that is resumed with a newer numpy or a newer library must see the same samples."""
    stream = SampleStream(prefixes, 16, 1234, 150)
    digest = hashlib.sha256(b"".join(stream.sample(number).astype("<i8").tobytes() for number in range(30)))
    assert digest.hexdigest() == "748f73e88231de5a22030cf13361254a9d1226974b217dcd38d4d3bd8958816f"


def test_fingerprint_tells_content_seed_and_length(prefixes: list[str], tmp_path: Path) -> None:
    stream = SampleStream(prefixes, 16, 3, 150)
    (tmp_path / "elsewhere").mkdir()
    for name in ("a", "b"):
        for suffix in (".bin", ".idx", ".json"):
            (tmp_path / "elsewhere" / f"{name}{suffix}").write_bytes((tmp_path / f"{name}{suffix}").read_bytes())
    moved = [str(tmp_path / "elsewhere" / name) for name in ("a", "b")]
    assert SampleStream(moved, 16, 3, 150).fingerprint == stream.fingerprint
    changed = write(tmp_path / "c", [*distinct_documents([3, 0, 17, 1, 40, 8, 1]), [0]])
    others = [
        SampleStream(prefixes, 16, 4, 150),
        SampleStream(prefixes, 15, 3, 150),
        SampleStream(prefixes[::-1], 16, 3, 150),
        SampleStream([changed, prefixes[1]], 16, 3, 150),
    ]
    fingerprints = {other.fingerprint for other in others} | {stream.fingerprint}
    assert len(fingerprints) == 5
    (tmp_path / "c.json").unlink()
    without_manifest = SampleStream([changed, prefixes[1]], 16, 3, 150).fingerprint
    assert without_manifest not in fingerprints


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3])
@pytest.mark.parametrize("data_parallel_size", [1, 2, 4])
def test_a_global_batch_is_the_same_for_any_layout(
    prefixes: list[str], micro_batch_size: int, data_parallel_size: int
) -> None:
    stream = SampleStream(prefixes, 5, 0, 150)
    first, size = 17, 24
    shares = [
        micro_batches(stream, first, size, micro_batch_size, rank, data_parallel_size)
        for rank in range(data_parallel_size)
    ]
    assert {len(share) for share in shares} == {size // (micro_batch_size * data_parallel_size)}
    together = np.concatenate([batch for step in zip(*shares, strict=True) for batch in step])
    assert np.array_equal(together, np.stack([stream.sample(first + index) for index in range(size)]))


def test_batch_sizes_must_divide(prefixes: list[str]) -> None:
    stream = SampleStream(prefixes, 5, 0, 150)
    for sizes in ((7, 2, 1), (8, 2, 3), (8, 0, 1), (0, 1, 1)):
        with pytest.raises(ConfigError, match="must be a multiple of"):
            micro_batches(stream, 0, sizes[0], sizes[1], 0, sizes[2])


def test_sequential_samples_walk_through_the_text(prefixes: list[str]) -> None:
    samples = SequentialSamples(prefixes, 20, 150)
    assert len(samples) == 7
    for number in range(7):
        assert samples.sample(number).tolist() == list(range(number * 20, number * 20 + 21))
    for number in (-1, 7):
        with pytest.raises(IndexError):
            samples.sample(number)
    batches = micro_batches(samples, 2, 4, 2, 1, 2)
    assert len(batches) == 1 and batches[0][:, 0].tolist() == [80, 100]


def test_what_cannot_be_sampled(prefixes: list[str], tmp_path: Path) -> None:
    assert SampleStream(prefixes, 149, 0, 150).samples_per_epoch == 1
    for make in (lambda length: SampleStream(prefixes, length, 0, 150), lambda n: SequentialSamples(prefixes, n, 150)):
        with pytest.raises(DataError, match=r"150 tokens make no sample of sequence_length \+ 1 = 151 tokens"):
            make(150)
        with pytest.raises(ConfigError, match="sequence_length is 0"):
            make(0)
    with pytest.raises(DataError, match="token id 149"):
        SampleStream(prefixes, 10, 0, 149)
    with pytest.raises(DataError, match="no corpus was given"):
        SampleStream([], 10, 0, 150)
    with pytest.raises(DataError, match="No such file"):
        SampleStream([str(tmp_path / "nowhere")], 10, 0, 150)
    with pytest.raises(ConfigError, match="seed is -1"):
        SampleStream(prefixes, 10, -1, 150)
