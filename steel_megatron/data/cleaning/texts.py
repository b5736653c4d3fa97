"""A document on its way through the operators: a text, or the turns of a dialogue, whose marks no operator sees."""

from __future__ import annotations

import re
from collections.abc import Callable

from steel_megatron.data.cleaning.filters import MeasuredText, Resources
from steel_megatron.data.reading.sources import MARKS

_TURN_MARKS = re.compile(r"(<\|im_start\|>\w+\n|<\|im_end\|>\n?)")
_SYSTEM = "<|im_start|>system\n"
_BETWEEN, _BEGIN, _SAID, _END = range(4)


class Lost(Exception):
    """An operator left nothing of a document; the message is the reason."""


class DocumentText:
    """The text of a document.

    Of a dialogue, mappers get what the user and the assistant said, turn by turn; filters and deduplicators see these
    turns as lines, without the marks and the system's prompt, which is the same everywhere.

    Args:
        text: the document's text.
        dialogue: whether it is in the dialogue template.

    Raises:
        Lost: a dialogue is not in the template.
    """

    def __init__(self, text: str, dialogue: bool = False) -> None:
        # Of a dialogue: ["", begin of turn, what was said, end of turn, "", begin, said, end, ..., ""].
        self._pieces = _TURN_MARKS.split(text) if dialogue else [text]
        self._said = [0]
        if dialogue:
            self._check()
            turns = range(0, len(self._pieces) - 1, 4)
            self._said = [turn + _SAID for turn in turns if self._pieces[turn + _BEGIN] != _SYSTEM]
            if not self._said:
                raise Lost("a dialogue in which nobody says anything")
        self._sample: MeasuredText | None = None

    def _check(self) -> None:
        marks = [piece[:10] for piece in self._pieces[1::2]]
        whole = len(marks) % 2 == 0 and all(mark.startswith(MARKS[place % 2][:10]) for place, mark in enumerate(marks))
        if not whole or any(piece.strip() for piece in [*self._pieces[_BETWEEN::4], self._pieces[-1]]):
            raise Lost("a dialogue that is not in the dialogue template")

    def sample(self, resources: Resources) -> MeasuredText:
        """What filters measure; the same object as long as the text does not change."""
        if self._sample is None:
            self._sample = MeasuredText("\n".join(self._pieces[place] for place in self._said), resources)
        return self._sample

    def apply(self, change: Callable[[str], str]) -> bool:
        """Let a mapper change the text, or each turn; returns whether it did.

        Raises:
            Lost: nothing visible is left of the text or of a turn, or a turn came to hold a mark of the template.
        """
        dialogue, changed = len(self._pieces) > 1, False
        for place in self._said:
            new = change(self._pieces[place])
            if new == self._pieces[place]:
                continue
            if not new or new.isspace():
                raise Lost("nothing is left of a turn" if dialogue else "nothing is left")
            if dialogue and any(mark in new for mark in MARKS):
                raise Lost("a turn came to hold a mark of the dialogue template")
            self._pieces[place], changed = new, True
        if changed:
            self._sample = None
        return changed

    def __str__(self) -> str:
        return "".join(self._pieces)
