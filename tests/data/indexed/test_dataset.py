"""The indexed format: byte for byte Megatron's, and nothing damaged opens."""

from __future__ import annotations

import gc
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset

from steel_megatron.data.indexed.dataset import Origin, open_indexed, token_dtype, verify
from steel_megatron.data.indexed.writer import IndexedWriter
from steel_megatron.errors import DataError
from tests.data.corpora import DOCUMENTS, content, inputs, write, write_megatron


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_bytes_are_megatrons_and_it_reads_them(tmp_path: Path, dtype: type) -> None:
    ours = write(tmp_path / "ours", DOCUMENTS, dtype)
    theirs = write_megatron(tmp_path / "theirs", [[document] for document in DOCUMENTS], dtype)
    for suffix in (".bin", ".idx"):
        assert Path(ours + suffix).read_bytes() == Path(theirs + suffix).read_bytes()
    dataset = IndexedDataset(ours)
    assert [dataset[index].tolist() for index in range(len(dataset))] == DOCUMENTS


@pytest.mark.parametrize("vocab_size", [1, 65_499, 65_500, 151_936])
def test_token_dtype_is_megatrons(vocab_size: int) -> None:
    assert token_dtype(vocab_size) == DType.optimal_dtype(vocab_size)


def test_many_small_documents_in_batches(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    lengths = draw.integers(0, 5, size=1_100_000)  # more than one chunk of the index
    ids = draw.integers(0, 100, size=int(lengths.sum()))
    with IndexedWriter(tmp_path / "x", np.uint16) as writer:
        for part in np.array_split(np.arange(len(lengths)), 3):
            first, last = lengths[: part[0]].sum(), lengths[: part[-1] + 1].sum()
            writer.add_documents(ids[first:last], lengths[part])
        writer.finalize({})
    corpus = open_indexed(tmp_path / "x")
    assert np.array_equal(corpus.sizes, lengths) and np.array_equal(corpus.flat, ids)
    dataset = IndexedDataset(str(tmp_path / "x"))
    starts = np.cumsum(lengths) - lengths
    for index in (0, 1, 524_288, 1_048_575, 1_048_576, 1_099_999):
        expected = ids[starts[index] : starts[index] + lengths[index]].tolist()
        assert corpus.document(index).tolist() == dataset[index].tolist() == expected


def test_reading(tmp_path: Path) -> None:
    corpus = open_indexed(write(tmp_path / "x", about="test"), vocab_size=65_500)
    assert (corpus.documents, corpus.tokens, corpus.dtype) == (5, 3008, np.uint16)
    assert corpus.sizes.tolist() == [3, 1, 0, 4, 3000]
    assert [corpus.document(index).tolist() for index in range(5)] == DOCUMENTS
    assert corpus.tokens_of(4, 10, 3).tolist() == [10, 11, 12]
    assert corpus.manifest is not None and corpus.manifest["about"] == "test" and corpus.manifest["max_id"] == 65_000
    for document, offset, length in ((0, 0, 4), (0, 3, 1), (0, -1, 1), (2, 0, 1), (5, 0, 1)):
        with pytest.raises(IndexError):
            corpus.tokens_of(document, offset, length)


@pytest.mark.slow
def test_a_view_outlives_its_corpus_and_its_files(tmp_path: Path) -> None:
    corpus = open_indexed(write(tmp_path / "x"))
    view, sizes = corpus.document(4), corpus.sizes
    del corpus
    for path in tmp_path.iterdir():
        path.unlink()
    gc.collect()
    assert view.tolist() == DOCUMENTS[4] and sizes.tolist() == [3, 1, 0, 4, 3000]
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 1


def test_corpora_of_megatron_open_also_with_several_sequences_per_document(tmp_path: Path) -> None:
    documents = [[[1, 2], [3]], [[4]], [[5], [], [6, 7, 8]]]
    corpus = open_indexed(write_megatron(tmp_path / "x", documents), vocab_size=9)
    assert corpus.manifest is None
    assert [corpus.document(index).tolist() for index in range(3)] == [[1, 2, 3], [4], [5, 6, 7, 8]]
    assert verify(tmp_path / "x").checksums is False


def test_ids_must_fit(tmp_path: Path) -> None:
    for bad in ([1, 65_536], [-1]):
        with pytest.raises(DataError, match=f"token id {bad[-1]} does not fit uint16"):
            write(tmp_path / "x", [[1], bad])
        assert not list(tmp_path.iterdir())
    write(tmp_path / "ours")
    write_megatron(tmp_path / "theirs", [[document] for document in DOCUMENTS])
    for name in ("ours", "theirs"):
        open_indexed(tmp_path / name, vocab_size=65_001)
        with pytest.raises(DataError, match=r"token id 65000 \(in document 3\), but the vocabulary has ids 0 to 64999"):
            open_indexed(tmp_path / name, vocab_size=65_000)
    write_megatron(tmp_path / "negative", [[[1, 2]], [[-3]]], np.int32)
    with pytest.raises(DataError, match=r"token id -3 \(in document 1\)"):
        open_indexed(tmp_path / "negative", vocab_size=10)


def test_every_truncated_or_extended_file_is_refused(tmp_path: Path) -> None:
    prefix = write(tmp_path / "x", [[1, 2, 3], [4], [5, 6]])
    for suffix in (".bin", ".idx"):
        path = Path(prefix + suffix)
        content = path.read_bytes()
        for damaged in [content[:length] for length in range(len(content))] + [content + b"\0", content * 2]:
            path.write_bytes(damaged)
            with pytest.raises(DataError, match=r"\d"):
                open_indexed(prefix)
        path.write_bytes(content)
        path.rename(tmp_path / "away")
        with pytest.raises(DataError, match="No such file"):
            open_indexed(prefix)
        (tmp_path / "away").rename(path)
    open_indexed(prefix)


def test_every_flipped_bit_of_the_index_is_refused_without_a_manifest(tmp_path: Path) -> None:
    prefix = write_megatron(tmp_path / "x", [[[1, 2, 3]], [[4]], [[5, 6]]])
    path = Path(prefix + ".idx")
    content = bytearray(path.read_bytes())
    for bit in range(len(content) * 8):
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        try:
            corpus = open_indexed(prefix)
        except DataError:
            pass
        else:  # what no structure can show: another cut between documents
            assert bit // 8 >= len(content) - 3 * 8
            assert [token for index in range(3) for token in corpus.document(index)] == [1, 2, 3, 4, 5, 6]
        content[bit // 8] ^= 1 << bit % 8


def _huge_count(content: bytes) -> bytes:
    return content[:18] + struct.pack("<Q", 2**63) + content[26:]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: b"X" + content[1:], "is no index of version 1"),
        (lambda content: content[:9] + b"\x02" + content[10:], "version 2"),
        (lambda content: content[:17] + b"\x07" + content[18:], "dtype code 7"),
        (_huge_count, "truncated, extended or damaged"),
        (lambda content: content + b"\0" * 3, "multimodal"),
    ],
)
def test_damaged_headers(tmp_path: Path, change: Callable[[bytes], bytes], message: str) -> None:
    prefix = write(tmp_path / "x", [[1, 2, 3], [4], [5, 6]])
    path = Path(prefix + ".idx")
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DataError, match=message):
        open_indexed(prefix)


def test_empty_corpora_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no document"):
        open_indexed(write(tmp_path / "none", []))
    with pytest.raises(DataError, match="2 documents without a single token"):
        open_indexed(write(tmp_path / "empty", [[], []]))


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 120), max_size=9), min_size=1, max_size=8),
    st.sampled_from([np.uint8, np.int8, np.int16, np.int32, np.int64, np.uint16]),
)
def test_any_documents_in_any_dtype(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], dtype: type
) -> None:
    folder = tmp_path_factory.mktemp("any")
    ours = write(folder / "ours", documents, dtype)
    theirs = write_megatron(folder / "theirs", [[document] for document in documents], dtype)
    for suffix in (".bin", ".idx"):
        assert Path(ours + suffix).read_bytes() == Path(theirs + suffix).read_bytes()
    if any(documents):
        corpus = open_indexed(theirs)
        assert [corpus.document(index).tolist() for index in range(corpus.documents)] == documents


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.lists(st.integers(0, 120), max_size=4), max_size=4), min_size=1, max_size=6))
def test_documents_of_any_number_of_sequences(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[list[int]]]
) -> None:
    flat = [[token for sequence in document for token in sequence] for document in documents]
    if not any(flat):
        return
    corpus = open_indexed(write_megatron(tmp_path_factory.mktemp("any") / "x", documents))
    assert [corpus.document(index).tolist() for index in range(corpus.documents)] == flat
    assert corpus.sizes.tolist() == [len(document) for document in flat]


def test_swapped_files_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "x", [[1, 2, 3], [4]])
    write(tmp_path / "y", [[1, 2], [3, 4]])  # as many documents and tokens
    write(tmp_path / "z", [[1, 2, 3], [4, 5]])
    for suffix, message in ((".bin", "truncated, extended or belongs to another index"), (".json", "another corpus")):
        kept = (tmp_path / f"x{suffix}").read_bytes()
        (tmp_path / f"x{suffix}").write_bytes((tmp_path / f"z{suffix}").read_bytes())
        with pytest.raises(DataError, match=message):
            open_indexed(tmp_path / "x")
        (tmp_path / f"x{suffix}").write_bytes(kept)
    (tmp_path / "x.idx").write_bytes((tmp_path / "y.idx").read_bytes())
    with pytest.raises(DataError, match=r"x\.idx has changed"):  # which only its checksum tells
        verify(tmp_path / "x")
    (tmp_path / "x.idx").write_bytes((tmp_path / "x.bin").read_bytes() * 20)
    with pytest.raises(DataError, match="no index of version 1"):
        open_indexed(tmp_path / "x")


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".rows.npy", ".json"])
def test_what_is_no_readable_file(tmp_path: Path, suffix: str) -> None:
    prefix = write(tmp_path / "x", [[1, 2], [3]], rows=[1, 2], inputs=inputs(2))
    path = Path(prefix + suffix)
    path.write_bytes(b"")
    with pytest.raises(DataError, match=str(path)):
        open_indexed(prefix)
    path.unlink()
    path.mkdir()
    with pytest.raises(DataError, match=f"cannot read {path}: Is a directory"):
        open_indexed(prefix)
    path.rmdir()
    if suffix == ".json":
        assert open_indexed(prefix).manifest is None
    else:
        with pytest.raises(DataError, match=f"cannot read {path}: No such file"):
            open_indexed(prefix)


@pytest.mark.usefixtures("file_modes_hold")
@pytest.mark.parametrize("suffix", [".bin", ".idx", ".rows.npy", ".json"])
def test_a_file_that_may_not_be_read(tmp_path: Path, suffix: str) -> None:
    prefix = write(tmp_path / "x", [[1, 2], [3]], rows=[1, 2], inputs=inputs(2))
    Path(prefix + suffix).chmod(0)
    with pytest.raises(DataError, match=f"cannot read {prefix}{suffix}: Permission denied"):
        open_indexed(prefix)


def test_a_negative_document_is_none(tmp_path: Path) -> None:
    corpus = open_indexed(write(tmp_path / "x", rows=range(1, 6), inputs=inputs(5)))
    for document in (-1, 5):
        with pytest.raises(IndexError):
            corpus.tokens_of(document, 0, 1)
        with pytest.raises(IndexError):
            corpus.origin(document)


def test_documents_know_their_rows(tmp_path: Path) -> None:
    rows = [3, 7, 8, 1, 2]
    files = [{"path": "empty", "source": "text", "documents": 0}, *inputs(3), {"path": "none", "documents": 0}]
    files.append({"path": "b", "source": "zhihu", "documents": 2})
    prefix = write(tmp_path / "x", rows=rows, inputs=files)
    assert np.load(f"{prefix}.rows.npy", allow_pickle=False).tolist() == rows
    corpus = open_indexed(prefix)
    assert [corpus.origin(document) for document in range(5)] == [
        *(Origin("in0.jsonl", "text", row) for row in (3, 7, 8)),
        *(Origin("b", "zhihu", row) for row in (1, 2)),
    ]
    assert open_indexed(write(tmp_path / "y", inputs=inputs(5))).origin(0) is None


def test_rows_must_fit(tmp_path: Path) -> None:
    prefix = write(tmp_path / "x", rows=range(1, 6), inputs=inputs(5))
    path = Path(f"{prefix}.rows.npy")
    whole = path.read_bytes()
    other = np.arange(5, dtype=np.float64)
    np.save(tmp_path / "other.npy", other)
    for damaged in (whole[:-1], whole + b"\0", whole[:64], (tmp_path / "other.npy").read_bytes(), whole[1:] + b"\0"):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"rows\.npy .* is no array of int64 \[5\]"):
            open_indexed(prefix)


@pytest.mark.parametrize("documents", [0, 1, 99_999, 10**18])
def test_the_head_of_the_rows_is_numpys(tmp_path: Path, documents: int) -> None:
    from io import BytesIO

    from steel_megatron.data.indexed.format import ROWS_HEADER_BYTES, rows_header

    head = rows_header(documents)
    assert len(head) == ROWS_HEADER_BYTES
    file = BytesIO(head)
    assert np.lib.format.read_magic(file) == (1, 0)
    assert np.lib.format.read_array_header_1_0(file) == ((documents,), False, np.dtype("<i8"))
    assert file.tell() == ROWS_HEADER_BYTES


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": 4}, "tokens is 3008, recorded is 4"),
        ({"documents": 4}, "documents is 5, recorded is 4"),
        ({"dtype": "int32"}, "dtype is uint16, recorded is int32"),
        ({"format": "other"}, "is no manifest of format"),
        ({"format": "steel-megatron-indexed-1"}, "earlier version .* make the corpus again, or move the manifest away"),
        ({"max_id": None}, r"manifest .*x\.json is damaged: max_id is None; it must be a whole number"),
        ({"max_id": True}, "max_id is True"),
        ({"block_bytes": 12}, "block_bytes is 12"),
        ({"block_bytes": 0}, "block_bytes is 0"),
        ({"blocks": None}, "blocks is None"),
        ({"blocks": {"bin": []}}, "blocks is"),
        ({"blocks": {"bin": ["0" * 64], "idx": [], "rows": []}}, "0 digests for idx; it must have 1"),
        ({"blocks": {"bin": ["x" * 64], "idx": ["0" * 64]}}, "blocks is .*; it must be SHA-256 digests by file"),
        ({"blocks": {"bin": ["0" * 64], "idx": ["0" * 64]}}, "content is"),
        ({"content": "0" * 64}, "content is"),
        ({"tokenizer": "qwen"}, "tokenizer is 'qwen'"),
        ({"tokenizer": {"vocab_size": "many"}}, "tokenizer is"),
        ({"inputs": None}, "inputs is None"),
        ({"inputs": ["a"]}, "inputs is"),
        ({"inputs": []}, "inputs is .*; it must be of files with 5 documents together"),
        ({"inputs": [{"documents": 6}, {"documents": -1}]}, "inputs is"),
    ],
)
def test_a_damaged_manifest_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    prefix = write(tmp_path / "x", rows=range(1, 6), inputs=inputs(2, 3))
    path = Path(f"{prefix}.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(DataError, match=message):
        open_indexed(prefix)


@pytest.mark.parametrize("text", ["{", "", "[" * 100_000, "\0", "[]", "3", '"x"'])
def test_what_is_no_manifest_is_refused(tmp_path: Path, text: str) -> None:
    prefix = write(tmp_path / "x")
    Path(f"{prefix}.json").write_text(text)
    with pytest.raises(DataError, match=r"x\.json (cannot be read|is no manifest)"):
        open_indexed(prefix)


def test_a_manifest_of_an_earlier_version_may_be_moved_away(tmp_path: Path) -> None:
    prefix = write(tmp_path / "x")
    Path(f"{prefix}.json").write_text('{"format": "steel-megatron-indexed-1"}')
    with pytest.raises(DataError, match="earlier version"):
        open_indexed(prefix)
    Path(f"{prefix}.json").rename(tmp_path / "away")
    assert open_indexed(prefix).documents == 5


def test_a_corpus_is_read_whole_from_its_files_alone(tmp_path: Path) -> None:
    """Copies and renames change nothing: no path is inside."""
    first = content(write(tmp_path / "x", rows=range(1, 6), inputs=inputs(5)))
    second = content(write(tmp_path / "a" / "y", rows=range(1, 6), inputs=inputs(5)))
    assert first == second and set(first) == {".bin", ".idx", ".rows.npy", ".json"}
