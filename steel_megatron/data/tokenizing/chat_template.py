"""Chat templates: turns -> text -> token ids, and which of them are the assistant's words and end marks."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from steel_megatron.data.reading.chunks import BadRow
from steel_megatron.data.reading.conversations import Turn
from steel_megatron.data.tokenizing.tokenizer import Tokenizer
from steel_megatron.errors import DataError

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""The template of tokenizers that have none."""
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Rendered:
    """A conversation as text."""

    text: str
    spans: tuple[tuple[int, int], ...]
    """Where each of the assistant's answers begins and ends, its end mark included, in characters."""


class ChatTemplate:
    """A tokenizer's own template, or ChatML.

    Args:
        tokenizer: the tokenizer; control tokens in the rendered text become their ids.

    Attributes:
        source: the template.

    Raises:
        DataError: the tokenizer has neither a template nor ChatML's marks.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.source = tokenizer.chat_template or CHATML
        self._control = dict(tokenizer.control_tokens)
        if tokenizer.chat_template is None and not {"<|im_start|>", "<|im_end|>"} <= set(self._control):
            raise DataError(
                "the tokenizer has neither a chat template nor ChatML's control tokens <|im_start|> and <|im_end|>; "
                "write a chat_template into its tokenizer_config.json"
            )
        marks = sorted(map(re.escape, self._control), key=len, reverse=True)
        self._marks = re.compile(f"({'|'.join(marks)})")

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the template."""
        return hashlib.sha256(self.source.encode()).hexdigest()

    @functools.cached_property
    def ends(self) -> frozenset[int]:
        """The control tokens that end an answer; empty if the template has none there."""
        try:
            ids, said = self.encode([Turn("user", "a"), Turn("assistant", "b")])
        except BadRow:
            return frozenset()
        last = ids[said][-1:].tolist()
        return frozenset(last) & frozenset(self._control.values())

    @property
    def portable(self) -> str:
        """The template, with the BOS that it writes: exported tokenizers name none, as no other text begins with it."""
        bos = self.tokenizer.named_tokens.get("bos_token")
        if bos is None or "bos_token" not in self.source:
            return self.source
        return f"{{% set bos_token = {json.dumps(bos, ensure_ascii=False)} %}}{self.source}"

    def prompt(self, turns: Sequence[Turn], reply: bool = True) -> str:
        """The text of a conversation that goes on.

        Args:
            turns: the conversation.
            reply: whether the assistant replies next; if not, the last turn goes on.

        Raises:
            BadRow: the template cannot render the turns.
        """
        text = self._render(turns, prompt=reply)[0]
        last = turns[-1].content.rstrip()
        return text if reply else text[: text.rindex(last) + len(last)]

    def ids_of(self, text: str) -> list[int]:
        """The ids of a rendered text: its marks are control tokens."""
        parts = [part for part in self._marks.split(text) if part]
        encoded = ([self._control[part]] if part in self._control else self.tokenizer.encode(part) for part in parts)
        return [index for ids in encoded for index in ids]

    def encode(self, turns: Sequence[Turn], only_last: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """The ids of a conversation, and which of them the assistant said, end marks included.

        A token that crosses the border from the template's words to the assistant's counts as the assistant's: it is
        the first one that the prompt does not end in.

        Args:
            turns: the conversation.
            only_last: leave out what the assistant said before its last answer.

        Returns:
            int32 [tokens], and bool [tokens].

        Raises:
            BadRow: a turn holds a control token, or the template cannot render the turns, or rewrites earlier ones.
        """
        self._refuse_marks(turns)
        rendered = self.rendered(turns)
        spans = rendered.spans[-1:] if only_last else rendered.spans
        ids: list[int] = []
        said: list[bool] = []
        at = 0
        for number, part in enumerate(self._marks.split(rendered.text)):
            end = at + len(part)
            inside = [(max(first, at) - at, min(last, end) - at) for first, last in spans]
            inside = [(first, last) for first, last in inside if first < last]
            if number % 2:
                ids.append(self._control[part])
                said.append(bool(inside))
            elif part:
                own = self.tokenizer.encode(part)
                ids += own
                said += self._inside(part, own, inside)
            at = end
        return np.array(ids, dtype=np.int32), np.array(said, dtype=bool)

    def _inside(self, part: str, ids: list[int], spans: Sequence[tuple[int, int]]) -> list[bool]:
        """Which tokens of a text without control tokens lie in spans of its characters."""
        said = [False] * len(ids)
        for first, last in spans:
            begin, end = (self._common(part[:place], ids) if place < len(part) else len(ids) for place in (first, last))
            said[begin:end] = [True] * (end - begin)
        return said

    def _common(self, prefix: str, ids: list[int]) -> int:
        """How many tokens a prefix of a text shares with the whole text."""
        own = self.tokenizer.encode(prefix) if prefix else []
        same = 0
        while same < min(len(own), len(ids)) and own[same] == ids[same]:
            same += 1
        return same

    def _refuse_marks(self, turns: Sequence[Turn]) -> None:
        for number, turn in enumerate(turns, start=1):
            if found := self._marks.search(turn.content):
                raise BadRow(f"turn {number} ({turn.role}) holds the control token {found[0]}")

    def rendered(self, turns: Sequence[Turn]) -> Rendered:
        """A conversation as text, with the places of the assistant's answers.

        Raises:
            BadRow: the template cannot render it, or rewrites earlier turns.
        """
        if _GENERATION.search(self.source):
            text, spans = self._render(turns, with_spans=True)
            spans = [(first, self._behind_mark(text, last)) for first, last in spans]
            answers = sum(turn.role == "assistant" for turn in turns)
            if len(spans) != answers:
                raise BadRow(f"the chat template marks {len(spans)} of {answers} answers as generated")
            return Rendered(text, tuple(spans))
        text = self._render(turns)[0]
        return Rendered(text, tuple(self._found(turns, text)))

    def _behind_mark(self, text: str, end: int) -> int:
        """The end of an answer whose end mark the template puts behind what is marked as generated."""
        if any(text.endswith(mark, 0, end) for mark in self._control):
            return end
        found = self._marks.match(text, end)
        return found.end() if found else end

    def _found(self, turns: Sequence[Turn], text: str) -> list[tuple[int, int]]:
        """The answers by what a render has more than that of the turns before."""
        spans = []
        for number, turn in enumerate(turns):
            if turn.role != "assistant":
                continue
            before = self._render(turns[:number], prompt=True)[0] if number else ""
            upto = self._render(turns[: number + 1])[0]
            if not (text.startswith(upto) and upto.startswith(before)):
                raise BadRow(
                    f"the chat template renders turn {number + 1} or those before it in another way when other turns "
                    "follow, so that what the assistant said cannot be told; use a template with {% generation %}"
                )
            added = upto[len(before) :]
            if number and before == self._render(turns[:number])[0]:  # it has no prompt for an answer
                head = added.find(turn.content.strip())
                if head < 0:
                    raise BadRow(f"the chat template changes what the assistant says in turn {number + 1}")
                before, added = before + added[:head], added[head:]
            ends = [found.end() for found in self._marks.finditer(added)]
            size = ends[-1] if ends and not added[ends[-1] :].strip() else len(added)
            spans.append((len(before), len(before) + size))
        return spans

    def _render(
        self, turns: Sequence[Turn], prompt: bool = False, with_spans: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text of turns, and with ``with_spans`` what the template marks as generated."""
        # transformers takes a second to import.
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        names: dict[str, Any] = {"bos_token": "", "eos_token": "", **self.tokenizer.named_tokens}
        try:
            found: Any = render_jinja_template(
                conversations=[messages],
                chat_template=self.source,
                return_assistant_tokens_mask=with_spans,
                add_generation_prompt=prompt,
                **names,
            )
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise BadRow(f"the chat template cannot render the conversation: {error}") from None
        texts, spans = found
        return str(texts[0]), [(int(first), int(last)) for first, last in spans[0]] if with_spans else []
