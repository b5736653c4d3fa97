"""Files in chunks: the same rows however they are cut, from wherever they are cut, and nothing lost in silence."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import tracemalloc
from pathlib import Path

import pyarrow
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from steel_megatron.data.reading.chunks import BadRow, FileOffset, RawChunk
from steel_megatron.data.reading.documents import SkippedRow, read_documents
from steel_megatron.data.reading.formats import parse_chunk, read_chunks
from steel_megatron.errors import DataError

TEXTS = ["一" * 30, "two\nlines", 'a "quote", [bracket], {brace}', "", "\\u2028 \\", "😀" * 5, "x" * 3000, "last"]


def pack(content: bytes, suffix: str) -> bytes:
    if suffix.endswith(".gz"):
        return gzip.compress(content)
    if suffix.endswith(".zst"):  # two frames, as appending to such a file makes them
        half = len(content) // 2
        return zstandard.compress(content[:half]) + zstandard.compress(content[half:])
    return content


def write_rows(path: Path, texts: list[str]) -> Path:
    """The same rows in any format, told by the file's name."""
    rows = [{"text": text, "n": [number, {"deep": None}]} for number, text in enumerate(texts)]
    name = path.name
    if name.endswith(".parquet"):
        parquet.write_table(pyarrow.table({"n": range(len(texts)), "text": texts}), path, row_group_size=3)
    elif ".jsonl" in name or "lines" in name:
        path.write_bytes(pack("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode(), name))
    else:
        path.write_bytes(pack(json.dumps(rows, ensure_ascii=False, indent=1).encode(), name))
    return path


NAMES = ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.json", "a.json.gz", "a.json.zst", "lines.json", "a.parquet"]


def texts_of(chunks: list[RawChunk]) -> list[tuple[int, str]]:
    found = []
    for chunk in chunks:
        for row, _, _, value in parse_chunk(chunk):
            assert isinstance(value, dict)
            found.append((row, value["text"]))
    return found


@pytest.mark.parametrize("name", NAMES)
def test_every_format_gives_the_same_rows_from_every_place(tmp_path: Path, name: str) -> None:
    path = write_rows(tmp_path / name, TEXTS)
    expected = list(enumerate(TEXTS, start=1))
    for chunk_bytes in (1, 7, 100, 1000, 1 << 20):
        chunks = list(read_chunks(path, chunk_bytes=chunk_bytes))
        assert texts_of(chunks) == expected
        assert sum(chunk.rows for chunk in chunks) == len(TEXTS)
        for index, chunk in enumerate(chunks):
            assert list(read_chunks(path, chunk.end, chunk_bytes)) == chunks[index + 1 :]
    if name != "a.parquet":
        assert len(list(read_chunks(path, chunk_bytes=1))) == len(TEXTS)


@settings(max_examples=60, deadline=None)
@given(content=st.binary(max_size=200).map(lambda raw: raw.replace(b"\x01", b"\n")), chunk_bytes=st.integers(1, 40))
def test_lines_are_cut_like_a_file_is_read(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, chunk_bytes: int
) -> None:
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    path.write_bytes(content)
    chunks = list(read_chunks(path, chunk_bytes=chunk_bytes))
    assert b"".join(chunk.payload for chunk in chunks) == content
    assert [len(chunk.payload.splitlines(keepends=False)) >= 1 for chunk in chunks] == [True] * len(chunks)
    row, offset = 0, 0
    for chunk in chunks:
        assert (chunk.first_row, chunk.first_offset) == (row + 1, offset)
        row, offset = row + len(chunk.payload.split(b"\n")) - chunk.payload.endswith(b"\n"), offset + len(chunk.payload)
        assert chunk.end == FileOffset(row, offset)
        assert chunk is chunks[-1] or chunk.payload.endswith(b"\n")
        assert len(chunk.payload) <= chunk_bytes or chunk.rows == 1


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    elements=st.lists(
        st.recursive(
            st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False) | st.text(),
            lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        )
    ),
    chunk_bytes=st.integers(1, 50),
    indent=st.sampled_from([None, 2]),
)
def test_arrays_of_anything(
    tmp_path_factory: pytest.TempPathFactory, elements: list[object], chunk_bytes: int, indent: int | None
) -> None:
    path = tmp_path_factory.mktemp("array") / "a.json"
    path.write_text(json.dumps(elements, indent=indent, ensure_ascii=False).encode("utf-8", "replace").decode())
    expected = json.loads(path.read_text())
    chunks = list(read_chunks(path, chunk_bytes=chunk_bytes))
    found = [row for chunk in chunks for row in parse_chunk(chunk)]
    assert [value for *_, value in found] == expected
    content = path.read_bytes()
    for _, offset, line, _ in found:  # as it is in the file
        assert content[offset : offset + len(line.rstrip())].split() == line.split()
    for index, chunk in enumerate(chunks):
        assert list(read_chunks(path, chunk.end, chunk_bytes)) == chunks[index + 1 :]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "中"}, {"text": }]'.encode(), r"byte 27: broken JSON \(Expecting value\) in element 2"),
        (b'\xef\xbb\xbf[{"text": "a"} {}]', "byte 18: '{' stands where a comma or ] was expected after element 1"),
        (b'[{"text": "a"}', "byte 14: the file ends where a comma or ] was expected after element 1"),
        (b'[{"text": "a"},', r"byte 15: broken JSON \(Expecting value\) in element 2"),
        (b'[{"text": "a"},]', r"byte 15: broken JSON \(Expecting value\) in element 2"),
        (b'[{"text": "a', r"byte 10: broken JSON \(Unterminated string starting at\) in element 1"),
        (b"[1, tru]", r"byte 4: broken JSON \(Expecting value\) in element 2"),
        (b'[{"text": "a"}] [', "byte 16: something stands after the end of the JSON array of 1 elements"),
        ('[{"text": "中"}, {"text": "'.encode() + b'\xff"}]', "byte 28: not valid UTF-8"),
        ('[{"text": "中'.encode()[:-1], "byte 11: not valid UTF-8"),
        (b"[" * 100_000, "byte 1: brackets nested beyond any use in element 1"),
        (b"[" + b"1" * 5000 + b"]", "byte 1: JSON beyond any use in element 1"),
    ],
)
def test_a_broken_array_is_an_error_under_both_policies(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    for policy in ("stop", "skip"):
        with pytest.raises(DataError, match=rf"a\.json, {message}.*; what follows"):
            list(read_documents(path, on_bad_row=policy))  # type: ignore[arg-type]
    for chunk_bytes in (1, 2, 5):
        with pytest.raises(DataError, match=rf"a\.json, byte \d+: {message.split(': ', 1)[1]}.*; what follows"):
            list(read_chunks(path, chunk_bytes=chunk_bytes))


def test_bad_elements_of_an_array_are_bad_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(
        b'[{"text": "a"}, {"text": "\\ud800"}, 3, {"x": "\\ud800", "text": "\\n\\u4e2d"},\n {"text":\r\n "c"}]'
    )
    skipped: list[SkippedRow] = []
    documents = list(read_documents(path, on_bad_row="skip", on_skip=skipped.append))
    assert [(document.row, document.text) for document in documents] == [(1, "a"), (4, "\n中"), (5, "c")]
    assert [(row.row, row.offset, row.raw.rstrip()) for row in skipped] == [
        (2, 16, '{"text": "\\ud800"}'),
        (3, 36, "3"),
    ]
    with pytest.raises(DataError, match=r"row 2, byte 16: the text holds a lone surrogate \(U\+D800\)"):
        list(read_documents(path))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.json.zst", "a.parquet"])
def test_truncated_files_are_errors_under_both_policies(tmp_path: Path, name: str) -> None:
    path = write_rows(tmp_path / name, [f"{number} " + "text " * 50 for number in range(400)])
    whole = path.read_bytes()
    for length in (len(whole) - 1, len(whole) // 2, 5):
        path.write_bytes(whole[:length])
        for policy in ("stop", "skip"):
            with pytest.raises(DataError, match=r"a\..* is truncated or damaged after row"):
                list(read_documents(path, on_bad_row=policy))  # type: ignore[arg-type]


def test_damage_within_a_compressed_file(tmp_path: Path) -> None:
    for name in ("a.jsonl.gz", "a.jsonl.zst", "a.parquet"):
        path = write_rows(tmp_path / name, [f"{number} {'text ' * (number % 9)}" for number in range(2000)])
        content = bytearray(path.read_bytes())
        content[len(content) // 3] ^= 0xFF
        path.write_bytes(content)
        with pytest.raises(DataError, match="is truncated or damaged after row"):
            list(read_documents(path))


def test_a_parquet_row_that_is_not_utf_8(tmp_path: Path) -> None:
    binary = pyarrow.array([b"one", b"\xff\xfe", "三".encode()])
    texts = pyarrow.Array.from_buffers(pyarrow.string(), 3, binary.buffers())
    parquet.write_table(pyarrow.table({"text": texts, "n": [1, 2, 3]}), tmp_path / "a.parquet")
    skipped: list[SkippedRow] = []
    documents = list(read_documents(tmp_path / "a.parquet", on_bad_row="skip", on_skip=skipped.append))
    assert [(document.row, document.text) for document in documents] == [(1, "one"), (3, "三")]
    assert [row.row for row in skipped] == [2] and "not valid UTF-8" in skipped[0].reason


def test_a_place_within_a_batch_of_parquet(tmp_path: Path) -> None:
    """An interrupted job may go on with chunks of another size."""
    path = write_rows(tmp_path / "a.parquet", TEXTS)
    for row in range(len(TEXTS)):
        assert texts_of(list(read_chunks(path, FileOffset(row)))) == list(enumerate(TEXTS, start=1))[row:]


def test_a_row_group_is_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": [os.urandom(500).hex() for _ in range(20_000)]})
    parquet.write_table(table, path, row_group_size=20_000, use_dictionary=False)
    before = pyarrow.total_allocated_bytes()
    chunks = read_chunks(path)
    first = next(chunks)
    assert first.rows < 2000
    assert pyarrow.total_allocated_bytes() - before < path.stat().st_size / 2
    assert first.rows + sum(chunk.rows for chunk in chunks) == 20_000


@pytest.mark.parametrize("categories", [False, True])
def test_chunks_of_a_table_are_cut_by_the_bytes_of_its_rows(tmp_path: Path, categories: bool) -> None:
    path = tmp_path / "a.parquet"  # of a few KB: five texts, and which of them each row has
    texts = pyarrow.array([f"{row % 5}" + " word" * 2000 for row in range(1000)])
    parquet.write_table(pyarrow.table({"text": texts.dictionary_encode() if categories else texts}), path)
    chunks = list(read_chunks(path, chunk_bytes=100_000))
    assert max(len(chunk.payload) for chunk in chunks) < 110_000 and sum(chunk.rows for chunk in chunks) == 1000
    assert texts_of(chunks) == list(enumerate(texts.to_pylist(), start=1))
    for done in (0, 7, len(chunks) - 2):
        assert list(read_chunks(path, chunks[done].end, 100_000)) == chunks[done + 1 :]
    largest = read_chunks(path, chunk_bytes=100)  # a row is never cut
    assert [chunk.rows for chunk in largest] == [1] * 1000


def test_zstd_frames_that_hold_no_text_are_passed_over(tmp_path: Path) -> None:
    note = b"\x50\x2a\x4d\x18\x05\x00\x00\x00hello"  # parallel compressors put such frames between the others
    frames = [zstandard.compress(b'{"text": "%s"}\n' % text) for text in (b"a", b"b")]
    (tmp_path / "a.jsonl.zst").write_bytes(note + frames[0] + note + frames[1])
    assert [document.text for document in read_documents(tmp_path / "a.jsonl.zst")] == ["a", "b"]


def test_zstd_that_repeats_itself_takes_little_memory(tmp_path: Path) -> None:
    row, path = b'{"text": "%s"}\n' % (b"again " * 200), tmp_path / "a.jsonl.zst"
    with path.open("wb") as file, zstandard.ZstdCompressor().stream_writer(file) as writer:
        for _ in range(400):
            writer.write(row * 800)
    tracemalloc.start()
    try:
        rows = sum(chunk.rows for chunk in read_chunks(path))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert rows == 320_000 and peak < len(row) * rows / 3


def test_a_compressed_file_that_became_shorter(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl.gz", TEXTS)
    with pytest.raises(DataError, match=r"truncated or damaged after row 90: the file is shorter than it was"):
        list(read_chunks(path, FileOffset(90, 100_000)))


@pytest.mark.usefixtures("file_modes_hold")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", TEXTS)
    path.chmod(0)
    with pytest.raises(DataError, match=r"cannot read .*a\.jsonl: Permission denied"):
        list(read_documents(path))


def test_empty_files(tmp_path: Path) -> None:
    for name, content in (
        ("a.jsonl", b""),
        ("a.json", b"  \n"),
        ("b.json", b"[ ]"),
        ("c.jsonl.zst", zstandard.compress(b"")),
    ):
        (tmp_path / name).write_bytes(content)
        assert list(read_documents(tmp_path / name)) == []
    (tmp_path / "d.parquet").write_bytes(b"")
    with pytest.raises(DataError, match="truncated or damaged"):
        list(read_documents(tmp_path / "d.parquet"))


def test_a_parquet_file_without_the_column(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.parquet", TEXTS)
    for policy in ("stop", "skip"):
        with pytest.raises(DataError, match="has no column 'content'; it has n, text"):
            list(read_documents(path, source="starcoder", on_bad_row=policy))  # type: ignore[arg-type]
    with pytest.raises(DataError, match="has no column 'content' or 'dialogue'; it has n, text"):
        list(read_documents(path, text_key="content"))


def test_progress_is_told_in_stored_bytes(tmp_path: Path) -> None:
    for name in NAMES:
        path = write_rows(tmp_path / name, TEXTS * 20)
        told: list[int] = []
        list(read_documents(path, on_bytes=told.append))
        assert sum(told) == path.stat().st_size and min(told) > 0, name


def test_values_that_only_the_second_parser_takes() -> None:
    def values(line: bytes) -> list[object]:
        return [value for *_, value in parse_chunk(RawChunk("a", "lines", line, 1, 1, 0, FileOffset(1)))]

    assert values(b'{"a": NaN}')[0].keys() == {"a"}  # type: ignore[attr-defined]
    assert values(b'{"text": "\\ud800"}') == [{"text": "\ud800"}]
    (bad,) = values(b'{"a": ' + b"9" * 5000 + b"}")
    assert isinstance(bad, BadRow) and "beyond any use" in str(bad)


def test_a_skipped_row_says_where_and_how_it_begins(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n\n{"text": 5, "more": "' + "三".encode() * 5000 + b'"}\n')
    skipped: list[SkippedRow] = []
    assert [document.row for document in read_documents(path, on_bad_row="skip", on_skip=skipped.append)] == [1]
    (row,) = skipped
    assert (row.row, row.offset, len(row.raw)) == (3, 15, 2000) and row.raw.startswith('{"text": 5')


def test_a_skipped_row_of_a_table_is_shown_as_json(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"text": ["一", None]}), tmp_path / "a.parquet")
    skipped: list[SkippedRow] = []
    list(read_documents(tmp_path / "a.parquet", on_bad_row="skip", on_skip=skipped.append))
    assert skipped == [
        SkippedRow(
            str(tmp_path / "a.parquet"), 2, "key 'text' holds null where a string was expected", 0, '{"text": null}'
        )
    ]


def test_chunks_can_be_sent_to_another_process(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.json", "a.parquet"):
        for chunk in read_chunks(write_rows(tmp_path / name, TEXTS), chunk_bytes=100):
            assert pickle.loads(pickle.dumps(chunk)) == chunk
