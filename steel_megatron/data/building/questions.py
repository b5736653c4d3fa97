"""Multiple-choice questions of several forms -> conversations that answer with a letter, or explain it first."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from steel_megatron.data.building.language import Language, language_of
from steel_megatron.data.reading.chunks import BadRow, NoDocument
from steel_megatron.data.reading.conversations import Chat, Turn
from steel_megatron.data.reading.keys import Row, string

LETTERS = "ABCDEFGH"
NOT_CHOSEN = "no multiple-choice question"
"""Why a question of another kind is left out."""
_TEXT = ("q_main", "question", "Question")
_ANSWER = ("std_ans", "answer", "answerKey", "Answer")
_EXPLANATION = ("answer_detail", "explanation", "rationale", "solution")
_LISTS = ("choices", "options")
_GIVEN = re.compile(rf"\(?([{LETTERS}](?:[\s,，、;；]*[{LETTERS}])*)\)?[.。]?")
_WORDS = {
    "zh": ("请直接给出正确选项的字母。", "请先写出分析过程，最后给出正确选项的字母。", "答案："),
    "en": (
        "Reply with the letter of the correct option.",
        "Explain your reasoning first, then give the letter of the correct option.",
        "Answer: ",
    ),
}
"""What is asked for, without and with an explanation, and what stands before the letter behind one."""


@dataclass(frozen=True)
class Question:
    """A multiple-choice question."""

    text: str
    options: tuple[str, ...]
    """In the order of their letters."""
    answer: str
    """The letters of the right options, such as ``B`` or ``ABD``."""
    explanation: str
    """Empty where there is none."""
    language: Language
    """In which a letter or an explanation is asked for."""

    def chat(self, explained: bool) -> Chat:
        """The question and its answer as a conversation.

        Args:
            explained: whether the explanation comes before the letter (chain of thought).
        """
        lines = [self.text, *(f"{letter}. {option}" for letter, option in zip(LETTERS, self.options, strict=False))]
        asked, asked_why, before = _WORDS["zh" if self.language == "zh" else "en"]
        answer = f"{self.explanation}\n{before}{self.answer}" if explained else self.answer
        return Chat((Turn("user", "\n".join([*lines, asked_why if explained else asked])), Turn("assistant", answer)))


def question_of(row: Row) -> Question:
    """The question of a row: Wanjuan's exams (``q_main``, ``option_a``, ..., ``std_ans``, ``answer_detail``), columns
    ``A`` to ``H`` as in C-Eval and CMMLU, or a list ``choices`` or ``options`` as in MMLU, ARC and RACE.

    Args:
        row: the row.

    Raises:
        NoDocument: the question has no options, so it is of another kind.
        BadRow: an option is empty, or the answer names none.
    """
    text = _first(row, _TEXT)
    if not text:
        raise BadRow(f"no question is found in the columns {', '.join(map(repr, list(row)[:8])) or '(none)'}")
    options, names = _options(row)
    if len(options) < 2:
        raise NoDocument(NOT_CHOSEN)
    if len(options) > len(LETTERS):
        raise BadRow(f"there are {len(options)} options; at most {len(LETTERS)} are read")
    if not all(options):
        raise BadRow(f"option {LETTERS[options.index('')]} is empty")
    # Wanjuan's exams are Chinese also where a question is a formula.
    language = "zh" if "q_main" in row else language_of([Turn("user", "\n".join([text, *options]))])
    return Question(text, tuple(options), _answer(row, names), _first(row, _EXPLANATION), language)


def _first(row: Row, keys: tuple[str, ...]) -> str:
    """The first string under one of the keys; empty if there is none."""
    return next((string(row, key).strip() for key in keys if isinstance(row.get(key), str)), "")


def _options(row: Row) -> tuple[list[str], list[str]]:
    """The options, and what the row calls them."""
    listed = next((row[key] for key in _LISTS if key in row), None)
    if isinstance(listed, Mapping):  # ARC: {"text": [...], "label": [...]}
        texts, labels = listed.get("text"), listed.get("label")
        if not isinstance(texts, list) or not isinstance(labels, list) or len(texts) != len(labels):
            raise BadRow("the options hold no lists 'text' and 'label' of the same length")
        return [str(text).strip() for text in texts], [str(label).strip() for label in labels]
    if isinstance(listed, list):
        if not all(isinstance(text, str) for text in listed):
            raise BadRow("the list of options holds something other than texts")
        return [text.strip() for text in listed], list(LETTERS[: len(listed)])
    for keys in ([f"option_{letter.lower()}" for letter in LETTERS], list(LETTERS)):
        texts = [str(row.get(key) if row.get(key) is not None else "").strip() for key in keys]
        while texts and not texts[-1]:
            texts.pop()
        if texts:
            return texts, list(LETTERS[: len(texts)])
    return [], []


def _answer(row: Row, names: list[str]) -> str:
    """The letters of the right options, in order.

    Args:
        row: the row.
        names: what it calls the options, in order.
    """
    given = next((row[key] for key in _ANSWER if row.get(key) not in (None, "")), None)
    known = ", ".join(names)
    if isinstance(given, int) and not isinstance(given, bool):  # MMLU counts from 0
        if not 0 <= given < len(names):
            raise BadRow(f"the answer is number {given} of {len(names)} options, counted from 0")
        return LETTERS[given]
    if isinstance(given, str) and given.strip() in names:
        return LETTERS[names.index(given.strip())]
    found = _GIVEN.fullmatch(given.strip().upper()) if isinstance(given, str) else None
    letters = sorted({letter for letter in found[1] if letter in LETTERS}) if found else []
    if not letters or not set(letters) <= set(LETTERS[: len(names)]):
        raise BadRow(f"the answer {given!r} names none of the options {known}")
    return "".join(letters)
