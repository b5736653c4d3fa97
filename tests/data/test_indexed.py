"""The indexed format: byte for byte Megatron's, and nothing damaged opens."""

from __future__ import annotations

import gc
import json
import resource
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from steel_megatron.data.indexed import open_indexed, token_dtype, verify
from steel_megatron.data.indexed_writer import IndexedWriter, merge
from steel_megatron.errors import DataError
from steel_megatron.files import exclusive_lock, write_atomically

DOCUMENTS = [[5, 6, 7], [1], [], [65_000, 2, 3, 4], list(range(3000))]


def write(prefix: Path, documents: list[list[int]] = DOCUMENTS, dtype: type = np.uint16, **manifest: object) -> str:
    with IndexedWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(document)
        writer.finalize(manifest)
    return str(prefix)


def write_megatron(prefix: Path, documents: list[list[list[int]]], dtype: type = np.uint16) -> str:
    """Megatron's own builder; a document is a list of sequences."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        flat = [token for sequence in document for token in sequence]
        builder.add_document(torch.tensor(flat, dtype=torch.int64), [len(sequence) for sequence in document])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


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


def test_verify_finds_every_flipped_bit(tmp_path: Path) -> None:
    prefix = write(tmp_path / "x", [[1, 2, 3], [4], [5, 6]])
    report = verify(prefix, vocab_size=7)
    assert (report.documents, report.tokens, report.max_id, report.checksums) == (3, 6, 6, True)
    for suffix in (".bin", ".idx"):
        path = Path(prefix + suffix)
        content = bytearray(path.read_bytes())
        for bit in range(len(content) * 8):
            content[bit // 8] ^= 1 << bit % 8
            path.write_bytes(content)
            with pytest.raises(DataError):
                verify(prefix)
            content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
    verify(prefix)


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


def test_a_manifest_of_another_corpus_is_refused(tmp_path: Path) -> None:
    prefix = write(tmp_path / "x", [[1, 2, 3]])
    manifest = Path(prefix + ".json")
    content = json.loads(manifest.read_text())
    for change, message in (
        ({"tokens": 4}, "tokens is 3, recorded is 4"),
        ({"format": "other"}, "is no manifest of format"),
        ({"sha256": None}, "is damaged"),
    ):
        manifest.write_text(json.dumps({**content, **change}))
        with pytest.raises(DataError, match=message):
            open_indexed(prefix)
    manifest.write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        open_indexed(prefix)


def test_nothing_is_left_without_a_commit(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), IndexedWriter(tmp_path / "x", np.uint16) as writer:
        writer.add_document([1])
        raise KeyboardInterrupt
    with IndexedWriter(tmp_path / "x", np.uint16) as writer:
        writer.add_document([1])
        writer.prepare({})
    assert not list(tmp_path.iterdir())
    with pytest.raises(RuntimeError), IndexedWriter(tmp_path / "x", np.uint16) as writer:
        writer.add_document([1])
        writer.finalize({})
        raise RuntimeError  # a corpus beside it failed
    assert not list(tmp_path.iterdir())


def test_every_moment_of_a_commit_leaves_nothing_that_opens(tmp_path: Path) -> None:
    """Replays the states of the folder that a crash during commit can leave, with and without an older corpus."""
    new, old = tmp_path / "new", tmp_path / "old"
    for folder in (new, old):
        folder.mkdir()
    write(new / "x", [[1, 2]])
    write(old / "x", [[3, 4]])  # the same sizes: only the order of the renames keeps them apart
    state = {f"x{suffix}.partial": (new / f"x{suffix}").read_bytes() for suffix in (".bin", ".idx", ".json")}
    state |= {f"x{suffix}": (old / f"x{suffix}").read_bytes() for suffix in (".bin", ".idx", ".json")}
    steps: list[tuple[str, str | None]] = [("x.json", None), ("x.idx", None)]
    steps += [(f"x{suffix}.partial", f"x{suffix}") for suffix in (".bin", ".idx", ".json")]
    for number, (gone, appears) in enumerate(steps):
        content = state.pop(gone)
        if appears is not None:
            state[appears] = content
        folder = tmp_path / f"state{number}"
        folder.mkdir()
        for name, content in state.items():
            (folder / name).write_bytes(content)
        if number == len(steps) - 1:
            assert open_indexed(folder / "x").document(0).tolist() == [1, 2]
        else:
            with pytest.raises(DataError):
                open_indexed(folder / "x")


def test_existing_corpora_are_only_replaced_when_asked(tmp_path: Path) -> None:
    write(tmp_path / "x", [[1]])
    with pytest.raises(DataError, match="exists already"):
        IndexedWriter(tmp_path / "x", np.uint16)
    assert open_indexed(tmp_path / "x").document(0).tolist() == [1]
    with IndexedWriter(tmp_path / "x", np.int32, overwrite=True) as writer:
        writer.add_document([2, 3])
        assert open_indexed(tmp_path / "x").document(0).tolist() == [1]
        writer.finalize({})
    assert verify(tmp_path / "x").tokens == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.bin", "x.idx", "x.json"]


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "x", np.uint16) as writer:
        writer.add_document([1])
        with pytest.raises(DataError, match="another job is writing to"):
            IndexedWriter(tmp_path / "x", np.uint16, overwrite=True)
        writer.finalize({})
    assert open_indexed(tmp_path / "x").tokens == 1


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from steel_megatron.data.indexed_writer import IndexedWriter; "
        "writer = IndexedWriter(sys.argv[1], 'uint16'); writer.add_document([1]); os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / "x")], check=False)
    assert killed.returncode == -9 and (tmp_path / "x.lock").exists()
    write(tmp_path / "x", [[2]])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.bin", "x.idx", "x.json"]


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    """A limit on the size of files fails in the same place as a full disk: in write() or in flush()."""
    code = (
        "import sys\n"
        "from steel_megatron.data.indexed_writer import IndexedWriter\n"
        "from steel_megatron.errors import DataError\n"
        "try:\n"
        "    with IndexedWriter(sys.argv[1], 'uint16') as writer:\n"
        "        for document in range(int(sys.argv[2])):\n"
        "            writer.add_document([1] * int(sys.argv[3]))\n"
        "        writer.finalize({})\n"
        "except DataError as error:\n"
        "    sys.exit(str(error))\n"
    )
    # The second one fails only when the index is completed.
    for documents, length, suffix in ((100, 100, "bin"), (500, 1, "idx")):
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "x"), str(documents), str(length)],
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)),
            capture_output=True,
            text=True,
            check=False,
        )
        assert f"cannot write {tmp_path}/x.{suffix}: File too large" in done.stderr and done.returncode == 1
        assert not list(tmp_path.iterdir())


def test_folders_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot write"):
        IndexedWriter(tmp_path / "file" / "x", np.uint16)
    with pytest.raises(DataError, match="cannot write"):
        write_atomically(tmp_path / "file" / "x", b"", DataError)
    write(tmp_path / "new" / "folder" / "x", [[1]])


def test_write_atomically_replaces_and_leaves_no_rest(tmp_path: Path) -> None:
    for content in (b"one", b"two"):
        write_atomically(tmp_path / "x", content, DataError)
        assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("x", content)]


def test_lock_is_released_and_removed(tmp_path: Path) -> None:
    for _ in range(2):
        with exclusive_lock(tmp_path / "x", DataError):
            assert (tmp_path / "x.lock").exists()
            with pytest.raises(DataError, match="another job"), exclusive_lock(tmp_path / "x", DataError):
                pass
        assert not (tmp_path / "x.lock").exists()


def test_merge_equals_writing_at_once(tmp_path: Path) -> None:
    tokenizer = {"fingerprint": "f"}
    parts = [
        write(tmp_path / "a", DOCUMENTS[:2], tokenizer=tokenizer, inputs=[{"path": "a"}]),
        write(tmp_path / "b", DOCUMENTS[2:], tokenizer=tokenizer, inputs=[{"path": "b"}]),
    ]
    manifest = merge(parts, tmp_path / "merged")
    whole = write(tmp_path / "whole", DOCUMENTS)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"merged{suffix}").read_bytes() == Path(whole + suffix).read_bytes()
    assert manifest["tokenizer"] == tokenizer and manifest["inputs"] == [{"path": "a"}, {"path": "b"}]
    assert verify(tmp_path / "merged").documents == 5


def test_merge_refuses_what_does_not_fit(tmp_path: Path) -> None:
    write(tmp_path / "a", [[1]], tokenizer={"fingerprint": "f"})
    write(tmp_path / "b", [[1]], tokenizer={"fingerprint": "g"})
    write(tmp_path / "c", [[1]], np.int32)
    for names, message in ((("a", "b"), "2 different tokenizers"), (("a", "c"), "different dtypes"), ((), "at least")):
        with pytest.raises(DataError, match=message):
            merge([tmp_path / name for name in names], tmp_path / "out")
        assert not list(tmp_path.glob("out*"))
