"""Texts in groups that are not too large; very long ones in pieces that encode to the same ids."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence

DIALOGUE_MARKS = ("<|im_start|>", "<|im_end|>")
"""What begins and ends a turn in the text form of a dialogue; no cut goes through one."""

PIECE = 1 << 16
"""Characters of a piece."""

_ASCII_MARK = r"[!-/:-@\[-`{-~]"
_PLACES = (
    # Where a token hardly ever goes across: after a line, before a word, after a Chinese mark.
    re.compile(r"\n(?=\w)"),
    re.compile(r"(?<=\w)(?= \w)"),
    re.compile(r"[。！？；，](?=\w)"),
    # For text without these (numbers, compact JSON, Japanese): around an ASCII mark, after any other mark.
    re.compile(rf"(?<=[^\W_])(?={_ASCII_MARK})|(?<={_ASCII_MARK})(?=[^\W_])"),
    re.compile(r"[^\w\s\x00-\x7f](?=\w)"),
)
"""Kinds of places, best first. After them come the last places of all, between any two characters."""
_SEARCHED = 1 << 14
"""Characters before the end of a piece in which it may be cut."""
_TRIED = 8
"""Places of each kind that are tried there."""
_TRIED_ANYWHERE = 16
"""Places between any two characters that are tried: more than most tokens have characters."""
_AROUND = tuple((1 << 10) - (1 << k) + 1 for k in range(9))
"""Characters on both sides of a place that must encode alike with and without the cut, in so many trials."""


def groups(texts: Iterable[str], characters: int) -> Iterator[list[str]]:
    """Texts together, as long as they have no more characters."""
    group: list[str] = []
    size = 0
    for text in texts:
        if group and size + len(text) > characters:
            yield group
            group, size = [], 0
        group.append(text)
        size += len(text)
    if group:
        yield group


def pieces(text: str, encode: Callable[[str], Sequence[int]], longest: int = PIECE) -> list[str]:
    """Cut a text where its ids fall apart.

    Tokenizers decide locally: most never let a token go across the end of a line, all others merge neighbours. So a cut
    is made only where the text around it has the same ids in two parts as in one. In a short pattern repeated,
    tokens follow each other from its begin and nothing near a place tells where they end. Trials agree only on a place
    that does not depend on that: of lengths that are 2^k - 1 shorter, some two differ by one repetition of any pattern
    of up to 256 characters.

    Args:
        text: of any length.
        encode: the ids of a short text.
        longest: characters of a piece, as far as there are places to cut. A stretch where none is found stays whole.
    """
    found, start = [], 0
    while len(text) - start > longest:
        # Without a place near the end of the piece it is looked for further on: the piece becomes longer.
        ends = range(start + longest, len(text), longest)
        stop = next((place for end in ends if (place := _place(text, start, end, encode))), len(text))
        found.append(text[start:stop])
        start = stop
    return [*found, text[start:]] if start < len(text) or not found else found


def _place(text: str, start: int, end: int, encode: Callable[[str], Sequence[int]]) -> int | None:
    """A place to cut between two positions, near the second."""
    start = max(start, end - _SEARCHED)
    places = (start + found for found in _places(text[start:end]))
    return next((at for at in places if not _in_mark(text, at) and _falls_apart(text, at, encode)), None)


def _places(window: str) -> Iterator[int]:
    """Places to try, best first; not the window's own end, behind which nothing is known."""
    for kind in _PLACES:
        yield from reversed([match.end() for match in kind.finditer(window) if 0 < match.end() < len(window)][-_TRIED:])
    yield from range(len(window) - 1, max(len(window) - 1 - _TRIED_ANYWHERE, 0), -1)


def _in_mark(text: str, at: int) -> bool:
    """Whether a place is within a mark of a dialogue, which an encoder of dialogues must see whole."""
    return any(text.find(mark, max(0, at - len(mark) + 1), at + len(mark) - 1) >= 0 for mark in DIALOGUE_MARKS)


def _falls_apart(text: str, at: int, encode: Callable[[str], Sequence[int]]) -> bool:
    """Whether the ids around a place are the same with and without a cut."""
    for around in _AROUND:
        left, right = text[max(0, at - around) : at], text[at : at + around]
        if [*encode(left), *encode(right)] != list(encode(left + right)):
            return False
    return True
