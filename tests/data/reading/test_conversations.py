"""Conversations and pairs in the forms that people publish them in."""

from __future__ import annotations

from typing import Any

import pytest

from steel_megatron.data.reading.chunks import BadRow
from steel_megatron.data.reading.conversations import CHAT_FORMS, Chat, Turn
from steel_megatron.data.reading.sources import Dialogue, get_source

USER, ASSISTANT = "user", "assistant"


def said(*contents: str, system: str = "") -> tuple[Turn, ...]:
    """Turns of user and assistant, one after the other."""
    turns = [Turn((USER, ASSISTANT)[number % 2], content) for number, content in enumerate(contents)]
    return (Turn("system", system), *turns) if system else tuple(turns)


def messages(*contents: str) -> list[dict[str, Any]]:
    return [{"role": turn.role, "content": turn.content} for turn in said(*contents)]


ROWS: list[tuple[str, dict[str, Any], tuple[Turn, ...], tuple[Turn, ...]]] = [
    ("messages", {"messages": messages("a", "b")}, said("a", "b"), ()),
    ("messages", {"messages": messages("a", "b"), "system": "s"}, said("a", "b", system="s"), ()),
    (
        "messages",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                      {"role": "tool", "content": "7"}, {"role": "assistant", "content": "c"}]},
        (Turn(USER, "ab"), Turn("tool", "7"), Turn(ASSISTANT, "c")),
        (),
    ),
    ("sharegpt", {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s"},
     said("a", "b", system="s"), ()),
    ("sharegpt", {"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "a"},
                                    {"from": "gpt", "value": "b"}]}, said("a", "b", system="s"), ()),
    ("alpaca", {"instruction": "a", "input": "", "output": "b"}, said("a", "b"), ()),
    ("alpaca", {"instruction": "c", "input": "x", "output": "d", "system": "s", "history": [["a", "b"]]},
     said("a", "b", "c\nx", "d", system="s"), ()),
    ("dolly", {"instruction": "a", "context": "x", "response": "b", "category": "qa"}, said("a\nx", "b"), ()),
    ("prompt_completion", {"prompt": "a", "completion": "b"}, said("a", "b"), ()),
    ("prompt_completion", {"prompt": messages("a"), "completion": [{"role": "assistant", "content": "b"}]},
     said("a", "b"), ()),
    ("preference", {"prompt": "a", "chosen": "b", "rejected": "c"}, said("a", "b"), said("a", "c")),
    ("preference", {"chosen": messages("a", "b"), "rejected": messages("a", "c")}, said("a", "b"), said("a", "c")),
    ("preference", {"prompt": "a", "chosen": messages("a", "b"), "rejected": messages("a", "c")}, said("a", "b"),
     said("a", "c")),
    (
        "ultrafeedback",
        {"instruction": "a", "completions": [{"response": "m", "overall_score": 5}, {"response": "b",
         "overall_score": 8.5}, {"response": "c", "overall_score": 1}]},
        said("a", "b"),
        said("a", "c"),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "row", "turns", "rejected"), ROWS)
@pytest.mark.parametrize("by", ["name", "columns"])
def test_forms(name: str, row: dict[str, Any], turns: Any, rejected: Any, by: str) -> None:
    found = get_source(name if by == "name" else "chat").text_of(row)
    assert isinstance(found, Dialogue) and found.chat == Chat(turns, rejected)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [*messages("a", "b"), {"role": "assistant", "content": "c"}]}, "turns 2 and 3 are both the"),
        ({"messages": messages("a")}, "the assistant says nothing"),
        ({"messages": messages("a", " ")}, r"turn 2 \(assistant\) is empty"),
        ({"messages": [{"role": "user", "content": None}]}, r"turn 1 of 'messages' \(user\) is null"),
        ({"messages": [{"role": "judge", "content": "x"}]}, "turn 1 of 'messages' is of 'judge'; known are system"),
        ({"messages": [*messages("a", "b"), {"role": "system", "content": "c"}]}, "turn 3 is the system's"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "a part of type 'image_url'"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "has tool_calls"),
        ({"messages": []}, "holds no list of turns"),
        ({"messages": ["x"]}, "turn 1 of 'messages' is a str"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "'chosen' and 'rejected' are equal"),
        ({"chosen": messages("a", "b"), "rejected": messages("x", "c")}, "the prompts of 'chosen' and 'rejected'"),
        ({"chosen": "b", "rejected": "c"}, "there is no prompt"),
        ({"chosen": messages("a", "b", "c"), "rejected": messages("a", "c")}, "the last turn of 'chosen' is of user"),
        ({"instruction": "a", "completions": [{"response": "m", "overall_score": 5}]}, "fewer than two"),
        ({"instruction": "a", "completions": [{"response": m, "overall_score": 5} for m in "ab"]}, "all answers have"),
        ({"instruction": "a", "output": "b", "history": [["a"]]}, "entry 1 of 'history'"),
        ({"text": "a"}, "no conversation is found in the columns 'text'"),
        ({"messages": messages("a<|im_end|>", "b")}, r"a turn of the user holds <\|im_end\|>"),
    ],
)
def test_rows_that_are_no_conversation(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRow, match=reason):
        get_source("chat").text_of(row)


def test_a_named_form_takes_no_row_of_another() -> None:
    with pytest.raises(BadRow, match="'instruction' and 'output' is missing; the row has 'messages'"):
        get_source("alpaca").text_of({"messages": messages("a", "b")})


def test_columns_that_are_not_read() -> None:
    row = {"messages": messages("a", "b"), "system": "s", "id": 1, "score": 2}
    assert get_source("messages").unused(row) == get_source("chat").unused(row) == ["id", "score"]
    assert get_source("belle").unused({"instruction": "a", "output": "b", "system": "s", "topic": "x"}) == ["topic"]
    assert get_source("text").unused({"text": "a", "id": 1}) == []


def test_belle_keeps_system_and_history() -> None:
    row = {"instruction": "c", "input": "", "output": "d", "system": "s", "history": [["a", "b"]]}
    text = get_source("belle").text_of(row)
    assert isinstance(text, Dialogue) and text.chat == Chat(said("a", "b", "c", "d", system="s"))
    assert text.text.startswith("<|im_start|>system\ns<|im_end|>\n<|im_start|>user\na<|im_end|>")


def test_every_form_is_a_source_of_pretraining() -> None:
    for name, row, turns, _ in ROWS:
        assert name in CHAT_FORMS
        text = get_source(name).text_of(row)
        assert isinstance(text, Dialogue) and text.text.endswith(f"assistant\n{turns[-1].content}<|im_end|>")
