"""Every form that people have: the same rows however they are cut and from wherever, and nothing lost in silence."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import tracemalloc
from pathlib import Path

import fsspec
import pyarrow
import pytest
from pyarrow import parquet
from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter

from steel_megatron.data.reading import chunks as limits
from steel_megatron.data.reading.chunks import FileOffset, RawChunk
from steel_megatron.data.reading.documents import SkippedRow, read_documents
from steel_megatron.data.reading.formats import parse_chunk, read_chunks
from steel_megatron.errors import DataError
from tests.data.forms import PACKED, arrow_of, csv_of, in_two, samples_of, tar_of, through_pipe, warc_of

TEXTS = ["一" * 30, "two\nlines, and a comma", 'a "quote"', "😀" * 5, "x" * 3000, "; tab\t", "last"]

FILES: dict[str, bytes] = {
    "a.csv": csv_of(TEXTS),
    "b.csv": csv_of(TEXTS, delimiter=";", lineterminator="\n"),
    "a.tsv": csv_of(TEXTS, delimiter="\t"),
    "A.CSV.GZ": in_two(gzip.compress, csv_of(TEXTS)),
    "stream.arrow": arrow_of(TEXTS, False),
    "file.arrow": arrow_of(TEXTS, True),
    "a.tar": samples_of(TEXTS),
    "a.tgz": gzip.compress(samples_of(TEXTS)),
    "two.tar": samples_of(TEXTS[:3]) + samples_of(TEXTS[3:]),
    "a.wet": warc_of(TEXTS, False),
    "a.warc.wet.gz": warc_of(TEXTS),
    **{
        f"a.ndjson{end}": in_two(pack, "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode())
        for end, pack in PACKED.items()
    },
}
KEYS = {"a.tar": "txt", "a.tgz": "json.text", "two.tar": "txt"}


def texts_of(chunks: list[RawChunk]) -> list[tuple[int, object]]:
    found = []
    for chunk in chunks:
        for row, _, _, value in parse_chunk(chunk):
            assert isinstance(value, dict), value
            found.append((row, value["json"]["text"] if "json" in value else value["text"]))
    return found


@pytest.mark.parametrize("name", FILES)
def test_every_form_gives_the_same_rows_from_every_place(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(FILES[name])
    expected = list(enumerate(TEXTS, start=1))
    for chunk_bytes in (1, 100, 1 << 20):
        chunks = list(read_chunks(path, chunk_bytes=chunk_bytes))
        assert texts_of(chunks) == expected
        assert sum(chunk.rows for chunk in chunks) == len(TEXTS)
        for index, chunk in enumerate(chunks):
            assert list(read_chunks(path, chunk.end, chunk_bytes)) == chunks[index + 1 :]
    assert len(list(read_chunks(path, chunk_bytes=1))) == len(TEXTS)
    told: list[int] = []
    documents = list(read_documents(path, KEYS.get(name, "text"), on_bytes=told.append))
    assert [(document.row, document.text) for document in documents] == expected
    assert sum(told) == len(FILES[name])


@pytest.mark.parametrize("name", [name for name in FILES if name != "a.wet"])
def test_truncated_files_of_every_form_are_errors(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    whole = FILES[name]
    ends = [len(whole) - 10, len(whole) // 2, len(whole) // 3 + 1]
    if name in ("a.tar", "two.tar"):
        last = whole.rindex(b"last")
        ends = [last + 2, last - last % 512 + 512, last - last % 512 - 100]  # in a file, behind one, in what names it
    if name in ("a.csv", "b.csv", "a.tsv"):
        ends = [whole.index(b"lines")]  # within quotes; elsewhere a last record looks as one may
    if name == "a.warc.wet.gz":  # each record is a frame of its own; between two of them nothing tells a cut
        ends = [len(whole) - 10, whole.rindex(b"\x1f\x8b") + 5, whole.index(b"\x1f\x8b", 20) + 5]
    for end in ends:
        path.write_bytes(whole[:end])
        for policy in ("stop", "skip"):
            with pytest.raises(DataError, match="is truncated or damaged after row"):
                list(read_documents(path, KEYS.get(name, "text"), on_bad_row=policy))  # type: ignore[arg-type]


def test_a_record_of_a_crawl_of_another_length_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "a.wet"
    path.write_bytes(FILES["a.wet"][:-10])
    with pytest.raises(DataError, match=r"is truncated or damaged after row 0: the record at byte [0-9]+ has another"):
        list(read_documents(path))


def skipped_of(path: Path, **options: str) -> tuple[list[str], list[tuple[int, str]]]:
    skipped: list[SkippedRow] = []
    documents = list(read_documents(path, on_bad_row="skip", on_skip=skipped.append, **options))  # type: ignore[arg-type]
    return [document.text for document in documents], [(row.row, row.reason) for row in skipped]


def test_records_of_csv_that_are_broken(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'\xef\xbb\xbfid,text\n1,a\n2\n\n3,"b"c\n4,d,e\n5,\xff\n\xef\xbb\xbf6,f\r\n7,')
    texts, skipped = skipped_of(path)
    assert texts == ["a", "f"]
    assert [row for row, _ in skipped] == [2, 3, 4, 5, 7]
    reasons = [reason for _, reason in skipped]
    assert reasons[0] == "1 fields where the first line names 2" and "broken CSV" in reasons[1]
    assert "3 fields" in reasons[2] and "binary data that is not valid UTF-8 (byte 0 is 0xff" in reasons[3]
    assert reasons[4] == "empty"
    with pytest.raises(DataError, match=r"a\.csv, row 2: 1 fields where"):
        list(read_documents(path))


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,id,text\na,1,b\n")
    table = pyarrow.table([["a"], ["b"], [1]], names=["text", "text", "id"])
    parquet.write_table(table, tmp_path / "a.parquet")
    with pyarrow.OSFile(f"{tmp_path}/a.arrow", "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    for name in ("a.csv", "a.parquet", "a.arrow"):
        for policy in ("stop", "skip"):
            with pytest.raises(DataError, match=rf"{name} has two columns of the name 'text'"):
                list(read_documents(tmp_path / name, on_bad_row=policy))  # type: ignore[arg-type]
        with pytest.raises(DataError, match="has no column 'body' or 'dialogue'; it has text, "):
            list(read_documents(tmp_path / name, "body"))


@pytest.mark.parametrize(
    "kind", [pyarrow.binary(), pyarrow.large_binary(), pyarrow.binary(6), pyarrow.large_string(), pyarrow.binary_view()]
)
def test_tables_with_text_that_is_binary(tmp_path: Path, kind: pyarrow.DataType) -> None:
    values = [b"one\0\0\0", "二三".encode()] if kind == pyarrow.binary(6) else [b"one", "二三".encode()]
    table = pyarrow.table({"text": pyarrow.array(values, kind), "image": [b"\xff\xd8", b""]})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert [document.text for document in read_documents(tmp_path / "a.parquet")] == ["one", "二三"]
    if "binary" in str(kind):
        parquet.write_table(pyarrow.table({"text": pyarrow.array([b"abc\xffef"], kind)}), tmp_path / "b.parquet")
        with pytest.raises(DataError, match=r"row 1: key 'text' holds binary data that is not valid UTF-8 \(byte 3"):
            list(read_documents(tmp_path / "b.parquet"))


def test_keys_within_rows(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "bot", "content": "a"}]
    rows = [
        {"data": {"text": "x", "more": [1]}, "messages": turns, "texts": ["b", "c"], "a.b": "literal", "a": {"b": "n"}}
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for file in (path, tmp_path / "a.parquet"):
        for key, text in {
            "data.text": "x",
            "messages[].content": "q\na",
            "messages[1].content": "a",
            "texts": "b\nc",
            "texts[]": "b\nc",
            "texts[0]": "b",
            "a.b": "literal",
        }.items():
            assert [document.text for document in read_documents(file, key)] == [text], (file, key)
        for key, reason in {
            "data.body": "key 'data.body' is missing: no 'body' in 'text', 'more'",
            "data.text.x": "no 'x' in a str",
            "messages[5].content": r"no list, or has no entry 5",
            "data[].text": "what 'data' holds is no list",
            "data": "holds a dict where a string was expected",
            "messages[]": "holds a dict where a string was expected",
            "data..text": "no path such as data.text",
        }.items():
            with pytest.raises(DataError, match=reason.replace("[", r"\[").replace("]", r"\]")):
                list(read_documents(file, key))


def test_rows_that_are_the_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('"one"\n["two", "three"]\n{"text": "four"}\n')
    assert [document.text for document in read_documents(path)] == ["one", "two\nthree", "four"]
    (tmp_path / "a.json").write_text('["one", ["two", "three"]]')
    assert [document.text for document in read_documents(tmp_path / "a.json")] == ["one", "two\nthree"]
    for options in ({"text_key": "body"}, {"source": "skypile"}):
        with pytest.raises(DataError, match="row 1, byte 0: a JSON str where an object was expected"):
            list(read_documents(path, **options))


def test_byte_order_marks_where_files_were_put_together(tmp_path: Path) -> None:
    row = b'\xef\xbb\xbf{"text": "%d"}\n'
    (tmp_path / "a.jsonl").write_bytes(row % 1 + row % 2 + b"\xef\xbb\xbf\n" + row % 3)
    found = [(document.row, document.text) for document in read_documents(tmp_path / "a.jsonl")]
    assert found == [(1, "1"), (2, "2"), (4, "3")]


def test_samples_without_the_key_and_broken_ones(tmp_path: Path) -> None:
    members = {"a.json": b'{"text": "x"}', "b.txt": b"y", "c.json": b"{", "d.meta.json": b"{}", "._e.json": b"junk"}
    (tmp_path / "a.tar").write_bytes(tar_of(members))
    texts, skipped = skipped_of(tmp_path / "a.tar", text_key="json.text")
    assert texts == ["x"] and [row for row, _ in skipped] == [2, 3, 4]
    assert "broken JSON under 'json'" in skipped[1][1]
    with pytest.raises(DataError, match=r"row 1: key 'text' is missing; the row has '__key__', 'json'"):
        list(read_documents(tmp_path / "a.tar"))


PAGE = """<!DOCTYPE html><html><head><title>T</title><style>p {}</style></head><body><script>var x = "<p>";</script>
<h1>标题</h1><p>One &amp; <b>two</b>
 words.<br>Next<ul><li>a</li><li>b</li></ul><table><tr><td>1</td><td>2</td></tr></table><pre>x
  y</pre><svg><text>no</text></svg></body></html>"""
PAGE_TEXT = "标题\nOne & two words.\nNext\na\nb\n1\t2\nx\n  y"


def test_pages_and_markdown(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(PAGE, encoding="utf-8")
    page = PAGE.replace("<head>", '<head><meta http-equiv=x content="text/html; charset=gb2312">')
    (tmp_path / "b.HTM.gz").write_bytes(gzip.compress(page.encode("gb18030")))
    (tmp_path / "c.md").write_text("# A\n\n<b>kept</b>\n")
    for name in ("a.html", "b.HTM.gz"):
        assert [document.text for document in read_documents(tmp_path / name)] == [PAGE_TEXT]
    assert [document.text for document in read_documents(tmp_path / "c.md")] == ["# A\n\n<b>kept</b>\n"]
    (tmp_path / "d.html").write_bytes(b"<p>\xff")
    (tmp_path / "e.html").write_bytes(b'<meta charset="klingon"><p>x')
    (tmp_path / "f.html").write_text("<div>" * 5000 + "deep")
    for name, reason in {
        "d": "not valid utf-8",
        "e": "'klingon', which is not known",
        "f": "nested more than 512",
    }.items():
        with pytest.raises(DataError, match=reason):
            list(read_documents(tmp_path / f"{name}.html"))


def test_responses_of_a_crawl(tmp_path: Path) -> None:
    content = io.BytesIO()
    writer = WARCWriter(content, gzip=True)

    def respond(body: bytes, kind: str, status: str = "200 OK") -> None:
        headers = StatusAndHeaders(status, [("Content-Type", kind)], protocol="HTTP/1.1")
        url = "http://e.org/"
        writer.write_record(writer.create_warc_record(url, "request", http_headers=headers))
        writer.write_record(writer.create_warc_record(url, "response", payload=io.BytesIO(body), http_headers=headers))

    respond(PAGE.encode("gb18030"), "text/html; charset=GBK")
    respond(b"\x89PNG", "image/png")
    respond("caf\xe9".encode("latin-1"), "text/plain; charset=iso-8859-1")
    respond(b"<p>gone", "text/html", "404 Not Found")
    (tmp_path / "a.warc.gz").write_bytes(content.getvalue())
    skipped: list[SkippedRow] = []
    documents = list(read_documents(tmp_path / "a.warc.gz", on_skip=skipped.append))  # images stop nothing
    assert [(document.row, document.text) for document in documents] == [(1, PAGE_TEXT), (3, "caf\xe9")]
    assert [(row.row, row.reason) for row in skipped] == [
        (2, "content of type image/png"),
        (4, "a response of status 404"),
    ]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.csv", "a.json", "a.tar", "a.txt", "a.wet"])
def test_rows_that_are_too_long_are_refused_with_their_place(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "LONGEST_ROW", 20_000)
    texts = ["a", "x" * 70_000, "b"]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    contents = {
        "a.jsonl": lines.encode(),
        "a.jsonl.gz": gzip.compress(lines.encode()),
        "a.csv": csv_of(texts),
        "a.json": json.dumps([{"text": text} for text in texts]).encode(),
        "a.tar": samples_of(texts),
        "a.txt": b"x" * 70_000,
        "a.wet": warc_of(texts),
    }
    path = tmp_path / name
    path.write_bytes(contents[name])
    key = "txt" if name == "a.tar" else "text"
    for chunk_bytes in (1, 10_000):
        if name in ("a.csv", "a.json", "a.txt"):  # what follows cannot be told apart
            with pytest.raises(DataError, match=r"20,000"):
                list(read_chunks(path, chunk_bytes=chunk_bytes))
            continue
        chunks = list(read_chunks(path, chunk_bytes=chunk_bytes))
        assert sum(chunk.rows for chunk in chunks) == 3
        for index, chunk in enumerate(chunks):
            assert len(chunk.payload) < 20_000
            assert list(read_chunks(path, chunk.end, chunk_bytes)) == chunks[index + 1 :]
    if name in ("a.jsonl", "a.jsonl.gz", "a.tar", "a.wet"):
        monkeypatch.setattr("steel_megatron.data.reading.formats.CHUNK_BYTES", 1000)
        where = r", row 2, byte 14: a row of 70,013 bytes" if "jsonl" in name else ", row 2: .*a row of 70,000 bytes"
        found: list[SkippedRow] = []
        for chunk_bytes in (1, 10_000):
            monkeypatch.setattr(read_chunks, "__defaults__", (FileOffset(), chunk_bytes, None, None, False))
            with pytest.raises(DataError, match=where + "; the longest that is read has 20,000"):
                list(read_documents(path, key))
            assert [row.text for row in read_documents(path, key, "skip", found.append)] == ["a", "b"]


@pytest.mark.slow
def test_a_line_of_gigabytes_takes_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.write(b'{"text": "a"}\n')
        file.truncate(5 << 30)
        file.seek(5 << 30)
        file.write(b'\n{"text": "b"}\n')
    skipped: list[SkippedRow] = []
    tracemalloc.start()
    try:
        texts = [document.text for document in read_documents(path, on_bad_row="skip", on_skip=skipped.append)]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert texts == ["a", "b"] and [(row.row, row.offset) for row in skipped] == [(2, 14)]
    assert "a row of 5,368,709,107 bytes" in skipped[0].reason and peak < 32 << 20


@pytest.mark.parametrize("name", ["stream", "a.jsonl.xz", "a.csv", "a.tar.gz", "packed"])
def test_pipes(tmp_path: Path, name: str) -> None:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    content = {
        "stream": lines,
        "a.jsonl.xz": lzma.compress(lines),
        "a.csv": csv_of(TEXTS),
        "a.tar.gz": gzip.compress(samples_of(TEXTS)),
        "packed": bz2.compress(json.dumps([{"text": text} for text in TEXTS]).encode()),
    }[name]
    writer = through_pipe(tmp_path / name, content)
    key = "txt" if "tar" in name else "text"
    for _ in range(2):  # looked at without being taken
        next(read_chunks(tmp_path / name, peek=True))
    assert [document.text for document in read_documents(tmp_path / name, key)] == TEXTS
    writer.join(10)
    assert not writer.is_alive()


def test_a_pipe_resumes_by_count(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    chunks = list(read_chunks(tmp_path / "a.jsonl", chunk_bytes=100))
    for done, chunk in enumerate(chunks):
        path = tmp_path / f"pipe{done}"
        through_pipe(path, lines)
        again = list(read_chunks(path, chunk.end, 100))
        assert [(chunk.payload, chunk.end) for chunk in again] == [(c.payload, c.end) for c in chunks[done + 1 :]]


def test_a_table_cannot_come_through_a_pipe(tmp_path: Path) -> None:
    through_pipe(tmp_path / "a.arrow", b"x")
    with pytest.raises(DataError, match=r"a\.arrow is a stream, and a arrow file is read from its end"):
        list(read_chunks(tmp_path / "a.arrow"))


@pytest.mark.parametrize("name", [*FILES, "a.parquet"])
def test_every_form_from_a_remote_address(name: str) -> None:
    content = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": TEXTS}), content)
    address = f"memory://remote/{name}"
    with fsspec.open(address, "wb") as file:
        file.write(FILES.get(name, content.getvalue()))
    chunks = list(read_chunks(address, chunk_bytes=100))
    assert texts_of(chunks) == list(enumerate(TEXTS, start=1))
    for index, chunk in enumerate(chunks):
        assert list(read_chunks(address, chunk.end, 100)) == chunks[index + 1 :]
