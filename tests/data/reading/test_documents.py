"""Reading raw corpora: every form of a good row, every form of a bad one."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from steel_megatron.data.reading.documents import Document, SkippedRow, documents_of, read_documents
from steel_megatron.data.reading.formats import read_chunks
from steel_megatron.data.reading.inputs import parse_inputs
from steel_megatron.data.reading.sources import Row, Source, string
from steel_megatron.errors import DataError

GOOD = b'{"text": "fine"}\n'

BAD_ROWS = {
    "broken": (b'{"text": "x"', "broken JSON"),
    "trailing": (b'{"text": "x"} {"text": "y"}', "broken JSON"),
    "array": (b'["text", 5]', "a JSON list where an object"),
    "number": (b"3", "a JSON int where an object"),
    "missing": (b'{"content": "x"}', "key 'text' is missing; the row has 'content'"),
    "no keys": (b"{}", "the row has no keys"),
    "null": (b'{"text": null}', "key 'text' holds null"),
    "number value": (b'{"text": 5}', "key 'text' holds a int"),
    "list value": (b'{"text": ["x", {}]}', "key 'text' holds a dict"),
    "utf-8": (b'{"text": "ab\xff"}', "not valid UTF-8 (byte 0xff"),
    "cut character": (b'{"text": "\xe4\xbd"}', "not valid UTF-8"),
    "surrogate": (b'{"text": "x\\ud83d"}', "lone surrogate (U+D83D)"),
    "deep": (b"[" * 200_000, "JSON"),
    "long number": (b'{"text": "x", "n": ' + b"1" * 5000 + b"}", "JSON beyond any use"),
}


def expand_inputs(inputs: list[str]) -> list[Path]:
    return [Path(found.path) for found in parse_inputs(inputs)]


def texts_of(path: Path, **options: object) -> list[str]:
    return [document.text for document in read_documents(path, **options)]  # type: ignore[arg-type]


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_row_stops_with_file_row_and_byte(tmp_path: Path, name: str) -> None:
    row, reason = BAD_ROWS[name]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + b"\n" + row + b"\n" + GOOD)
    with pytest.raises(DataError) as caught:
        texts_of(path)
    message = str(caught.value)
    assert f"{path}, row 3, byte " in message and reason in message
    offset = int(message.split("byte ", 1)[1].split(":")[0])
    assert len(GOOD) + 1 <= offset <= len(GOOD) + 1 + len(row)


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_row_is_skipped_and_reported(tmp_path: Path, name: str) -> None:
    row, reason = BAD_ROWS[name]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + row + b"\n" + GOOD)
    skipped: list[SkippedRow] = []
    documents = list(read_documents(path, on_bad_row="skip", on_skip=skipped.append))
    assert documents == [Document("fine", str(path), 1), Document("fine", str(path), 3)]
    assert [(entry.source, entry.row) for entry in skipped] == [(str(path), 2)]
    assert reason in skipped[0].reason


def test_byte_offset_points_at_the_bad_byte(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    content = b"\xef\xbb\xbf" + GOOD + '{"text": "你好'.encode() + b'\xff"}\n'
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"row 2, byte {content.index(0xFF)}"):
        texts_of(path)


def test_bom_crlf_blank_lines_and_missing_newline(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n   \n{"text": "b"}\r\n{"text": "c\\r\\nd"}')
    found = list(read_documents(path))
    assert [(document.text, document.row) for document in found] == [("a", 1), ("b", 4), ("c\r\nd", 5)]


@pytest.mark.parametrize("policy", ["stop", "skip"])
@pytest.mark.parametrize("empty", ["", "  \n\t"])
def test_empty_text_is_skipped_under_both_policies(tmp_path: Path, policy: str, empty: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps({"text": empty}).encode() + b"\n" + GOOD)
    skipped: list[SkippedRow] = []
    assert texts_of(path, on_bad_row=policy, on_skip=skipped.append) == ["fine"]
    assert skipped == [SkippedRow(str(path), 1, "empty", 0, json.dumps({"text": empty}))]


def test_empty_file_has_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.touch()
    assert texts_of(path) == []


def test_gzip_reads_the_same_and_counts_stored_bytes(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b"".join(b'{"text": "row %d"}\n' % row for row in range(5000))))
    read: list[int] = []
    assert texts_of(path, on_bytes=read.append) == [f"row {row}" for row in range(5000)]
    assert sum(read) == path.stat().st_size


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_truncated_gzip_is_an_error_under_both_policies(tmp_path: Path, policy: str) -> None:
    path = tmp_path / "rows.jsonl.gz"
    content = gzip.compress(b"".join(b'{"text": "row %d"}\n' % row for row in range(5000)))
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match="truncated or damaged after row"):
        texts_of(path, on_bad_row=policy)
    path.write_bytes(b"not gzip at all")
    with pytest.raises(DataError, match="truncated or damaged after row 0"):
        texts_of(path, on_bad_row=policy)


def test_whole_file_formats(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo\n")
    (tmp_path / "b.py").write_bytes(b"def f():\n\treturn 1\n")
    (tmp_path / "c.py").write_bytes(b"# caf\xe9\n")
    assert texts_of(tmp_path / "a.txt") == ["one\n\ntwo\n"]
    assert texts_of(tmp_path / "b.py") == ["def f():\n\treturn 1\n"]
    with pytest.raises(DataError, match=r"c\.py, row 1, byte 5: not valid UTF-8"):
        texts_of(tmp_path / "c.py")
    assert texts_of(tmp_path / "c.py", on_bad_row="skip") == []


def test_unreadable_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*none\.jsonl: No such file"):
        texts_of(tmp_path / "none.jsonl")


def test_expand_inputs_is_sorted_and_filtered(tmp_path: Path) -> None:
    names = ["b/x.jsonl", "a/y.txt", "a/__pycache__/z.py", "a/.hidden/z.py", "a/.z.py", "a/deep/w.jsonl.gz", "a/n.old"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = expand_inputs([str(tmp_path)])
    assert found == [tmp_path / name for name in ("a/deep/w.jsonl.gz", "a/y.txt", "b/x.jsonl")]
    # The order of the inputs is kept, and nothing is read twice.
    assert expand_inputs([str(tmp_path / "b/*.jsonl"), str(tmp_path)]) == [found[2], found[0], found[1]]
    assert expand_inputs([str(tmp_path / "**/*.txt")]) == [found[1]]


def test_a_name_with_brackets_is_a_file_before_it_is_a_pattern(tmp_path: Path) -> None:
    path = tmp_path / "part[1].jsonl"
    path.touch()
    assert expand_inputs([str(path)]) == [path]


def test_inputs_that_match_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no\*\.jsonl' matches no file"):
        expand_inputs([str(tmp_path / "no*.jsonl")])
    with pytest.raises(DataError, match=r"matches no file; the name of a file must end in \.jsonl"):
        expand_inputs([str(tmp_path)])
    (tmp_path / "x.old").touch()
    with pytest.raises(DataError, match=r"x\.old is of no known form"):
        expand_inputs([str(tmp_path / "x.old")])
    for given in (tmp_path, tmp_path / "*"):
        with pytest.raises(DataError, match=r"holds no file of a known form \(1 of no known form \(.*x\.old\)\)"):
            expand_inputs([str(given)])
    with pytest.raises(DataError, match="no input was given"):
        expand_inputs([])


def test_one_string_is_no_list_of_inputs(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the inputs are one string, 'a\.jsonl'.*\[a\.jsonl\]"):
        expand_inputs("a.jsonl")


def test_files_that_a_caller_writes_itself_are_left_out(tmp_path: Path) -> None:
    for name in ("a.jsonl", "own.jsonl"):
        (tmp_path / name).touch()

    def own(path: Path) -> bool:
        return path.name == "own.jsonl"

    for given in (tmp_path, tmp_path / "*.jsonl"):
        assert [found.path for found in parse_inputs([str(given)], own)] == [str(tmp_path / "a.jsonl")]
    with pytest.raises(DataError, match=r"own\.jsonl is a file that this very job writes"):
        parse_inputs([f"{tmp_path}/../{tmp_path.name}/own.jsonl"], own)


def test_a_source_that_makes_a_lone_surrogate_gives_a_bad_row(tmp_path: Path) -> None:
    class Nested(Source):
        def text(self, row: Row) -> str:
            return str(json.loads(string(row, "meta"))["text"])

    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"meta": '{"text": "a\\ud83d"}'}) + '\n{"meta": "{\\"text\\": \\"b\\"}"}\n')
    skipped: list[SkippedRow] = []
    chunk = next(read_chunks(path))
    assert [document.text for document in documents_of(chunk, Nested(), "skip", skipped.append)] == ["b"]
    assert [(row.row, row.reason) for row in skipped] == [(1, "the text holds a lone surrogate (U+D83D)")]
