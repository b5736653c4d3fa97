"""Very long texts in pieces that encode to the same ids."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

PIECE = 1 << 16
"""Characters of a piece."""

_PLACES = (re.compile(r"\n(?=\w)"), re.compile(r"(?<=\w)(?= \w)"), re.compile(r"[。！？；，](?=\w)"))
"""Where a token hardly ever goes across, best first: after a line, before a word, after a Chinese mark."""
_SEARCHED = 1 << 14
"""Characters before the end of a piece in which it may be cut."""
_TRIED = 8
"""Places of each kind that are tried there."""
_AROUND = 1 << 10
"""Characters on both sides of a place that must encode alike with and without the cut."""


def pieces(text: str, encode: Callable[[str], Sequence[int]], longest: int = PIECE) -> list[str]:
    """Cut a text where its ids fall apart.

    Tokenizers decide locally: most never let a token go across the end of a line, all others merge neighbours. So a cut
    is made only where the text around it has the same ids in two parts as in one.

    Args:
        text: of any length.
        encode: the ids of a short text.
        longest: characters of a piece, as far as there are places to cut.
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
    window = text[start:end]
    for kind in _PLACES:
        for match in _last(kind, window):
            at = start + match
            left, right = text[max(0, at - _AROUND) : at], text[at : at + _AROUND]
            if [*encode(left), *encode(right)] == list(encode(left + right)):
                return at
    return None


def _last(kind: re.Pattern[str], window: str) -> Iterator[int]:
    """Ends of the last few matches, the last one first; not at the window's own end, behind which nothing is known."""
    yield from reversed([match.end() for match in kind.finditer(window) if 0 < match.end() < len(window)][-_TRIED:])
