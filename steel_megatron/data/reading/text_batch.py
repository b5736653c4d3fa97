"""Many texts as one string of bytes, the form in which they go from a reader to a tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from steel_megatron.errors import DataError

SEPARATOR = b"\xff"
"""The byte behind each text, which UTF-8 never has."""


@dataclass(frozen=True, eq=False)
class TextBatch(Sequence[bytes]):
    """Texts in UTF-8, one after the other; as a sequence, the bytes of each."""

    content: bytes
    """The texts, with :data:`SEPARATOR` behind each."""
    ends: np.ndarray
    """Where the texts end, int64 [texts]."""

    @classmethod
    def of(cls, texts: Iterable[str] | Iterable[bytes]) -> TextBatch:
        """Join texts: strings, or UTF-8 (which is not checked).

        Raises:
            DataError: a string holds a lone surrogate.
        """
        if isinstance(texts, cls):
            return texts
        encoded = [encode_text(text) if isinstance(text, str) else text for text in texts]
        sizes = np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded))
        return cls(SEPARATOR.join([*encoded, b""]), np.cumsum(sizes + 1) - 1)

    @classmethod
    def concatenate(cls, parts: Sequence[TextBatch]) -> TextBatch:
        """The texts of all parts, of which there is at least one."""
        if len(parts) == 1:
            return parts[0]
        starts = np.cumsum([0, *(len(part.content) for part in parts)])
        ends = [part.ends + start for part, start in zip(parts, starts[:-1], strict=True)]
        return cls(b"".join(part.content for part in parts), np.concatenate(ends))

    def part(self, start: int, stop: int) -> TextBatch:
        """Some of the texts."""
        if start == 0 and stop == len(self):
            return self
        first, last = (int(self.ends[at - 1]) + 1 if at else 0 for at in (start, stop))
        return TextBatch(self.content[first:last], self.ends[start:stop] - first)

    @property
    def sizes(self) -> np.ndarray:
        """Bytes of each text, int64 [texts]."""
        return np.diff(self.ends, prepend=-1) - 1

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, number: int) -> bytes: ...

    @overload
    def __getitem__(self, number: slice) -> list[bytes]: ...

    def __getitem__(self, number: int | slice) -> bytes | list[bytes]:
        if isinstance(number, slice):
            return [self[at] for at in range(*number.indices(len(self)))]
        number = range(len(self))[number]
        return self.content[self.ends[number - 1] + 1 if number else 0 : self.ends[number]]

    def __iter__(self) -> Iterator[bytes]:
        start = 0
        for end in self.ends.tolist():
            yield self.content[start:end]
            start = end + 1


def encode_text(text: str) -> bytes:
    """A string in UTF-8.

    Raises:
        DataError: it is a string in Python and yet no text: it holds a lone surrogate.
    """
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"a text to encode holds a lone surrogate (U+{ord(text[error.start]):04X} at character {error.start} of "
            f"{len(text)}), which is no character; replace it"
        ) from None


def as_strings(texts: Sequence[str | bytes]) -> list[str]:
    """Texts as strings.

    Raises:
        DataError: one is no valid UTF-8.
    """
    strings = []
    for number, text in enumerate(texts):
        try:
            strings.append(text.decode() if isinstance(text, bytes) else text)
        except UnicodeDecodeError as error:
            raise DataError(
                f"text {number} of {len(texts)} to encode is not valid UTF-8 "
                f"(byte {error.start} is 0x{error.object[error.start]:02x}: {error.reason})"
            ) from None
    return strings
