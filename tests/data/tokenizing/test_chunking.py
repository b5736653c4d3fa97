"""Long texts encode to the same ids in pieces as in one go."""

from __future__ import annotations

import base64
import functools
import itertools
import json
import random
import re
import string
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steel_megatron.data.indexed.dataset import token_dtype
from steel_megatron.data.preprocessing.encoder import Encoder, Position, Task
from steel_megatron.data.reading.chunks import FileOffset, RawChunk
from steel_megatron.data.reading.sources import get_source
from steel_megatron.data.tokenizing.chunking import DIALOGUE_MARKS, pieces
from steel_megatron.data.tokenizing.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer
from tests.data.conftest import KINDS, make_texts, rows_of

GetTokenizer = Callable[[str], Tokenizer]
TOKENIZERS = ["sp", *KINDS]


@pytest.fixture(scope="session")
def tokenizer_of(request: pytest.FixtureRequest, sp: SentencePieceTokenizer) -> GetTokenizer:
    """A tokenizer of SentencePiece, or one in Qwen's layout."""

    @functools.cache
    def get(name: str) -> Tokenizer:
        folder = request.getfixturevalue(f"{name}_qwen").folder if name != "sp" else None
        return sp if folder is None else HuggingFaceTokenizer(folder, engine="tokenizers")

    return get


@pytest.fixture(scope="session")
def text_of_samples(sample_files: dict[str, Path]) -> str:
    """Rows of corpora, Chinese, English and code, one after the other."""
    keys = {"wanjuan": "content", "firefly": "target"}
    texts = [row[key] for source, key in keys.items() for row in rows_of(sample_files[source], 150)]
    return "\n".join([*texts, *make_texts(50)])


@pytest.mark.slow
def test_pieces_of_samples(text_of_samples: str, kind: str, tokenizer_of: GetTokenizer) -> None:
    text, encode = text_of_samples, tokenizer_of(kind).encode
    assert len(text) > 25_000
    whole = encode(text)
    for longest in (3000, 20_000):
        found = pieces(text, encode, longest)
        assert "".join(found) == text and len(found) > len(text) // longest
        assert max(map(len, found)) <= longest
        assert [index for piece in found for index in encode(piece)] == whole


@settings(max_examples=60, deadline=None)
@given(
    words=st.lists(
        st.sampled_from(["ab", "字", "。", "\n", " ", "  ", "\n\n", "a", "1", "-", "\u3000", "é", "▁"]), min_size=60
    ),
    longest=st.integers(20, 60),
)
def test_pieces_of_any_text(sp: SentencePieceTokenizer, words: list[str], longest: int) -> None:
    text = "".join(words)
    found = pieces(text, sp.encode, longest)
    assert "".join(found) == text and all(found)
    assert [index for piece in found for index in sp.encode(piece)] == sp.encode(text)


Encode = Callable[[str], list[int]]


def splitter(pattern: str) -> tuple[Callable[[str], list[str]], Encode]:
    """A tokenizer whose tokens are the matches of a pattern, each with an id of its own."""
    ids: dict[str, int] = {}

    def tokens(text: str) -> list[str]:
        return re.findall(pattern, text, re.DOTALL)

    return tokens, lambda text: [ids.setdefault(token, len(ids)) for token in tokens(text)]


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (r"\nb|a c|.", "xxx\nb"),
        (r"\nb|a c|.", "xxx\nb y c"),
        (r"\nb|a c|.", "xa c"),
        (r"\d{1,3}|\D", "1234567"),
        (r"\d{1,3}|\D", "123,4567890;"),
        (r"\w+|\W+", "ab, cd\n"),
        (r"a{1,5}|.", "aaaaaaaaaaaaaab"),
    ],
)
def test_no_cut_goes_through_a_token(pattern: str, text: str) -> None:
    tokens, encode = splitter(pattern)
    text *= 1200
    found = pieces(text, encode, 500)
    assert "".join(found) == text
    assert set(itertools.accumulate(map(len, found))) <= set(itertools.accumulate(map(len, tokens(text))))
    assert [index for piece in found for index in encode(piece)] == encode(text)
    assert len(found) >= len(text) // 600 or set(text) <= set(string.digits)


def test_a_text_without_a_place_stays_whole(sp: SentencePieceTokenizer) -> None:
    whole: Encode = lambda text: [hash(text)]  # noqa: E731
    for text in ("a" * 1000, "a b\nc。d,1" * 300):
        assert pieces(text, whole, 100) == [text]
    until: Encode = lambda text: [hash(part) for part in text.split("|")]  # noqa: E731
    assert pieces("a\nb," * 1000, until, 100) == ["a\nb," * 1000]
    assert pieces("a" * 1000 + "\nb" + "c" * 99, sp.encode, 100)[-1] == "b" + "c" * 99
    assert pieces("", sp.encode, 100) == [""]


@pytest.mark.slow
@pytest.mark.parametrize("unit", [3, 2, 16])
def test_runs_whose_tokens_depend_on_their_begin_stay_whole(unit: int) -> None:
    """Near a place in the middle, a token seems to end where it does not."""
    _, encode = splitter(rf"a{{1,{unit}}}|.")
    for text in ("a" * 20_000, "b" + "a" * 20_000):
        found = pieces(text, encode, 700)
        assert [index for piece in found for index in encode(piece)] == encode(text)


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["null,", "    \n", "ab", "------+------+"])
def test_repeated_patterns_whose_tokens_depend_on_their_begin_stay_whole(unit: str) -> None:
    """A token of two patterns: near a place in the middle nothing tells whether it is the first or the second."""
    _, encode = splitter(rf"(?:{re.escape(unit)}){{2}}|.")
    for text in (unit * 4000, "b" + unit * 4001):
        found = pieces(text, encode, 700)
        assert [index for piece in found for index in encode(piece)] == encode(text)


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["    \n", "        \r\n", "\t\t\t\t\n", "------+------+", " " * 12 + "\n"])
@pytest.mark.parametrize("name", KINDS)
def test_repeated_patterns_in_qwen_s_layout(tokenizer_of: GetTokenizer, name: str, unit: str) -> None:
    text, encode = "begin\n" + unit * 3000 + "end", tokenizer_of(name).encode
    found = pieces(text, encode, 4000)
    assert [index for piece in found for index in encode(piece)] == encode(text)


@pytest.mark.slow
def test_no_cut_goes_through_a_mark_of_a_dialogue() -> None:
    encode: Encode = lambda text: list(map(ord, text))  # noqa: E731
    for filling in ("x" * 37, "x1,y;" * 7, "、よ" * 9):
        text = "".join(f"{mark}{filling}" for mark in DIALOGUE_MARKS * 200)
        for longest in (13, 50, 51, 97):
            found = pieces(text, encode, longest)
            assert len(found) > 100
            assert sum(piece.count(mark) for piece in found for mark in DIALOGUE_MARKS) == 400


DRAW = random.Random(0)
SORTS = {
    "numbers": ",".join(f"{DRAW.random():.6f}" for _ in range(2500)),
    "digits": "".join(DRAW.choices(string.digits, k=20_000)),
    "base64": base64.b64encode(DRAW.randbytes(15_000)).decode(),
    "letters": "".join(DRAW.choices(string.ascii_lowercase, k=20_000)),
    "json": '{"a":[1,2],"b":"c"},' * 1000,
    "script": "function(a,b){return a+b};" * 800,
    "thai": "สวัสดีครับ" * 2000,
    "japanese": "これは長い文章、" * 2500,
    "kana": "".join(DRAW.choices("これはながいぶんしょうカタ漢字", k=20_000)),
    "emoji": "".join(DRAW.choices("😀👍🏽🇨🇳\u200d\ufe0fe\u0301", k=20_000)),
}
RUNS = {name: mark * 12_000 for name, mark in (("a", "a"), ("line ends", "\n"), ("spaces", " "), ("equals", "="))}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SORTS, *RUNS])
@pytest.mark.parametrize("layout", TOKENIZERS)
def test_text_without_lines_and_words(layout: str, name: str, tokenizer_of: GetTokenizer) -> None:
    tokenizer = tokenizer_of(layout)
    text, longest = {**SORTS, **RUNS}[name], 3000
    read = 0

    def encode(part: str) -> list[int]:
        nonlocal read
        read += len(part)
        return tokenizer.encode(part)

    found = pieces(text, encode, longest)
    assert "".join(found) == text
    assert [index for piece in found for index in tokenizer.encode(piece)] == tokenizer.encode(text)
    assert name in RUNS or max(map(len, found)) <= longest
    assert read <= 56 * 8192 * (len(text) // longest + 1)  # no more places in each window, and characters for each


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(data=st.data(), layout=st.sampled_from(TOKENIZERS), longest=st.integers(300, 3000))
def test_pieces_of_long_mixtures(tokenizer_of: GetTokenizer, data: st.DataObject, layout: str, longest: int) -> None:
    tokenizer = tokenizer_of(layout)
    sorts = st.sampled_from([*SORTS.values(), *RUNS.values(), "word " * 900, "行。\n" * 900])
    parts = data.draw(st.lists(st.tuples(sorts, st.integers(0, 9000), st.integers(1, 4000)), min_size=1, max_size=6))
    text = "".join(sort[start : start + size] for sort, start, size in parts)
    found = pieces(text, tokenizer.encode, longest)
    assert "".join(found) == text
    assert [index for piece in found for index in tokenizer.encode(piece)] == tokenizer.encode(text)


def encoded(tokenizer: Tokenizer, rows: list[dict[str, object]], long: int) -> tuple[list[int], list[int]]:
    payload = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    chunk = RawChunk("x.jsonl", "lines", payload, len(rows), 1, 0, FileOffset(len(rows)))
    encoder = Encoder(tokenizer, token_dtype(tokenizer.vocab_size), {"text": {"text": get_source("text")}}, long=long)
    documents = encoder.encode(Task(((0, "text", chunk),), Position())).documents["train", "text"]
    return documents.ids.tolist(), documents.lengths.tolist()


@pytest.mark.slow
def test_the_encoder_puts_pieces_together(
    text_of_samples: str, kind: str, tokenizer_of: GetTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, tokenizer = (text_of_samples * 12)[:300_000], tokenizer_of(kind)
    texts = [text[:200_000], "short", text[200_000:], *make_texts(30)]
    dialogue = f"<|im_start|>user\n{text[:90_000]}<|im_end|>\n<|im_start|>assistant\n好<|im_end|>"
    rows: list[dict[str, object]] = [{"text": text} for text in texts]
    rows[2:2] = [{"text": dialogue, "dialogue": True}, {"text": dialogue[-40:], "dialogue": True}]
    ids, lengths = encoded(tokenizer, rows, long=1 << 30)
    longest: list[int] = []
    encode = tokenizer.encode_flat

    def watched(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        longest.append(sum(map(len, texts)))
        return encode(texts)

    monkeypatch.setattr(tokenizer, "encode_flat", watched)
    assert encoded(tokenizer, rows, long=70_000) == (ids, lengths)
    assert max(longest) <= 70_000 and len(longest) > 5
