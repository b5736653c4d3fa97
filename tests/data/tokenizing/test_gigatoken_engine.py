"""gigatoken's limits: which texts it does not get, and how much it may remember."""

from __future__ import annotations

import json
import random
import sys
import unicodedata
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import tokenizers

from steel_megatron.data.reading.text_batch import as_strings
from steel_megatron.data.tokenizing import gigatoken_engine as fast_encoding
from steel_megatron.data.tokenizing.gigatoken_engine import (
    EngineMissing,
    EngineProblem,
    Gigatoken,
    unsure,
    unsure_by_numpy,
)
from steel_megatron.errors import DataError

QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SURE = [
    chr(point)
    for point in range(0x110000)
    if not 0xD800 <= point <= 0xDFFF and not fast_encoding._unsure_characters()[point]
]


def _telltale() -> tokenizers.Tokenizer:
    """Qwen's rules with a vocabulary that shows where words are cut: any byte merges with a, 1, a space and !."""
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(QWEN_WORDS), "isolated")
    as_bytes = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    anchors = [as_bytes.pre_tokenize_str(anchor)[0][0] for anchor in "a1 !"]
    high = [letter for letter in letters if letter not in anchors and not "!" <= letter <= "~"]
    merges = [pair for letter in high for anchor in anchors for pair in ((anchor, letter), (letter, anchor))]
    names = [*letters, *("".join(pair) for pair in merges)]
    built = tokenizers.Tokenizer(tokenizers.models.BPE({name: index for index, name in enumerate(names)}, merges))
    built.normalizer = tokenizers.normalizers.NFC()
    built.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, as_bytes])
    return built


@pytest.fixture(scope="module")
def telltale() -> tuple[tokenizers.Tokenizer, Gigatoken]:
    built = _telltale()
    return built, Gigatoken(built.to_str())


def _differing(both: tuple[tokenizers.Tokenizer, Gigatoken], texts: list[str]) -> list[str]:
    slow, fast = both
    ids, lengths = fast.encode_flat(texts)
    parts = np.split(ids, np.cumsum(lengths)[:-1])
    expected = slow.encode_batch_fast(texts, add_special_tokens=False)
    return [text for text, part, ours in zip(texts, parts, expected, strict=True) if part.tolist() != ours.ids]


def test_familiar_characters_are_letters_to_both(telltale: tuple[tokenizers.Tokenizer, Gigatoken]) -> None:
    draw = random.Random(0)
    letters = [one for one in SURE if unicodedata.category(one)[0] in "LNM" and not "\u3400" <= one <= "\U0001ffff"]
    edges = [chr(edge) for edges in fast_encoding._FAMILIAR_ASTRAL for edge in edges]
    texts = [f"a{one}!{one}a 1{one} {one}b" for one in [*letters[::3], *edges, *draw.sample(SURE, 8_000)]]
    assert not _differing(telltale, texts)


def test_familiar_marks_are_put_in_the_same_order(telltale: tuple[tokenizers.Tokenizer, Gigatoken]) -> None:
    draw = random.Random(0)
    marks = [character for character in SURE if unicodedata.category(character)[0] == "M"]
    assert len(marks) > 500 and "\u0301" in marks and "\u0e49" in marks
    texts = ["".join(draw.choice((draw.choice(marks), draw.choice(SURE))) for _ in range(60)) for _ in range(3000)]
    assert not _differing(telltale, texts)


def test_settled_characters_are_the_same_to_both(telltale: tuple[tokenizers.Tokenizer, Gigatoken]) -> None:
    settled = [chr(point) for low, high in fast_encoding._SETTLED for point in range(low, high + 1)]
    old = unicodedata.ucd_3_2_0
    added = [one for one in settled if old.category(one) == "Cn" and unicodedata.category(one)[0] in "LMN"]
    assert len(added) > 3000
    others = "\u0334\u0345\u05b0\u0323\u0301\u3099\u094d"  # of seven places in the order of marks
    texts = [f"a{one}!{one}a 1{one} {one}b" for one in settled]
    texts += [
        f"a{one}{other}b{other}{one}" for one in settled if unicodedata.category(one)[0] == "M" for other in others
    ]
    assert unsure(texts) == [] and not _differing(telltale, texts)


def test_the_others_do_differ(telltale: tuple[tokenizers.Tokenizer, Gigatoken]) -> None:
    """What is left to the own library is left to it for a reason."""
    newer = ["a\u1ac3\u1bf2", "a\u0c3c\u20d3", "a\U0001e130\u032f"]
    assert set(_differing(telltale, newer)) == set(newer)
    assert unsure(newer) == [0, 1, 2]


def test_what_is_common_is_not_left_out() -> None:
    common = [
        "长江，注入东海。㐀鿿𠮷", "naïve e\u0301", "ру́сский", "עברית שָׁלוֹם", "عَرَبِيّ", "हिन्दी", "ไทย สวัสดี",
        "한국어", "ひらがな",
        "Tiếng Việt", "😀👍🏽🇨🇳\ufe0f\u200d", "𝐇𝐞𝐥𝐥𝐨", "မြန်မာ ᥫᩣ ᴗ ₙ",
        "₽ € ⭐ ▁ \u3000 \ue000", "\x00\x7f\x85", "",
    ]  # fmt: skip
    assert unsure(common) == []


@pytest.mark.parametrize("size", [1, 2, 3, 1 << 20])
def test_unsure_texts_are_told_apart(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(fast_encoding, "_SLICE", size)
    texts = ["a", "\u1ac3", "长", "", "é\u1ac3", "\u0c3c\u0c3c长", "", "b", "长\u1ac3é"]
    for look in (unsure, unsure_by_numpy):
        assert look(texts) == [1, 4, 5, 8]
        assert look(texts[2:4]) == look([]) == []
        with pytest.raises(DataError, match=r"lone surrogate \(U\+DFFF at character 1 of 2\)"):
            look([*texts, "长\udfff"])


def test_texts_of_bytes() -> None:
    assert as_strings([b"a", "b", "长".encode(), b""]) == ["a", "b", "长", ""]
    with pytest.raises(DataError, match="text 1 of 2 to encode is not valid UTF-8"):
        as_strings(["a", "长".encode()[:-1]])


def test_memory_is_bounded_and_ids_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    built = _telltale()
    bounded, made = Gigatoken(built.to_str(), cache_bytes=8_000_000), []
    monkeypatch.setattr(bounded, "_renew", lambda renew=bounded._renew: (made.append(1), renew()))
    draw = np.random.default_rng(0)
    process = psutil.Process()
    start = process.memory_info().rss
    for _ in range(60):
        points = draw.integers(0x4E00, 0x9FA5, (50, 6_000), dtype=np.uint32)
        points[draw.random(points.shape) < 0.2] = ord("。")
        texts = [row.tobytes().decode("utf-32-le") for row in points]
        ids, lengths = bounded.encode_flat(texts)
        assert len(lengths) == len(texts)
    assert len(made) >= 3
    assert process.memory_info().rss - start < 200_000_000  # without the bound it is 400
    assert ids[-lengths[-1] :].tolist() == built.encode(texts[-1]).ids


def test_memory_of_threads_is_bounded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each sees the growth of all, so all drop what they remember; what the others have is not the process's own."""
    sizes = [1000]
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=sizes[-1]))
    monkeypatch.setattr(psutil, "Process", lambda: process)
    built = _telltale()
    first = Gigatoken(built.to_str(), cache_bytes=100)
    twins = []
    for size in (1040, 1080):  # what making one takes is not remembered
        with monkeypatch.context() as patched:
            patched.setattr(
                Gigatoken, "_renew", lambda self, size=size: (sizes.append(size), setattr(self, "_renewals", 0))
            )
            twins.append(first.for_thread())
    for twin in twins:
        twin._renew()
    made = []
    for name, twin in zip("ab", twins, strict=True):
        monkeypatch.setattr(twin, "_renew", lambda name=name, renew=twin._renew: (made.append(name), renew()))

    def encode(twin: Gigatoken, size: int) -> None:
        sizes.append(size)
        ids, _ = twin.encode_flat(["长江 a1!"])
        assert ids.tolist() == built.encode("长江 a1!").ids

    encode(twins[0], 1280)
    encode(twins[1], 1280)
    assert made == [], "100 for each of two"
    encode(twins[0], 1281)
    encode(twins[0], 1270)
    assert made == ["a"] and twins[0]._memory.renewals == 1
    encode(twins[1], 1082)
    assert made == ["a", "b"], "the other one too, at its next text"
    encode(twins[0], 1282)
    assert made == ["a", "b"]
    encode(twins[0], 1283)
    encode(twins[1], 1283)
    assert made == ["a", "b", "a", "b"], "and the limit is what it was"


def test_problems_have_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    unigram = tokenizers.Tokenizer(tokenizers.models.Unigram([("a", -1.0)], 0, False))
    with pytest.raises(EngineProblem, match='cannot run this tokenizer: Unsupported model type "Unigram"'):
        Gigatoken(unigram.to_str())
    content = json.loads(_telltale().to_str())
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": "[aeiou]+"}
    with pytest.raises(EngineProblem, match="cannot run this tokenizer: Unknown pre_tokenizer"):
        Gigatoken(json.dumps(content))
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    with pytest.raises(EngineMissing):
        Gigatoken(_telltale().to_str())
