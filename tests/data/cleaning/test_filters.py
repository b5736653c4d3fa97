"""Operators that measure texts: numbers one can check by hand, and both sides of each bound."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steel_megatron.data.cleaning import steps
from steel_megatron.data.cleaning.filters import (
    Alphanumeric,
    AverageLineLength,
    CharacterRepetition,
    Filter,
    MaximumLineLength,
    MeasuredText,
    Resources,
    SpecialCharacters,
    TextLength,
    WordRepetition,
    WordsNum,
)
from steel_megatron.data.cleaning.mappers import CleanEmail
from steel_megatron.data.cleaning.steps import Rejection, operate
from steel_megatron.data.cleaning.texts import DocumentText, Lost
from steel_megatron.data.reading.sources import Dialogue
from steel_megatron.errors import ConfigError
from tests.data.conftest import Qwen

NONE = Resources()


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        (Alphanumeric(), "ab12, 中文。 ", 6 / 10),
        (AverageLineLength(), "abc\n\nde", 7 / 3),
        (MaximumLineLength(), "abc\n\u3000中文字符\n", 5),
        (SpecialCharacters(), "ab 1,中一上士😀é", 4 / 11),
        (TextLength(), "中文ab", 4),
        (WordsNum(tokenization="space"), "one, two ... 3 four-five", 3),
        # Trigrams abc bca cab abc bca: 5, three kinds; isqrt(3) = 1 of the two repeated ones counts, with 2.
        (CharacterRepetition(rep_len=3), "abcabca", 2 / 5),
        (CharacterRepetition(rep_len=3), "abcdefg", 0.0),
        # Bigrams ab bc ca ab bc: of 5, four are of the kinds that occur twice.
        (WordRepetition(tokenization="space", rep_len=2), "A b! c a (b) c", 4 / 5),
    ],
)  # fmt: skip
def test_numbers(kind: Filter, text: str, expected: float) -> None:
    assert kind.measure(MeasuredText(text, NONE)) == pytest.approx(expected)


@pytest.mark.parametrize("kind", [Alphanumeric(), AverageLineLength(), MaximumLineLength(), SpecialCharacters(),
                                  TextLength(), CharacterRepetition(), WordRepetition(tokenization="space"),
                                  WordsNum(tokenization="space")])  # fmt: skip
def test_an_empty_text_measures_nothing(kind: Filter) -> None:
    assert kind.measure(MeasuredText("", NONE)) == 0


def test_bounds_are_kept_and_named() -> None:
    kind = TextLength(min_len=3, max_len=5)
    assert [bool(operate(DocumentText("x" * length), kind, NONE)) for length in range(2, 7)] == [
        True,
        False,
        False,
        False,
        True,
    ]
    assert operate(DocumentText("xx"), kind, NONE) == Rejection(2, "characters: 2, below 3")
    assert operate(DocumentText("x" * 6), kind, NONE) == Rejection(6, "characters: 6, above 5")


def test_words_by_jieba() -> None:
    assert MeasuredText("我来到北京清华大学。 ABC", NONE).words("jieba") == ["我", "来到", "北京", "清华大学", "abc"]
    assert WordsNum().measure(MeasuredText("我来到北京清华大学。。", NONE)) == 4


def test_words_by_tokens(hf_folder: Path) -> None:
    resources = Resources(str(hf_folder))
    text = "Water boils at 100 degrees; at 4 degrees it is heaviest."
    ids = resources.tokenizer.encode(text)
    kept = resources.word_tokens(text)
    assert 5 < len(kept) < len(ids)
    decoded = [resources.tokenizer.decode([token]) for token in ids if token not in kept]
    assert decoded and not any(letter.isalpha() for piece in decoded for letter in piece)
    letters = sum(map(str.isalpha, text))
    assert Alphanumeric(tokenization=True).measure(MeasuredText(text, resources)) == letters / len(ids)


@pytest.mark.slow
def test_parts_of_a_character_are_words(qwen: Qwen) -> None:
    """Rare characters are several tokens each, which are no text by themselves."""
    resources = Resources(str(qwen.folder))
    parts = resources.tokenizer.encode("龘靐")
    assert len(parts) >= 4 and not any(resources.tokenizer.decode([part]).isalnum() for part in parts)
    assert resources.word_tokens("龘靐。") == parts


def test_a_mapper_cannot_make_a_text_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "LONGEST", 20)
    assert operate(DocumentText("a@b.cn " * 2), CleanEmail(repl="某人的地址"), NONE) is True
    assert operate(DocumentText("a@b.cn " * 4), CleanEmail(repl="某人的地址"), NONE) == Rejection(
        24, "more than 20 characters"
    )


@pytest.mark.parametrize("build", [lambda: Alphanumeric(min_ratio=0.9, max_ratio=0.2),
                                   lambda: TextLength(min_len=9, max_len=8),
                                   lambda: WordRepetition(rep_len=0)])  # fmt: skip
def test_impossible_settings_are_refused(build: object) -> None:
    with pytest.raises(ConfigError):
        build()  # type: ignore[operator]


DIALOGUE = Dialogue.of([("问题<b>一</b>", "答案"), ("再问", "再答\n两行")]).text


def test_a_dialogue_keeps_its_marks() -> None:
    text = DocumentText(DIALOGUE, dialogue=True)
    assert text.sample(NONE).text == "问题<b>一</b>\n答案\n再问\n再答\n两行"
    assert text.apply(lambda said: said.replace("<b>", "").replace("</b>", "").replace("|", "").replace("system", ""))
    assert str(text) == DIALOGUE.replace("<b>", "").replace("</b>", "")
    assert text.sample(NONE).text == "问题一\n答案\n再问\n再答\n两行"
    assert not text.apply(lambda said: said)


def test_a_mapper_cannot_fake_a_turn() -> None:
    import html

    faked = DIALOGUE.replace("答案", "&lt;|im_end|&gt;\n&lt;|im_start|&gt;user\n")
    with pytest.raises(Lost, match="a mark of the dialogue template"):
        DocumentText(faked, dialogue=True).apply(html.unescape)
    plain = DocumentText("&lt;|im_end|&gt;")  # in a plain text the mark is text
    assert plain.apply(html.unescape) and str(plain) == "<|im_end|>"


def test_nothing_left() -> None:
    with pytest.raises(Lost, match="nothing is left of a turn"):
        DocumentText(DIALOGUE, dialogue=True).apply(lambda said: "" if said == "再问" else said)
    with pytest.raises(Lost, match="nothing is left"):
        DocumentText("x").apply(lambda _: " \n")


@pytest.mark.parametrize("broken", ["plain", DIALOGUE[:-3], DIALOGUE[20:], DIALOGUE + "more", "x" + DIALOGUE,
                                    DIALOGUE.replace("<|im_end|>", "", 1),
                                    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>"])  # fmt: skip
def test_what_is_no_dialogue_is_lost(broken: str) -> None:
    with pytest.raises(Lost):
        DocumentText(broken, dialogue=True)


@given(st.lists(st.tuples(st.text(min_size=1), st.text(min_size=1)), min_size=1, max_size=4))
def test_every_dialogue_comes_back(turns: list[tuple[str, str]]) -> None:
    try:
        rendered = Dialogue.of(turns).text
    except Exception as error:
        assert type(error).__name__ == "BadRow"  # a blank turn, or one with a mark
        return
    if not rendered:  # an answer is missing
        return
    text = DocumentText(rendered, dialogue=True)
    assert str(text) == rendered
    assert text.sample(NONE).text == "\n".join(said for turn in turns for said in turn)
