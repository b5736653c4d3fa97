"""The compiled reader of JSON lines takes what a whole parser takes, with the same texts, and nothing else."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steel_megatron.data.native import helpers
from steel_megatron.data.reading.chunks import FileOffset, RawChunk
from steel_megatron.data.reading.documents import SkippedRow, documents_of, plain_texts, text_batches
from steel_megatron.data.reading.sources import Row, SkyPile, Source, Text
from steel_megatron.data.tokenizing.gigatoken_engine import unsure, unsure_by_numpy
from steel_megatron.errors import DataError
from tests import needs

pytestmark = needs.compiled.mark


def chunk(lines: bytes) -> RawChunk:
    return RawChunk("a.jsonl", "lines", lines, lines.count(b"\n") + 1, 7, 100, FileOffset())


Read = list[tuple[bytes, int, bool]]
"""Texts with their rows and whether they are dialogues."""


def by_parser(lines: bytes, source: Source, skipped: list[SkippedRow] | None = None) -> Read:
    policy: Any = "stop" if skipped is None else "skip"
    documents = documents_of(chunk(lines), source, policy, None if skipped is None else skipped.append)
    return [(document.text.encode(), document.row, document.dialogue) for document in documents]


def joined(lines: bytes, source: Source, skipped: list[SkippedRow] | None = None) -> Read:
    policy: Any = "stop" if skipped is None else "skip"
    parts = text_batches(chunk(lines), source, policy, None if skipped is None else skipped.append)
    return [(text, row, dialogue) for texts, rows, dialogue in parts for text, row in zip(texts, rows, strict=True)]


def taken(lines: bytes, source: Source) -> Read | None:
    """What the compiled reader takes by itself; None where it leaves a line."""
    found = plain_texts(chunk(lines), source)
    if found is None or found.left:
        return None
    return [(text, row, False) for text, row in zip(found.texts, found.rows, strict=True)]


CHARACTERS = st.characters(exclude_categories=["Cs"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(CHARACTERS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(CHARACTERS, max_size=3), inner, max_size=3),
    max_leaves=8,
)
ROWS = st.tuples(
    st.text(CHARACTERS),
    st.dictionaries(st.text(CHARACTERS, max_size=6) | st.just("dialogue"), VALUES, max_size=3),
    st.booleans(),
    st.sampled_from([(",", ":"), (" , ", " :\t"), (", ", ": ")]),
    st.sampled_from(["\n", "\r\n", " \n\n", "\n \t\r\n"]),
)


@given(st.lists(ROWS, max_size=4), st.sampled_from([Text(), SkyPile()]))
@settings(deadline=None)
def test_texts_are_those_of_the_parser(rows: list[Any], source: Source) -> None:
    lines = ""
    for text, more, ascii_only, separators, end in rows:
        row = {**more, "text": f"长{text}", "last": 1}
        lines += json.dumps(row, ensure_ascii=ascii_only, separators=separators) + end
    assert joined(lines.encode(), source) == by_parser(lines.encode(), source)


def test_plain_rows_are_taken() -> None:
    rows: list[dict[str, Any]] = [
        {"text": "a"},
        {
            "id": 1,
            "text": '\t长江\n"\\/\b\f\r\x00\x7f😀 \u2028',
            "score": -0.5e-3,
            "more": [{}, [], {"text": None}, True],
        },
        {"text": "x" * 100 + "长" * 100, "url": "https://a/b?c=\u00e9"},
    ]
    for ascii_only in (False, True):
        lines = "\n".join(["", *(json.dumps(row, ensure_ascii=ascii_only) for row in rows), " ", ""]).encode()
        assert taken(lines, Text()) == [(row["text"].encode(), 8 + at, False) for at, row in enumerate(rows)]
    assert taken(b'{"content": "a", "dialogue": true}', Text("content")) is None
    assert taken(b'{"text": "a", "dialogue": true}', SkyPile()) == [(b"a", 7, False)]
    assert taken(b"", Text()) == taken(b"\n \n", Text()) == []


@pytest.mark.parametrize(
    "line",
    [
        b"{}", b"[]", b'"text"', b"1", b"{", b'{"text"', b'{"text":', b'{"text": "a', b'{"text": "a"',
        b'{"text": "a"} x', b'{"text": "a"}{"text": "b"}', b'{"text": "a",}', b'{, "text": "a"}',
        b'{"text": "a" "b": 1}', b"{'text': 'a'}", b'{"text": ""}', b'{"text": " \\n\\u3000"}', b'{"text": null}',
        b'{"text": 1}', b'{"text": ["a"]}', b'{"Text": "a"}', b'{"text": "a", "text": "b"}',
        b'{"te\\u0078t": "b", "text": "a"}', b'{"text": "a", "dialogue": false}', b'{"text": "a\x01"}',
        b'{"text": "a\xff"}', b'{"text": "\xed\xa0\x80a"}', b'{"text": "\xc0\xafa"}', b'{"text": "a\xe9\x95"}',
        b'{"text": "\xf4\x90\x80\x80a"}', b'{"text": "a", "b": "\xff"}', b'{"text": "a\\x"}', b'{"text": "a\\u12g4"}',
        b'{"text": "a\\', b'{"text": "a\\ud800"}', b'{"text": "a\\ud800\\u0041"}', b'{"text": "a\\udc00\\ud800"}',
        b'{"text": "a\\u12', b'{"text": "a", "b": 01}', b'{"text": "a", "b": -}', b'{"text": "a", "b": .5}',
        b'{"text": "a", "b": 1.}', b'{"text": "a", "b": 1e}', b'{"text": "a", "b": 1e999}',
        b'{"text": "a", "b": NaN}', b'{"text": "a", "b": tru}', b'{"text": "a", "b": 123456789012345678901234567890}',
        b'{"text": "a", "b": [1,]}', b'{"text": "a", "b": {"c"}}',
        b'{"text": "a", "b": ' + b"[" * 200 + b"]" * 200 + b"}", b'\xef\xbb\xbf{"text": "a"}', b'\x0c{"text": "a"}',
    ],
)  # fmt: skip
def test_everything_else_is_left_to_the_parser(line: bytes) -> None:
    found = plain_texts(chunk(b'{"text": "a"}\n' + line + b'\n{"text": "b"}'), Text())
    assert found is not None and found.left == [(8, 14, 14 + len(line))]
    assert list(found.texts) == [b"a", b"b"] and found.rows.tolist() == [7, 9]


def test_rows_that_are_left_keep_their_place() -> None:
    """Bad, empty and unusual rows among plain ones: documents, skipped rows and their order are the parser's."""
    draw = random.Random(0)
    odd = [
        b"broken", b'{"text": null}', b'{"text": " "}', b'{"text": "\xff"}', b'{"text": "a\\ud800"}', b"[1]", b"",
        b" \r", b'{"text": "<|im_start|>user\\nq<|im_end|>", "dialogue": true}', b'{"text": "b", "dialogue": false}',
        b'{"te\\u0078t": "escaped"}', b'{"text": "\\u3000\xe3\x80\x80x"}',
    ]  # fmt: skip
    for share in (0.0, 0.05, 0.2, 0.5, 1.0):
        for end in (b"\n", b"\r\n"):
            rows = [
                draw.choice(odd) if draw.random() < share else json.dumps({"text": f"长{number}"}).encode()
                for number in range(200)
            ]
            lines = end.join(rows)
            skipped: list[SkippedRow] = []
            expected: list[SkippedRow] = []
            assert joined(lines, Text(), skipped) == by_parser(lines, Text(), expected)
            assert skipped == expected and bool(skipped) == (share > 0)
            assert (plain_texts(chunk(lines), Text()) is None) == (share >= 0.5), "much that is left costs time twice"
    cluster = b"\n".join([b'{"text": ""}'] * 100 + [b'{"text": "a text of some length"}'] * 1000)
    found = plain_texts(chunk(cluster), Text())
    assert found is not None and len(found.left) == 100, "what counts is the share of the whole"
    with pytest.raises(DataError, match=r"a.jsonl, row 8, byte 114: broken JSON"):
        joined(b'{"text": "a"}\nbroken\n', Text())


def test_no_damage_passes_for_a_text() -> None:
    """Lines with a few bytes changed: what is taken is what the parser makes of them."""
    draw, count = random.Random(0), 0
    bits = [
        b'"',
        b"\\",
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
        b"0",
        b"-",
        b"e",
        b"u",
        b" ",
        b"\t",
        b"\x00",
        b"\x80",
        b"\xe9",
        b"\xf0",
    ]
    row = {"id": 12, "text": '长江 a\n"b" \\u😀', "of": {"x": [1.5, -2e3, None, True], "text": "y"}, "last": "é"}
    lines = [json.dumps(row, ensure_ascii=ascii_only).encode() for ascii_only in (False, True)]
    for _ in range(40_000):
        line = bytearray(draw.choice(lines))
        for _ in range(draw.randint(1, 3)):
            at = draw.randrange(len(line))
            line[at : at + draw.randint(0, 2)] = b"".join(draw.choices(bits, k=draw.randint(0, 2)))
        found = taken(bytes(line), Text())
        if found is not None:
            count += 1
            assert found == by_parser(bytes(line), Text()), bytes(line)
    assert count > 1000


def test_a_source_of_its_own_reads_its_rows_itself() -> None:
    class Upper(Text):
        def text(self, row: Row) -> str:
            return str(super().text(row)).upper()

    assert plain_texts(chunk(b'{"text": "a"}'), Upper()) is None
    assert taken(b'{"text": "a"}', Text("\udc80")) is None  # of a command line that is no UTF-8
    assert plain_texts(RawChunk("a.txt", "file", b"a", 1, 1, 0, FileOffset(1)), Text()) is None


@given(st.lists(st.text(st.sampled_from("ab\x7f\x80éÿĀ长\u1ac3\u0c3c\uffff\U00010000\U0001e130\U0010ffff"))))
def test_texts_to_be_unsure_about_are_the_same(texts: list[str]) -> None:
    expected = unsure_by_numpy(texts)
    assert unsure(texts) == unsure([text.encode() for text in texts]) == expected


@given(st.binary(max_size=12), st.integers(0, 9))
def test_what_is_no_utf8_is_noticed(content: bytes, before: int) -> None:
    content = b"a" * before + content
    try:
        content.decode()
    except UnicodeDecodeError:
        with pytest.raises(DataError, match="text 1 of 2 to encode is not valid UTF-8"):
            unsure([b"a", content])
    else:
        assert unsure([b"a", content]) == [number + 1 for number in unsure_by_numpy([content.decode()])]


def test_characters_are_looked_up_within_bounds() -> None:
    with pytest.raises(IndexError, match="a mark for each code point"):
        helpers.holding(b"a\xff", np.array([1]), np.zeros(0x10FFFF, dtype=np.uint8))
    marks = np.zeros(0x110000, dtype=np.uint8)
    for ends in ([3], [-1], [1, 0], [2, 2**62], [-(2**63)]):
        with pytest.raises(IndexError, match="ends of texts"):
            helpers.holding(b"a\xff", np.array(ends), marks)
    assert helpers.holding(b"", np.zeros(0, np.int64), marks) == []
