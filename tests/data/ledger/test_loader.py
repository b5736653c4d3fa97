"""Samples through the ledger: what the index says, the same for any number of processes, with their documents."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steel_megatron.data.indexed.dataset import Origin
from steel_megatron.data.indexed.writer import IndexedWriter
from steel_megatron.data.ledger.corpora import names_of
from steel_megatron.data.ledger.ledger import Ledger, edit
from steel_megatron.data.ledger.loader import LedgerSamples, SequentialSamples, micro_batches, read_samples
from steel_megatron.data.ledger.session import read_ledger
from steel_megatron.data.sampling import packing
from steel_megatron.errors import ConfigError, DataError

LENGTH = 16


def write(prefix: Path, sizes: list[int], first: int = 0) -> str:
    """Documents whose tokens are all different, so that a token tells where it is from; with the rows of a file."""
    inputs = [{"path": f"{prefix.name}.jsonl", "source": "text", "documents": len(sizes)}]
    with IndexedWriter(prefix, np.int32) as writer:
        writer.add_documents(np.arange(first, first + sum(sizes)), sizes, np.arange(1, len(sizes) + 1))
        writer.finalize({"inputs": inputs})
    return str(prefix)


SIZES = {"a": [3, 0, 17, 1, 40, 8, 2], "b": [5, 60, 1, 0, 13]}


@pytest.fixture
def prefixes(tmp_path: Path) -> list[str]:
    return [write(tmp_path / "a", SIZES["a"]), write(tmp_path / "b", SIZES["b"], first=71)]


def samples_of(prefixes: list[str], folder: Path, length: int = LENGTH, seed: int = 3) -> LedgerSamples:
    return LedgerSamples(Ledger.create(prefixes, length, seed, folder, epochs=None), 150)


def test_each_token_of_an_epoch_is_predicted_once(prefixes: list[str], tmp_path: Path) -> None:
    stream = samples_of(prefixes, tmp_path, length=5)
    per_epoch = 70 // 5 + 78 // 5  # each corpus is cut for itself
    for epoch in range(3):
        targets = np.concatenate([stream.sample(epoch * per_epoch + n)[1:] for n in range(per_epoch)])
        assert len(targets) == len(set(targets.tolist())) == 5 * per_epoch


def test_starts_are_those_of_the_documents(prefixes: list[str], tmp_path: Path) -> None:
    firsts = {0, 3, 20, 21, 61, 69, 71, 76, 136, 137}  # the first tokens of documents that have one
    # With samples of 10 tokens and one more, a document begins with a sample's last token.
    sequential = [SequentialSamples(prefixes, length, 150) for length in (LENGTH, 10)]
    for stream in (samples_of(prefixes, tmp_path), *sequential):
        for number in range(8):
            tokens, starts = stream.sample_with_starts(number)
            assert np.array_equal(tokens, stream.sample(number))
            begin, expected = 0, []
            for position, token in enumerate(tokens.tolist()):
                begin = position if token in firsts else begin
                expected.append(begin)
            assert starts.tolist() == expected
    both = read_samples(samples_of(prefixes, tmp_path), range(2), with_starts=True)
    assert both[1] is not None and both[0].shape == both[1].shape == (2, LENGTH + 1)


def test_order_is_a_function_of_the_number_alone(prefixes: list[str], tmp_path: Path) -> None:
    forward, backward = samples_of(prefixes, tmp_path), pickle.loads(pickle.dumps(samples_of(prefixes, tmp_path)))
    samples = [forward.sample(number) for number in range(40)]
    for number in reversed(range(40)):
        assert np.array_equal(backward.sample(number), samples[number])
    other = samples_of(prefixes, tmp_path, seed=4)
    assert any(not np.array_equal(other.sample(number), samples[number]) for number in range(8))
    assert [s.tolist() for s in samples[:8]] != [s.tolist() for s in samples[8:16]]


def test_order_is_pinned(prefixes: list[str], tmp_path: Path) -> None:
    """A run that is resumed with a newer numpy or a newer library must see the same samples."""
    stream = samples_of(prefixes, tmp_path, seed=1234)
    digest = hashlib.sha256(b"".join(stream.sample(number).astype("<i8").tobytes() for number in range(30)))
    assert digest.hexdigest() == "aef8500f15e760abe3d941ccf260447ec9b3ef39798b76cfa6abbe155a2a33d0"


def test_parts_say_where_the_tokens_come_from(prefixes: list[str], tmp_path: Path) -> None:
    stream = samples_of(prefixes, tmp_path)
    for number in range(8):
        spans = stream.documents(number)
        assert [token for span in spans for token in span.ids] == stream.sample(number).tolist()
        for span in spans:
            sizes, first = SIZES[span.corpus], 0 if span.corpus == "a" else 71
            assert span.ids[0] == first + sum(sizes[: span.document]) + span.offset
            assert span.origin == Origin(f"{span.corpus}.jsonl", "text", span.document + 1)


@given(
    micro=st.integers(1, 3),
    data_parallel=st.integers(1, 4),
    accumulation=st.integers(1, 3),
    first=st.integers(0, 10**12),
)
def test_a_global_batch_is_the_same_for_any_layout(
    micro: int, data_parallel: int, accumulation: int, first: int
) -> None:
    size = micro * data_parallel * accumulation
    shares = [micro_batches(first, size, micro, rank, data_parallel) for rank in range(data_parallel)]
    assert {len(share) for share in shares} == {accumulation}
    together = [number for step in zip(*shares, strict=True) for own in step for number in own]
    assert together == list(range(first, first + size))


@pytest.mark.parametrize("sizes", [(7, 2, 1), (8, 2, 3), (8, 0, 1), (0, 1, 1)])
def test_batch_sizes_must_divide(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ConfigError, match="must be a multiple of"):
        micro_batches(0, sizes[0], sizes[1], 0, sizes[2])


@settings(max_examples=20, deadline=None)
@given(length=st.integers(1, 149), cut=st.integers(1, 148))
def test_sequential_samples_walk_through_the_text(
    tmp_path_factory: pytest.TempPathFactory, length: int, cut: int
) -> None:
    folder = tmp_path_factory.mktemp("walk")
    samples = SequentialSamples([write(folder / "a", [cut]), write(folder / "b", [150 - cut], first=cut)], length, 150)
    assert len(samples) == 149 // length
    for number in range(len(samples)):
        assert samples.sample(number).tolist() == list(range(number * length, (number + 1) * length + 1))
    for number in (-1, len(samples)):
        with pytest.raises(IndexError):
            samples.sample(number)


def test_what_cannot_be_sampled(prefixes: list[str], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"150 tokens make no sample of sequence_length \+ 1 = 151 tokens"):
        SequentialSamples(prefixes, 150, 150)
    with pytest.raises(ConfigError, match="sequence_length is 0"):
        SequentialSamples(prefixes, 0, 150)
    with pytest.raises(DataError, match="no corpus was given"):
        SequentialSamples([], 10, 150)
    with pytest.raises(DataError, match="make no sample"):
        samples_of(prefixes, tmp_path, length=71)
    with pytest.raises(DataError, match="token id 149"):
        LedgerSamples(Ledger.create(prefixes, LENGTH, 0, tmp_path, epochs=None), 149)


def test_a_run_finds_the_ledger_it_made(prefixes: list[str], tmp_path: Path) -> None:
    path = tmp_path / "run" / "ledger.json"
    assert read_ledger(path, LENGTH, prefixes) is None
    with edit(path, Ledger.create(prefixes, LENGTH, 5, path.parent, epochs=None)):
        pass
    for named in (prefixes, prefixes[::-1], []):
        assert read_ledger(path, LENGTH, named) == Ledger.load(path)
    moved = [str(tmp_path / "moved-a"), prefixes[1]]
    for suffix in (".bin", ".idx", ".json", ".rows.npy"):
        Path(prefixes[0] + suffix).rename(moved[0] + suffix)
    assert read_ledger(path, LENGTH, moved) == Ledger.load(path)
    with pytest.raises(DataError, match=r"the ledger began with b .*, which is not among .*moved-a"):
        read_ledger(path, LENGTH, moved[:1])
    with pytest.raises(DataError, match=r"cuts samples of 16 tokens, but model\.sequence_length is 17"):
        read_ledger(path, LENGTH + 1, [])
    with edit(path) as file:
        file.ledger = file.ledger.append([later := write(tmp_path / "later", [40], first=10)])
    assert read_ledger(path, LENGTH, moved) == read_ledger(path, LENGTH, [*moved, later]) == file.ledger


def test_corpora_of_one_name_are_called_by_their_paths() -> None:
    assert names_of(["x/a", "y/a", "y/b"]) == ["x/a", "y/a", "b"]


def test_what_is_prepared_is_found_by_others(
    prefixes: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "_SAMPLES_OF_FILE", 0)
    ledger = Ledger.create(prefixes, 5, 3, tmp_path, epochs=None)
    LedgerSamples(ledger, 150, tmp_path / "cache").prepare(20, 40)
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 4  # the end of a pass over both, and the next
    monkeypatch.setattr(packing, "_write_index", None)  # it would be called where nothing is found
    other = LedgerSamples(ledger, 150, tmp_path / "cache")
    assert all(len(other.sample(number)) == 6 for number in range(20, 40))
