"""Conversations and preference pairs in the forms that people publish them in -> turns.

A form is told by the columns of a row (:func:`form_of_row`) or named as a source. What cannot be a conversation is a
bad row whose reason names the turn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from steel_megatron.data.reading.chunks import BadRow
from steel_megatron.data.reading.keys import Row, string

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "tool": "tool",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
}
"""What the roles are called, and what they are here."""


@dataclass(frozen=True)
class Turn:
    """What somebody said."""

    role: str
    """``system``, ``user``, ``assistant`` or ``tool``."""
    content: str


@dataclass(frozen=True)
class Chat:
    """A conversation, or two that begin alike and end in the better and the worse answer."""

    turns: tuple[Turn, ...]
    """Of the conversation; of a pair, with the chosen answer."""
    rejected: tuple[Turn, ...] = ()
    """Of a pair, with the rejected answer; empty where there is no pair."""


@dataclass(frozen=True)
class Form:
    """One form of rows."""

    read: Callable[[Row], Chat]
    """The conversation of a row."""
    needed: tuple[tuple[str, ...], ...]
    """Columns by which it is told: all of one of these."""
    columns: tuple[str, ...]
    """All columns that are read."""
    about: str
    """What its rows are, for people."""


def form_of_row(row: Row) -> str:
    """The name of the form of a row, by its columns.

    Raises:
        BadRow: it is of no known form.
    """
    for name, form in CHAT_FORMS.items():
        if any(all(column in row for column in columns) for columns in form.needed):
            return name
    raise BadRow(f"no conversation is found in the columns {', '.join(map(repr, list(row)[:8])) or '(none)'}")


def checked(turns: Sequence[Turn]) -> tuple[Turn, ...]:
    """Turns that can be trained on.

    Raises:
        BadRow: one says nothing, the system speaks later than first, the assistant twice in a row, or never.
    """
    for number, turn in enumerate(turns, start=1):
        if not turn.content.strip():
            raise BadRow(f"turn {number} ({turn.role}) is empty")
        if turn.role == "system" and number > 1:
            raise BadRow(f"turn {number} is the system's, which may only speak first")
        if number > 1 and turn.role == turns[number - 2].role == "assistant":
            raise BadRow(f"turns {number - 1} and {number} are both the assistant's")
    if not any(turn.role == "assistant" for turn in turns):
        raise BadRow("the assistant says nothing in it")
    return tuple(turns)


def _content(value: object, what: str) -> str:
    """The text of a message: a string, or the texts of its parts."""
    if isinstance(value, str):
        return value
    if value is None:
        raise BadRow(f"{what} is null")
    if not isinstance(value, list):
        raise BadRow(f"{what} holds a {type(value).__name__} where a text or a list of parts was expected")
    texts = []
    for part in value:
        text = part.get("text") if isinstance(part, Mapping) else part
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
        if kind != "text" or not isinstance(text, str):
            raise BadRow(f"{what} has a part of type {kind!r}; only text is read")
        texts.append(text)
    return "".join(texts)


def turns_of(value: object, key: str) -> list[Turn]:
    """The turns of a list of messages, ``{"role", "content"}`` or ``{"from", "value"}``.

    Args:
        value: what the row holds.
        key: under which key, for messages.

    Raises:
        BadRow: it is no such list.
    """
    if not isinstance(value, list) or not value:
        raise BadRow(f"key {key!r} holds no list of turns")
    turns = []
    for number, message in enumerate(value, start=1):
        if not isinstance(message, Mapping):
            raise BadRow(f"turn {number} of {key!r} is a {type(message).__name__}, not an object")
        names = ("role", "content") if "role" in message else ("from", "value")
        if message.get("tool_calls"):
            raise BadRow(f"turn {number} of {key!r} has tool_calls, which are not read; write the call as its content")
        role = message.get(names[0])
        if not isinstance(role, str) or role.lower() not in ROLES:
            raise BadRow(f"turn {number} of {key!r} is of {role!r}; known are {', '.join(ROLES)}")
        content = _content(message.get(names[1]), f"turn {number} of {key!r} ({role})")
        turns.append(Turn(ROLES[role.lower()], content))
    return turns


def _with_system(row: Row, turns: list[Turn]) -> list[Turn]:
    """Turns behind the system's, if the row has that in a column of its own."""
    for key in ("system", "system_prompt"):
        said = row.get(key)
        if isinstance(said, str) and said.strip():
            return [Turn("system", said), *(turn for turn in turns if turn.role != "system")]
    return turns


def _asked(row: Row, question: str, more: str) -> str:
    """A question and what belongs to it, a paragraph each."""
    extra = string(row, more) if row.get(more) is not None else ""
    return f"{string(row, question)}\n{extra}" if extra.strip() else string(row, question)


def _messages(row: Row) -> Chat:
    return Chat(checked(_with_system(row, turns_of(row["messages"], "messages"))))


def _sharegpt(row: Row) -> Chat:
    key = "conversations" if "conversations" in row else "conversation"
    return Chat(checked(_with_system(row, turns_of(row.get(key), key))))


def history_of(row: Row) -> list[Turn]:
    """Earlier turns in a column ``history``: a list of pairs of question and answer.

    Raises:
        BadRow: it is no such list.
    """
    turns = []
    for number, pair in enumerate(row.get("history") or [], start=1):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(said, str) for said in pair):
            raise BadRow(f"entry {number} of 'history' is no pair of question and answer")
        turns += [Turn("user", pair[0]), Turn("assistant", pair[1])]
    return turns


def _alpaca(row: Row) -> Chat:
    last = [Turn("user", _asked(row, "instruction", "input")), Turn("assistant", string(row, "output"))]
    return Chat(checked(_with_system(row, history_of(row) + last)))


def _dolly(row: Row) -> Chat:
    asked = Turn("user", _asked(row, "instruction", "context"))
    return Chat(checked(_with_system(row, [asked, Turn("assistant", string(row, "response"))])))


def _prompt(row: Row) -> list[Turn]:
    """A prompt: a text, or messages."""
    prompt = row.get("prompt")
    return turns_of(prompt, "prompt") if isinstance(prompt, list) else [Turn("user", string(row, "prompt"))]


def _completed(row: Row) -> Chat:
    key = "completion" if "completion" in row else "response"
    return Chat(checked(_with_system(row, _prompt(row) + _answer(row, key))))


def _answer(row: Row, key: str) -> list[Turn]:
    """An answer: a text, or messages."""
    value = row.get(key)
    return turns_of(value, key) if isinstance(value, list) else [Turn("assistant", string(row, key))]


def _preference(row: Row) -> Chat:
    chosen, rejected = _answer(row, "chosen"), _answer(row, "rejected")
    prompt = row.get("prompt")
    if prompt is not None and (isinstance(prompt, list) or len(chosen) == 1):
        chosen, rejected = _prompt(row) + chosen, _prompt(row) + rejected
    return pair_of(_with_system(row, chosen), _with_system(row, rejected))


def pair_of(chosen: list[Turn], rejected: list[Turn]) -> Chat:
    """A pair of whole conversations that differ in the last turn.

    Raises:
        BadRow: they are equal, do not end in an answer, or differ before it.
    """
    whole = Chat(checked(chosen), checked(rejected))
    for name, turns in (("chosen", chosen), ("rejected", rejected)):
        if turns[-1].role != "assistant":
            raise BadRow(f"the last turn of {name!r} is of {turns[-1].role}, not the assistant's")
    if chosen[:-1] != rejected[:-1]:
        raise BadRow("the prompts of 'chosen' and 'rejected' differ")
    if len(chosen) < 2:
        raise BadRow("there is no prompt: neither a column 'prompt' nor turns before the answer")
    if chosen == rejected:
        raise BadRow("'chosen' and 'rejected' are equal")
    return whole


def _ultrafeedback(row: Row) -> Chat:
    """The answer with the highest score, and the one with the lowest."""
    scored = []
    for number, entry in enumerate(row["completions"] if isinstance(row["completions"], list) else [], start=1):
        score = entry.get("overall_score", entry.get("fine-grained_score")) if isinstance(entry, Mapping) else None
        if not isinstance(score, int | float) or not isinstance(entry.get("response"), str):
            raise BadRow(f"entry {number} of 'completions' has no response with an overall_score")
        scored.append((float(score), entry["response"]))
    if len(scored) < 2:
        raise BadRow("'completions' holds fewer than two answers")
    best, worst = max(scored, key=lambda one: one[0]), min(scored, key=lambda one: one[0])
    if best[0] == worst[0]:
        raise BadRow(f"all answers have the score {best[0]:g}")
    asked = [Turn("user", string(row, "instruction"))]
    chosen, rejected = ([*asked, Turn("assistant", said)] for _, said in (best, worst))
    return pair_of(_with_system(row, chosen), _with_system(row, rejected))


_SYSTEM = ("system", "system_prompt")
CHAT_FORMS = {
    "preference": Form(
        _preference,
        (("chosen", "rejected"),),
        ("prompt", "chosen", "rejected", *_SYSTEM),
        'Pairs, {"prompt", "chosen", "rejected"}: texts, or messages that may hold the prompt.',
    ),
    "ultrafeedback": Form(
        _ultrafeedback,
        (("instruction", "completions"),),
        ("instruction", "completions", *_SYSTEM),
        'Pairs of the best and the worst answer, {"instruction", "completions": [{"response", "overall_score"}]}.',
    ),
    "messages": Form(
        _messages, (("messages",),), ("messages", *_SYSTEM), 'Conversations, {"messages": [{"role", "content"}]}.'
    ),
    "sharegpt": Form(
        _sharegpt,
        (("conversations",),),
        ("conversations", "conversation", *_SYSTEM),
        'Conversations, {"conversations": [{"from", "value"}], "system"}.',
    ),
    "alpaca": Form(
        _alpaca,
        (("instruction", "output"),),
        ("instruction", "input", "output", "history", *_SYSTEM),
        'Instructions, {"instruction", "input", "output", "system", "history": [[question, answer]]}.',
    ),
    "dolly": Form(
        _dolly,
        (("instruction", "response"),),
        ("instruction", "context", "response", *_SYSTEM),
        'Instructions, {"instruction", "context", "response"}.',
    ),
    "prompt_completion": Form(
        _completed,
        (("prompt", "completion"), ("prompt", "response")),
        ("prompt", "completion", "response", *_SYSTEM),
        'Answers, {"prompt", "completion"} or {"prompt", "response"}: texts, or messages.',
    ),
}
"""The forms by name, in the order in which they are looked for."""
