"""One pass over a corpus: samples equal to a plain reference, a token predicted once, caches that mend themselves."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steel_megatron.data.indexed.dataset import IndexedCorpus, open_indexed
from steel_megatron.data.indexed.exact_duplicates import bits_of, drop_bits
from steel_megatron.data.sampling import packing, permutation
from steel_megatron.data.sampling.packing import PackedEpoch, PackedSpan
from steel_megatron.data.sampling.permutation import Permutation
from steel_megatron.errors import DataError
from steel_megatron.files import exclusive_lock
from tests.data.corpora import write

COMPILED = ["numpy"] if packing.helpers is None else ["numpy", "compiled"]
KEY = (1234, 99, 0)


@contextmanager
def computed_by(kind: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if kind == "numpy":
            patch.setattr(packing, "helpers", None)
            patch.setattr(permutation, "helpers", None)
        yield


def in_memory(sizes: list[int], dtype: type = np.int32, wide: bool = False) -> IndexedCorpus:
    """A corpus whose tokens are all different."""
    lengths = np.array(sizes, dtype=np.int64 if wide else np.int32)
    positions = (np.cumsum(lengths, dtype=np.int64) - lengths) * np.dtype(dtype).itemsize
    return IndexedCorpus("memory", np.arange(int(lengths.sum())).astype(dtype), positions, lengths, {})


def reference(
    corpus: IndexedCorpus, length: int, mask: np.ndarray
) -> list[tuple[list[int], list[int], list[PackedSpan]]]:
    """All samples in the order in which they are read: tokens, starts of their documents, spans."""
    order = Permutation(corpus.documents, (*KEY, 0))
    places = [
        (document, offset, int(corpus.document(document)[offset]))
        for document in (order(place) for place in range(corpus.documents))
        if not mask[document]
        for offset in range(int(corpus.sizes[document]))
    ]
    count = max(0, (len(places) - 1) // length)
    shuffled, samples = Permutation(count, (*KEY, 1)), []
    for number in range(count):
        begin = shuffled(number) * length
        cut = places[begin : begin + length + 1]
        starts: list[int] = []
        spans: list[PackedSpan] = []
        for position, (document, offset, _) in enumerate(cut):
            if not spans or spans[-1].document != document:
                spans.append(PackedSpan(document, offset, 0))
                starts.append(position)
            else:
                starts.append(starts[-1])
            spans[-1] = spans[-1]._replace(length=spans[-1].length + 1)
        samples.append(([token for *_, token in cut], starts, spans))
    return samples


@given(
    sizes=st.lists(st.one_of(st.just(0), st.integers(1, 5), st.integers(20, 90)), min_size=1, max_size=60),
    length=st.integers(1, 24),
    dtype=st.sampled_from([np.uint8, np.uint16, np.int16, np.int32, np.int64]),
    wide=st.booleans(),
    drop=st.sets(st.integers(0, 59)),
    chunk=st.sampled_from([1, 7, 1 << 16]),
)
@settings(max_examples=80, deadline=None)
def test_samples_equal_the_reference(
    sizes: list[int], length: int, dtype: type, wide: bool, drop: set[int], chunk: int
) -> None:
    corpus = in_memory(sizes, dtype, wide)
    mask = np.isin(np.arange(len(sizes)), list(drop))
    dropped = drop_bits(mask) if drop else None
    expected = reference(corpus, length, mask)
    for kind in COMPILED:
        with computed_by(kind), pytest.MonkeyPatch.context() as patch:
            patch.setattr(packing, "_CHUNK", chunk)
            if not expected:
                with pytest.raises(DataError, match=f"make no sample of sequence_length \\+ 1 = {length + 1:,} tokens"):
                    PackedEpoch(corpus, length, KEY, dropped)
                continue
            epoch = PackedEpoch(corpus, length, KEY, dropped)
            assert len(epoch) == len(expected)
            for number, (tokens, starts, spans) in enumerate(expected):
                assert epoch.tokens(number).tolist() == tokens
                assert [array.tolist() for array in epoch.with_starts(number)] == [tokens, starts]
                assert epoch.spans(number) == spans
                assert epoch.tokens(number).dtype == np.int64


def test_each_token_is_predicted_once() -> None:
    corpus = in_memory([3, 0, 17, 1, 40, 8, 2, 300])
    epoch = PackedEpoch(corpus, 10, KEY)
    predicted = Counter(token for number in range(len(epoch)) for token in epoch.tokens(number)[1:].tolist())
    assert set(predicted.values()) == {1} and len(predicted) == 10 * len(epoch) == 370


def test_passes_have_orders_of_their_own() -> None:
    corpus = in_memory([7] * 200)
    first, second = (PackedEpoch(corpus, 10, (1, 2, number)) for number in (0, 1))
    alike = sum(np.array_equal(first.tokens(number), second.tokens(number)) for number in range(len(first)))
    assert alike < 5


@pytest.fixture
def corpus(tmp_path: Path) -> IndexedCorpus:
    documents = [list(range(7 * n, 7 * n + n % 50)) for n in range(400)]
    return open_indexed(write(tmp_path / "text", documents, np.int32))


@pytest.fixture(autouse=True)
def files_for_small_indices_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_SAMPLES_OF_FILE", 0)


def cached(corpus: IndexedCorpus, folder: Path, **changes: Any) -> PackedEpoch:
    options = {"sequence_length": 32, "key": KEY, "cache": folder, "content": "a" * 64, **changes}
    return PackedEpoch(corpus, **options)


def test_a_cache_is_used_again(corpus: IndexedCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cache"
    first, in_memory_too = cached(corpus, folder), PackedEpoch(corpus, 32, KEY)
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".npy"]
    assert np.array_equal(first._starts, in_memory_too._starts)
    monkeypatch.setattr(PackedEpoch, "_build", None)  # it would be called where nothing is found
    again = cached(corpus, folder)
    assert [again.tokens(n).tolist() for n in range(9)] == [in_memory_too.tokens(n).tolist() for n in range(9)]


def test_the_compiled_and_the_numpy_cache_are_the_same(corpus: IndexedCorpus, tmp_path: Path) -> None:
    content = set()
    for kind in COMPILED:
        with computed_by(kind):
            cached(corpus, tmp_path / kind)
        content |= {path.read_bytes() for path in (tmp_path / kind).iterdir()}
    assert len(content) == 2  # the array and its record


def test_what_the_order_depends_on_names_the_cache(corpus: IndexedCorpus, tmp_path: Path) -> None:
    dropped = drop_bits(np.arange(corpus.documents) % 9 == 0)
    changes = [{}, {"key": (*KEY[:2], 1)}, {"sequence_length": 33}, {"content": "b" * 64}, {"dropped": dropped}]
    for number, change in enumerate(changes, start=1):
        cached(corpus, tmp_path / "cache", **change)
        assert len(list((tmp_path / "cache").glob("*.npy"))) == number


@pytest.mark.parametrize("damage", ["flip", "truncate", "extend", "empty", "record", "no record", "other"])
def test_a_damaged_cache_is_made_again(
    corpus: IndexedCorpus, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "cache"
    expected = [cached(corpus, folder).tokens(n).tolist() for n in range(9)]
    array, record = next(folder.glob("*.npy")), next(folder.glob("*.json"))
    content = array.read_bytes()
    flipped = content[:500] + bytes([content[500] ^ 1]) + content[501:]
    arrays = {"flip": flipped, "truncate": content[:-8], "extend": content + b"\0", "empty": b""}
    array.write_bytes(arrays.get(damage, content))
    if damage in ("record", "other"):
        record.write_text({"record": "{", "other": json.dumps([1])}[damage])
    elif damage == "no record":
        record.unlink()
    assert [cached(corpus, folder).tokens(n).tolist() for n in range(9)] == expected
    assert array.read_bytes() == content
    assert ("is rebuilt" in caplog.text) == (damage != "no record")
    caplog.clear()
    cached(corpus, folder)
    assert not caplog.text


def test_a_cache_that_cannot_be_written_leaves_nothing(
    corpus: IndexedCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot write .*file.*\.lock: Not a directory"):
        cached(corpus, tmp_path / "file" / "cache")

    def full(self: object, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packing._Hashed, "write", full)
    with pytest.raises(DataError, match=r"cannot write .*\.npy: No space left on device"):
        cached(corpus, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_small_indices_have_no_files(corpus: IndexedCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert packing._SAMPLES_OF_FILE * 16 == 1 << 20
    assert cached(corpus, tmp_path / "cache").tokens(3).tolist() == PackedEpoch(corpus, 32, KEY).tokens(3).tolist()
    assert not (tmp_path / "cache").exists()


def _killed_while_writing(prefix: str, folder: Path) -> None:
    plain, parts = packing._Hashed.write, []

    def write(self: Any, content: bytes) -> None:
        plain(self, content)
        parts.append(content)
        if len(parts) == 2:
            self._file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    packing._Hashed.write = write  # type: ignore[method-assign]
    cached(open_indexed(prefix), folder)


@pytest.mark.timeout(60)
def test_finished_epochs_and_what_kills_left_are_removed(corpus: IndexedCorpus, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    process = multiprocessing.get_context("fork").Process(target=_killed_while_writing, args=(corpus.prefix, folder))
    process.start()
    process.join(timeout=30)
    assert process.exitcode == -signal.SIGKILL and len(list(folder.glob("*.partial"))) == 1
    for number in range(3):
        cached(corpus, folder, key=(*KEY[:2], number))
        cached(corpus, folder, key=(*KEY[:2], number), content="b" * 64)
    (folder / "other.json").write_text("[]")
    (folder / f"{'d' * 32}.npy").touch()  # killed before its sidecar
    (folder / f"{'c' * 32}.1.partial").touch()
    packing.remove_caches(folder, {})
    assert len(list(folder.glob("*.partial"))) == 2  # so young that somebody may be writing them
    for path in (*folder.glob("*.partial"), *folder.glob("*.npy")):
        os.utime(path, (0, 0))
    with exclusive_lock(folder / ("c" * 32), DataError):  # somebody writes it
        packing.remove_caches(folder, {"a" * 64: 2})
    left = [json.loads(path.read_text()) for path in folder.glob("*.json") if path.stem != "other"]
    assert sorted((of["content"][0], of["key"][2]) for of in left) == [("a", 2), ("b", 0), ("b", 1), ("b", 2)]
    assert len(list(folder.glob("*.npy"))) == 4
    assert [path.name for path in folder.glob("*.partial")] == [f"{'c' * 32}.1.partial"]
    packing.remove_caches(tmp_path / "nowhere", {})


def test_the_documents_of_some_samples(corpus: IndexedCorpus) -> None:
    epoch = PackedEpoch(corpus, 32, KEY)
    for samples in (0, 1, 40, len(epoch)):
        expected = {span.document for number in range(samples) for span in epoch.spans(number)}
        assert set(np.flatnonzero(bits_of(epoch.documents_of(samples), 0, corpus.documents)).tolist()) == expected


def _open_together(prefix: str, folder: Path, barrier: Any, results: Any) -> None:
    plain, built = packing._write_index, []

    def write(*arguments: Any) -> str:
        built.append(1)
        time.sleep(0.3)  # the others come meanwhile
        return plain(*arguments)

    packing._write_index = write
    barrier.wait()
    epoch = cached(open_indexed(prefix), folder)
    mapped = [line.split()[4] for line in Path("/proc/self/maps").read_text().splitlines() if f"{folder}/" in line]
    inode = next(folder.glob("*.npy")).stat().st_ino
    results.put((epoch.tokens(0).tolist(), len(built), set(mapped) == {str(inode)}))


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_one_process_makes_a_cache_and_the_others_map_it(corpus: IndexedCorpus, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(4), context.Queue()
    arguments = corpus.prefix, tmp_path / "cache", barrier, results
    processes = [context.Process(target=_open_together, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    found = [results.get(timeout=30) for _ in processes]
    for process in processes:
        process.join(timeout=30)
    assert [tokens for tokens, *_ in found] == 4 * [PackedEpoch(corpus, 32, KEY).tokens(0).tolist()]
    assert sum(built for _, built, _ in found) == 1 and all(is_mapped for *_, is_mapped in found)
    assert len(os.listdir(tmp_path / "cache")) == 2


def test_a_file_that_somebody_has_mapped_stays(corpus: IndexedCorpus, tmp_path: Path) -> None:
    """Where locks do not work, another process may have published the same index first."""
    folder, epoch = tmp_path / "cache", PackedEpoch(corpus, 32, KEY)
    plain = packing._write_index

    def write(file: Any, epoch: PackedEpoch) -> str:
        digest = plain(file, epoch)
        (folder / "x.npy").write_bytes(b"quicker")
        return digest

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "_write_index", write)
        packing._publish(folder / "x.npy", epoch)
    assert [(path.name, path.read_bytes()) for path in folder.iterdir()] == [("x.npy", b"quicker")]
