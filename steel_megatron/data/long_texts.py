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
        stop = _place(text, start + longest, encode)
        if stop is None:  # try further on: the piece becomes longer
            later = (
                place for at in range(start + 2 * longest, len(text), longest) if (place := _place(text, at, encode))
            )
            stop = next(later, len(text))
        found.append(text[start:stop])
        start = stop
    return [*found, text[start:]] if start < len(text) or not found else found


def _place(text: str, before: int, encode: Callable[[str], Sequence[int]]) -> int | None:
    """A place to cut shortly before a position."""
    window_start = before - min(_SEARCHED, before // 2)
    window = text[window_start:before]
    for kind in _PLACES:
        for match in _last(kind, window):
            at = window_start + match
            left, right = text[max(0, at - _AROUND) : at], text[at : at + _AROUND]
            if [*encode(left), *encode(right)] == list(encode(left + right)):
                return at
    return None


def _last(kind: re.Pattern[str], window: str) -> Iterator[int]:
    """Ends of the last few matches, the last one first; not at the window's own end, behind which nothing is known."""
    yield from reversed([match.end() for match in kind.finditer(window) if 0 < match.end() < len(window)][-_TRIED:])
