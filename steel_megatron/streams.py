"""stdout and stderr, which may be closed, full, without a reader, or unable to show a character.

What a command logs is never worth its work: stderr swallows what it cannot write. A command whose result is what it
prints fails if that cannot be printed (:class:`StdoutError`); one that reports on finished work (:func:`say`) does not.
"""

from __future__ import annotations

import codecs
import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

from steel_megatron.errors import ExitCode

_ESCAPE = "steel_megatron.escape"
_FAILURES = (OSError, ValueError)
"""What writing raises; a ValueError if the stream was closed by Python code."""


class StdoutError(Exception):
    """What a command prints could not be written; made by the stdout of :func:`standard_streams`.

    Args:
        error: what writing raised.

    Attributes:
        code: what the command ends with.
    """

    def __init__(self, error: OSError | ValueError) -> None:
        self.code = ExitCode.NO_READER if isinstance(error, BrokenPipeError) else ExitCode.WRONG_INPUT
        closed = isinstance(error, ValueError) or error.errno == errno.EBADF
        reason = "it is closed" if closed else getattr(error, "strerror", None) or str(error)
        super().__init__(f"stdout cannot be written: {reason}")


def say(text: str) -> None:
    """Print lines about work that is done. It stays done if they cannot be printed, of which one line on stderr tells.

    Args:
        text: one or several lines, without the last line break.
    """
    try:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
    except StdoutError as error:
        if error.code != ExitCode.NO_READER:
            complain(f"{error}; the work is done, only its summary is lost")


def complain(line: str) -> None:
    """Write a line to stderr, if that is possible."""
    with suppress(*_FAILURES, AttributeError):  # AttributeError: Python has None in place of a closed stderr
        sys.stderr.write(line + "\n")
        sys.stderr.flush()


@contextmanager
def standard_streams() -> Iterator[None]:
    """Make ``sys.stdout`` and ``sys.stderr`` usable within the block, whatever the process was started with.

    A closed one gets its file descriptor back, so that no file of the work is opened under its number and gets what
    C code prints. Characters that an encoding lacks are written as JSON writes them: ``\\u6708``.
    """
    _occupy_descriptors()
    before = sys.stdout, sys.stderr
    out, err = _Stdout(sys.stdout or _of(1)), _Stderr(sys.stderr or _of(2))
    sys.stdout, sys.stderr = cast(TextIO, out), cast(TextIO, err)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream in (out, err):
            stream.restore()


def _occupy_descriptors() -> None:
    """Open the null device for the descriptors 0, 1 and 2 that are closed; not for writing where stdout was."""
    for number, flags in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, flags)
            assert opened == number, "the lowest free descriptor is taken"
            os.set_inheritable(number, True)


def _of(descriptor: int) -> TextIO:
    return open(descriptor, "w", encoding="utf-8", closefd=False)


class _Stream:
    """A text stream; what Python code asks of it besides writing is passed on.

    Args:
        stream: the one to write to.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._errors = stream, stream.errors
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_ESCAPE)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def restore(self) -> None:
        """Write what is left, and leave the stream as it was."""
        try:
            self._stream.flush()
            if isinstance(self._stream, io.TextIOWrapper):
                self._stream.reconfigure(errors=self._errors)
        except _FAILURES:
            self._drop()

    def _drop(self) -> None:
        """Send what is left in the stream nowhere: Python writes it when it ends, and would end with code 120."""
        with suppress(*_FAILURES), open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), self._stream.fileno())


class _Stdout(_Stream):
    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except _FAILURES as error:
            self._drop()
            raise StdoutError(error) from error

    def flush(self) -> None:
        try:
            self._stream.flush()
        except _FAILURES as error:
            self._drop()
            raise StdoutError(error) from error


class _Stderr(_Stream):
    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except _FAILURES:
            self._drop()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except _FAILURES:
            self._drop()


def _escaped(error: UnicodeError) -> tuple[str, int]:
    """``\\uXXXX`` for each UTF-16 unit, which is also what JSON has."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    units = error.object[error.start : error.end].encode("utf-16-be", "surrogatepass")
    pairs = (units[place : place + 2].hex() for place in range(0, len(units), 2))
    return "".join(f"\\u{unit}" for unit in pairs), error.end


codecs.register_error(_ESCAPE, _escaped)
