"""What the rows of each corpus mean: one small class per source, found by its name.

The sources are those of the Steel-LLM paper (section 5, table 5), in the formats they are published in, and ``text``
for everything else. A source of your own is named ``module:Class``; ``docs/sources.md`` shows one.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from steel_megatron.data.reading.chunks import BadRow
from steel_megatron.data.reading.conversations import CHAT_FORMS, Chat, Form, Turn, form_of_row, history_of
from steel_megatron.data.reading.keys import Row, string, text_at
from steel_megatron.errors import DataError

SYSTEM_PROMPT = "You are a helpful assistant."
MARKS = ("<|im_start|>", "<|im_end|>")
"""ChatML's marks around a turn."""


@dataclass(frozen=True)
class Dialogue:
    """Turns of user and assistant, in the one template that all dialogues get (ChatML, as in the paper)."""

    text: str
    chat: Chat | None = field(default=None, compare=False)
    """The turns; None where only the text is known."""

    @classmethod
    def of(cls, turns: Sequence[tuple[str, str]]) -> Dialogue:
        """Render pairs of what the user said and what the assistant answered.

        Empty, as an empty text is, when there is no turn or somebody says nothing in one.

        Raises:
            BadRow: a turn holds a mark of the template, which could fake a turn.
        """
        if not turns or any(not said.strip() for turn in turns for said in turn):
            return cls("")
        said = [Turn(role, text) for turn in turns for role, text in zip(("user", "assistant"), turn, strict=True)]
        return cls.of_chat(Chat(tuple(said)))

    @classmethod
    def of_chat(cls, chat: Chat) -> Dialogue:
        """Render a conversation, or the better one of a pair; the usual system prompt comes first where it has none.

        Raises:
            BadRow: a turn holds a mark of the template, which could fake a turn.
        """
        turns = chat.turns if chat.turns[0].role == "system" else (Turn("system", SYSTEM_PROMPT), *chat.turns)
        for turn in (*turns, *chat.rejected):
            found = [mark for mark in MARKS if mark in turn.content]
            if found:
                raise BadRow(f"a turn of the {turn.role} holds {found[0]}, which marks turns in the dialogue template")
        rendered = [f"<|im_start|>{turn.role}\n{turn.content}<|im_end|>" for turn in turns]
        return cls("\n".join(rendered), chat)


class Source:
    """How to read the rows of one corpus."""

    columns: tuple[str, ...] | None = None
    """The columns that are needed of a parquet file; None for all."""

    def text(self, row: Row) -> str | Dialogue:
        """The document of one row.

        Raises:
            BadRow: the row cannot be one; the message is the reason.
        """
        raise NotImplementedError

    def text_of(self, value: object) -> str | Dialogue:
        """The document of one row, whatever the row is.

        Raises:
            BadRow: the row cannot be one.
        """
        if not isinstance(value, dict):
            raise BadRow(f"a JSON {type(value).__name__} where an object was expected")
        return self.text(value)

    def unused(self, row: Row) -> list[str]:
        """The columns of a row that are not read, where that could be a surprise; none for texts."""
        return []

    def plain_key(self) -> tuple[str, Sequence[str]] | None:
        """The key whose string is :meth:`text` of a row, and the keys without which that holds; None for no such key.

        Where there is one, rows are read several times as fast.
        """
        return None


SOURCES: dict[str, Callable[[], Source]] = {}
"""The sources by name."""


def register(name: str) -> Callable[[type[Source]], type[Source]]:
    """Class decorator: makes a source known under a name."""

    def add(kind: type[Source]) -> type[Source]:
        assert name not in SOURCES, name
        SOURCES[name] = kind
        return kind

    return add


def is_source(name: str) -> bool:
    """Whether there is a source of this name; ``module:Class`` imports the module.

    Raises:
        DataError: that module cannot be imported, or has no such class.
    """
    return name in SOURCES or (":" in name and bool(_imported(name)))


def _imported(name: str) -> type[Source]:
    module, _, kind = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), kind, None)
    except ImportError as error:
        raise DataError(
            f"the module of the source {name!r} cannot be imported ({error}); put its folder into PYTHONPATH"
        ) from None
    if not (isinstance(found, type) and issubclass(found, Source)):
        raise DataError(f"the source {name!r}: {module} has no class {kind} that is a {Source.__module__}.Source")
    return found


def get_source(name: str, text_key: str = "text") -> Source:
    """A source by its name; ``text_key`` is which value of a row is the text, for the source ``text``.

    Args:
        name: of this module's, or ``module:Class``.
        text_key: a key, or a path such as ``data.text`` or ``messages[].content``.

    Raises:
        DataError: there is none of this name.
    """
    if not is_source(name):
        raise DataError(f"there is no source {name!r}; known are {', '.join(SOURCES)}, or module:Class for your own")
    if name == "text":
        return Text(text_key)
    return SOURCES[name]() if name in SOURCES else _imported(name)()


def optional(row: Row, key: str) -> str:
    """The string under a key that may be missing, null or blank: then the empty string."""
    return "" if row.get(key) is None else string(row, key).strip()


def paragraphs(*parts: str) -> str:
    """Those of the parts that are not blank, a line each."""
    return "\n".join(part for part in parts if part and not part.isspace())


@register("text")
class Text(Source):
    """Rows with the text under one key; ``"dialogue": true`` says that it is in the dialogue template already.

    The key may be a path (``data.text``, ``messages[].content``). Under the key ``text``, a row that is itself a
    string, or a list of strings, is the text.
    """

    def __init__(self, key: str = "text") -> None:
        self._key = key
        self.columns = (key, "dialogue")

    def text(self, row: Row) -> str | Dialogue:
        found = text_at(row, self._key)
        return Dialogue(found) if row.get("dialogue") is True else found

    def text_of(self, value: object) -> str | Dialogue:
        rows = value if isinstance(value, list) else [value]
        strings = [one for one in rows if isinstance(one, str)]
        if self._key == "text" and len(strings) == len(rows):
            return "\n".join(strings)
        return super().text_of(value)

    def plain_key(self) -> tuple[str, Sequence[str]] | None:
        return (self._key, ("dialogue",)) if type(self) is Text else None  # another class has another text()


@register("skypile")
class SkyPile(Source):
    """SkyPile-150B: web pages, ``{"text"}``."""

    columns = ("text",)

    def text(self, row: Row) -> str:
        return string(row, "text")

    def plain_key(self) -> tuple[str, Sequence[str]] | None:
        return ("text", ()) if type(self) is SkyPile else None


@register("wanjuan")
class Wanjuan(Source):
    """Wanjuan 1.0: texts, ``{"id", "content"}``; exam questions, ``{"q_main", "option_a", ..., "std_ans", ...}``."""

    def text(self, row: Row) -> str:
        if "q_main" not in row:
            return string(row, "content")
        options = [
            f"{key[-1].upper()}. {optional(row, key)}"
            for key in (f"option_{letter}" for letter in "abcdefgh")
            if optional(row, key)
        ]
        question = string(row, "q_main")
        if not question.strip():
            return ""
        answer = optional(row, "std_ans") or optional(row, "answer")
        explanation = optional(row, "answer_detail")
        return paragraphs(
            question,
            *options,
            f"答案：{answer}" if answer else "",
            f"解析：{explanation}" if explanation else "",
        )


@register("wikipedia_cn")
class WikipediaCn(Source):
    """Wikipedia-cn: ``{"completion", "source"}``."""

    columns = ("completion",)

    def text(self, row: Row) -> str:
        return string(row, "completion")


@register("baidu_baike")
class BaiduBaike(Source):
    """Baidu Baike: ``{"title", "summary", "sections": [{"title", "content"}], "tags", "url"}``."""

    def text(self, row: Row) -> str:
        sections = row.get("sections") or []
        if not isinstance(sections, list) or not all(isinstance(section, dict) for section in sections):
            raise BadRow(f"key 'sections' holds {str(sections)[:60]!r} where a list of objects was expected")
        parts = [string(row, "title"), optional(row, "summary")]
        for section in sections:
            parts += [optional(section, "title"), optional(section, "content")]
        return "" if len([part for part in parts if part]) < 2 else paragraphs(*parts)


@register("baidu_qa")
class BaiduQa(Source):
    """Baidu QA: ``{"qid", "category", "title", "desc", "answer"}``."""

    def text(self, row: Row) -> Dialogue:
        title, more = string(row, "title").strip(), optional(row, "desc")
        return Dialogue.of([(paragraphs(title, "" if more == title else more), string(row, "answer").strip())])


@register("zhihu")
class Zhihu(Source):
    """Zhihu QA: parquet with ``INSTRUCTION``, ``RESPONSE``."""

    columns = ("INSTRUCTION", "RESPONSE")

    def text(self, row: Row) -> Dialogue:
        return Dialogue.of([(string(row, "INSTRUCTION").strip(), string(row, "RESPONSE").strip())])


@register("belle")
class Belle(Source):
    """BELLE 2M, ``{"instruction", "input", "output"}``, and 3.5M, ``{"conversations": [{"from", "value"}]}``."""

    def text(self, row: Row) -> Dialogue:
        if "conversations" not in row:
            asked = paragraphs(string(row, "instruction"), optional(row, "input"))
            before = [turn.content for turn in history_of(row)]
            earlier = list(zip(before[::2], before[1::2], strict=True))
            return self._after_system(row, Dialogue.of([*earlier, (asked, string(row, "output"))]))
        said = row["conversations"]
        if not isinstance(said, list) or not all(isinstance(turn, dict) for turn in said):
            raise BadRow("key 'conversations' holds no list of turns")
        pairs = _pairs([(string(turn, "from"), string(turn, "value")) for turn in said])
        return self._after_system(row, Dialogue.of(pairs))

    def unused(self, row: Row) -> list[str]:
        return _others(row, CHAT_FORMS["sharegpt" if "conversations" in row else "alpaca"])

    def _after_system(self, row: Row, dialogue: Dialogue) -> Dialogue:
        """The dialogue behind what the system says in a column of its own."""
        system = optional(row, "system")
        if not system or dialogue.chat is None:
            return dialogue
        return Dialogue.of_chat(Chat((Turn("system", system), *dialogue.chat.turns)))


def _pairs(said: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Turns by who speaks -> pairs of question and answer; a last question without an answer is left out."""
    if len(said) % 2:
        said = said[:-1]
    users, assistants = said[::2], said[1::2]
    wrong = [who for who, _ in users if who not in ("human", "user")]
    wrong += [who for who, _ in assistants if who not in ("assistant", "gpt", "bot")]
    if wrong:
        raise BadRow(f"turns are not those of human and assistant in turn (a turn of {wrong[0]!r} is out of place)")
    return [(user, assistant) for (_, user), (_, assistant) in zip(users, assistants, strict=True)]


@register("moss")
class Moss(Source):
    """MOSS: ``{"conversation": {"turn_1": {"Human", "MOSS"}, ...}}``, or a list of turns ``{"human", "assistant"}``."""

    _marks = re.compile(r"\A<\|(?:Human|MOSS)\|>:|<eo[a-z]>\Z")
    """MOSS's own marks at the beginning and the end of what was said, without the spaces around it."""

    def _said(self, turn: Row, *names: str) -> str:
        name = next((name for name in names if name in turn), names[0])
        return self._marks.sub("", string(turn, name).strip()).strip()

    def text(self, row: Row) -> Dialogue:
        turns = next((row[key] for key in ("conversation", "chat") if key in row), None)
        if isinstance(turns, dict):
            numbers = {name.removeprefix("turn_"): turn for name, turn in turns.items()}
            if not all(number.isdecimal() for number in numbers):
                raise BadRow(f"turns are named {', '.join(map(repr, list(turns)[:4]))}, not turn_1, turn_2, ...")
            turns = [numbers[number] for number in sorted(numbers, key=int)]
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            found = ", ".join(map(repr, list(row)[:8])) or "no keys"
            raise BadRow(f"there are no turns under 'conversation'; the row has {found}")
        return Dialogue.of(
            [(self._said(turn, "Human", "human"), self._said(turn, "MOSS", "assistant")) for turn in turns]
        )


@register("firefly")
class Firefly(Source):
    """Firefly: ``{"kind", "input", "target"}``."""

    def text(self, row: Row) -> Dialogue:
        return Dialogue.of([(string(row, "input"), string(row, "target"))])


@register("starcoder")
class StarCoder(Source):
    """StarCoder's code (C++, Python, Java): parquet or JSON lines with ``content``.

    The data set puts marks such as ``<reponame>x<filename>y<gh_stars>1-10`` before a file's first line; they go, and
    so does a byte order mark.
    """

    columns = ("content",)
    _head = re.compile(r"\A(?:(?:<(?:reponame|filename|gh_stars)>[^\n<]*)+\n?)?\ufeff?")

    def text(self, row: Row) -> str:
        return self._head.sub("", string(row, "content"))


class Conversation(Source):
    """Conversations and pairs, of the form that the columns of each row tell.

    Args:
        form: its name in :data:`~steel_megatron.data.reading.conversations.CHAT_FORMS`; None to tell it of each row.
    """

    def __init__(self, form: str | None = None) -> None:
        self._form = form

    def text(self, row: Row) -> Dialogue:
        form = CHAT_FORMS[self._form or form_of_row(row)]
        if not any(all(column in row for column in columns) for columns in form.needed):
            needed = " or ".join(" and ".join(map(repr, columns)) for columns in form.needed)
            raise BadRow(f"{needed} is missing; the row has {', '.join(map(repr, list(row)[:8])) or 'no keys'}")
        return Dialogue.of_chat(form.read(row))

    def unused(self, row: Row) -> list[str]:
        return _others(row, CHAT_FORMS[self._form or form_of_row(row)])


def _others(row: Row, form: Form) -> list[str]:
    return [column for column in row if column not in form.columns]


SOURCES.update({name: functools.partial(Conversation, name) for name in CHAT_FORMS}, chat=Conversation)
