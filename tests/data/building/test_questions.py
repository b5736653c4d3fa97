"""Questions of published forms become the conversations they should; languages are told by their letters."""

from __future__ import annotations

from typing import Any

import pytest

from steel_megatron.data.building.language import Language, language_of
from steel_megatron.data.building.questions import question_of
from steel_megatron.data.reading.chunks import BadRow, NoDocument
from steel_megatron.data.reading.conversations import Turn

WANJUAN: dict[str, Any] = {
    "q_main": "地球绕太阳转一圈要多久？",
    "option_a": "一天",
    "option_b": "一个月",
    "option_c": "一年",
    "option_d": "",
    "std_ans": "C",
    "answer_detail": "公转的周期是一年。",
}
MMLU: dict[str, Any] = {"question": "What is 1 + 1?", "choices": ["one", "two", "three"], "answer": 1}


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        (WANJUAN, "C"),
        ({**WANJUAN, "std_ans": "a、C"}, "AC"),
        ({**WANJUAN, "std_ans": "(CB)"}, "BC"),
        (MMLU, "B"),
        ({**MMLU, "answer": "C"}, "C"),
        ({"question": "1 + 1?", "A": "1", "B": 2, "C": "3", "D": "4", "answer": "B"}, "B"),
        ({"question": "?", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"}, "B"),
        ({"question": "?", "options": ["x", "y"], "answer": "A."}, "A"),
    ],
)
def test_forms(row: dict[str, Any], answer: str) -> None:
    assert question_of(row).answer == answer


def test_conversations() -> None:
    chinese, english = question_of(WANJUAN), question_of({**MMLU, "explanation": "Count."})
    options = "地球绕太阳转一圈要多久？\nA. 一天\nB. 一个月\nC. 一年\n"
    assert [turn.content for turn in chinese.chat(explained=False).turns] == [
        f"{options}请直接给出正确选项的字母。",
        "C",
    ]
    assert [turn.content for turn in chinese.chat(explained=True).turns] == [
        f"{options}请先写出分析过程，最后给出正确选项的字母。",
        "公转的周期是一年。\n答案：C",
    ]
    formula = question_of({**WANJUAN, "q_main": "2x = 4, x = ?", "option_a": "1", "option_b": "2", "option_c": "3"})
    assert formula.chat(explained=False).turns[0].content.endswith("3\n请直接给出正确选项的字母。")
    asked, said = english.chat(explained=True).turns
    assert asked.content.endswith("C. three\nExplain your reasoning first, then give the letter of the correct option.")
    assert (asked.role, said) == ("user", Turn("assistant", "Count.\nAnswer: B"))


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"std_ans": "D"}, "the answer 'D' names none of the options A, B, C"),
        ({"std_ans": "太阳"}, "the answer '太阳' names none"),
        ({"std_ans": ""}, "the answer None names none"),
        ({"std_ans": True}, "the answer True names none"),
        ({"std_ans": 3}, "number 3 of 3 options, counted from 0"),
        ({"option_b": None}, "option B is empty"),
        ({"q_main": None}, "no question is found in the columns 'q_main'"),
    ],
)
def test_bad_questions(changed: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRow, match=reason) as raised:
        question_of({**WANJUAN, **changed})
    assert not isinstance(raised.value, NoDocument)


def test_questions_of_another_kind() -> None:
    with pytest.raises(NoDocument):
        question_of({"q_main": "填空：一年有___个月。", "std_ans": "12"})


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("天空为什么是蓝色的？", "zh"),
        ("请用 Python 写一个函数：\n```python\ndef f(values):\n    return sorted(values)\n```", "zh"),
        ("What does 你好 mean? It is a greeting that people use every day.", "en"),
        ("Why is the sky blue?", "en"),
        ("空はなぜ青いのですか。", "other"),
        ("Почему небо голубое?", "other"),
        ("1 + 1 = 2", "other"),
    ],
)
def test_languages(text: str, language: Language) -> None:
    assert language_of([Turn("system", "Это система"), Turn("user", text)]) == language
