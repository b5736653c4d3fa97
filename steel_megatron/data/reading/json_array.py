"""One big JSON array as a stream of its elements, each as it is written there."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator

from steel_megatron.data.reading import chunks
from steel_megatron.data.reading.compression import Readable
from steel_megatron.errors import DataError


def elements(path: str, stream: Readable, number: int, offset: int, chunk_bytes: int) -> Iterator[tuple[int, bytes]]:
    """The elements of a JSON array, each with its byte in the file, in the memory of the largest and a chunk.

    An element is as it is written in the file, but on one line.

    Args:
        path: the file, for messages.
        stream: its (decompressed) content from ``offset`` on.
        number: elements before ``offset``; there another one begins, or the array ends.
        offset: bytes before; 0 for the whole file.
        chunk_bytes: how much is read at a time.

    Raises:
        DataError: the array is broken; with the byte of the (decompressed) file.
    """
    text = _ArrayText(path, stream, number, offset, chunk_bytes)
    if offset == 0:
        text.skip_mark("\ufeff")
        found = text.skip_mark("[")
        assert found, path  # or it would not have been taken for an array
    if not text.skip_mark("]"):
        while True:
            yield text.element()
            if text.skip_mark("]"):
                break
            if not text.skip_mark(","):
                what = f"{text.next!r} stands" if text.next else "the file ends"
                raise text.error(f"{what} where a comma or ] was expected after element {text.number}")
    if text.next:
        raise text.error(f"something stands after the end of the JSON array of {text.number} elements")


class _ArrayText:
    """The text of a JSON array, as much of it as is needed at a time, from the next visible character on."""

    def __init__(self, path: str, stream: Readable, number: int, offset: int, chunk_bytes: int) -> None:
        self.number = number
        """Elements that were read."""
        self._path, self._stream, self._chunk_bytes = path, stream, chunk_bytes
        self._text, self._at, self._ended = "", 0, False
        self._offset = offset
        """Bytes of the file before ``_at``."""
        self._decoder, self._utf8 = json.JSONDecoder(), codecs.getincrementaldecoder("utf-8")()
        self._skip_spaces()

    @property
    def next(self) -> str:
        """The next visible character; empty at the end of the file."""
        return self._text[self._at : self._at + 1]

    def error(self, reason: str, further: int = 0) -> DataError:
        """What is wrong here, or so many bytes after it."""
        return DataError(
            f"{self._path}, byte {self._offset + further}: {reason}; what follows in the array cannot be told apart, "
            "so such a file cannot be skipped through: repair it, or write it as JSON lines"
        )

    def _more(self, count: int) -> None:
        self._text, self._at = self._text[self._at :], 0
        block = self._stream.read(count)
        self._ended = not block
        try:
            self._text += self._utf8.decode(block, final=self._ended)
        except UnicodeDecodeError as error:
            at = len(self._text.encode()) + error.start
            raise self.error(f"not valid UTF-8 after element {self.number} ({error.reason})", at) from None

    def _skip_spaces(self) -> None:
        while True:
            begin = self._at
            while self._at < len(self._text) and self._text[self._at] in " \t\r\n":
                self._at += 1
            self._offset += self._at - begin
            if self._at < len(self._text) or self._ended:
                return
            self._more(self._chunk_bytes)

    def skip_mark(self, mark: str) -> bool:
        """Go on after the next character if it is this one."""
        if self.next != mark:
            return False
        self._at += 1
        self._offset += len(mark.encode())
        self._skip_spaces()
        return True

    def element(self) -> tuple[int, bytes]:
        """The JSON value that begins here: (its byte in the file, itself on one line)."""
        wanted, offset = self._chunk_bytes, self._offset
        while True:
            try:
                stop = self._decoder.raw_decode(self._text, self._at)[1]
                if self._ended or stop + 2 < len(self._text):  # of a number, more than its exponent's mark and sign
                    break
            except json.JSONDecodeError as error:
                cut_off = error.msg.startswith("Unterminated string") or error.pos + 12 >= len(self._text)
                if self._ended or not cut_off:
                    further = len(self._text[self._at : error.pos].encode())
                    raise self.error(f"broken JSON ({error.msg}) in element {self.number + 1}", further) from None
            except RecursionError:
                raise self.error(f"brackets nested beyond any use in element {self.number + 1}") from None
            except ValueError as error:
                raise self.error(f"JSON beyond any use in element {self.number + 1} ({error})") from None
            if len(self._text) - self._at > chunks.LONGEST_ROW:
                raise self.error(f"element {self.number + 1} has more than {chunks.LONGEST_ROW:,} characters")
            self._more(wanted)
            wanted *= 2  # so an element of any size is looked at a few times only
        line = self._text[self._at : stop].encode()
        self._at, self._offset, self.number = stop, offset + len(line), self.number + 1
        self._skip_spaces()
        return offset, line.replace(b"\n", b" ").replace(b"\r", b" ")  # between values; in strings they are escapes
