"""Raw corpora of every format -> a stream of :class:`Document`.

A file is read as a stream, one row at a time: memory holds one row. A row is one line of a ``.jsonl`` file, or
the whole of a ``.txt`` or source-code file. What cannot be read as text is either an error that names the file,
the row and the byte, or is skipped and reported with its reason; nothing disappears silently.
"""

from __future__ import annotations

import glob
import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from steel_megatron.errors import DataError

BadRowPolicy = Literal["stop", "skip"]

JSON_LINES_SUFFIXES = (".jsonl", ".jsonl.gz")
"""Files with one JSON object per line."""
CODE_SUFFIXES = (".py", ".cpp", ".java")
"""Source code: one document per file."""
WHOLE_FILE_SUFFIXES = (".txt", *CODE_SUFFIXES)
"""Files that are one document each."""
KNOWN_SUFFIXES = (*JSON_LINES_SUFFIXES, *WHOLE_FILE_SUFFIXES)

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_SKIPPED_FOLDERS = ("__pycache__",)


@dataclass(frozen=True)
class Document:
    """One text and where it came from."""

    text: str
    """The text; valid Unicode, not empty."""
    source: str
    """Path of the file."""
    row: int
    """Row in the file, counted from 1."""


@dataclass(frozen=True)
class SkippedRow:
    """A row that gave no document."""

    source: str
    """Path of the file."""
    row: int
    """Row in the file, counted from 1."""
    reason: str
    """Why it was left out; ``empty`` for a text without any visible character."""


class _BadRow(Exception):
    """A row that cannot be a document; the message is the reason, ``offset`` the byte within the row."""

    def __init__(self, reason: str, offset: int = 0) -> None:
        super().__init__(reason)
        self.offset = offset


def has_keys(path: Path) -> bool:
    """Whether the file's rows are JSON objects, so that a text is picked from them by its key."""
    return path.name.endswith(JSON_LINES_SUFFIXES)


def expand_inputs(inputs: Sequence[str]) -> list[Path]:
    """Turn files, folders and glob patterns into a list of files.

    The order is that of ``inputs``, and within a folder or a pattern sorted by path, so it does not depend on the
    file system. A file that is named twice is read once. Folders are searched through all levels for files of a
    known format; hidden files and ``__pycache__`` are left out, and links to folders are not followed.

    Args:
        inputs: paths or patterns (``*``, ``?``, ``[...]``, and ``**`` for any depth).

    Raises:
        DataError: an input matches nothing, or a file is of no known format.
    """
    files: dict[Path, None] = {}
    for given in inputs:
        matches = [given] if os.path.exists(given) else sorted(glob.glob(given, recursive=True))
        found: list[Path] = []
        for match in map(Path, matches):
            if match.is_dir():
                found.extend(_files_below(match))
            elif not match.name.endswith(KNOWN_SUFFIXES):
                raise DataError(f"{match} is of no known format; a file name must end in {', '.join(KNOWN_SUFFIXES)}")
            else:
                found.append(match)
        if not found:
            what = f"holds no file that ends in {', '.join(KNOWN_SUFFIXES)}" if matches else "matches no file"
            raise DataError(f"input {given!r} {what}")
        files.update(dict.fromkeys(found))
    if not files:
        raise DataError("no input was given; name at least one file, folder or pattern")
    return list(files)


def _files_below(folder: Path) -> list[Path]:
    def refuse(error: OSError) -> None:
        raise DataError(f"cannot read folder {error.filename}: {error.strerror}") from error

    found = []
    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in _SKIPPED_FOLDERS]
        found += [Path(parent, name) for name in names if name.endswith(KNOWN_SUFFIXES) and name[0] != "."]
    return sorted(found)


def read_documents(
    path: Path | str,
    text_key: str = "text",
    on_bad_row: BadRowPolicy = "stop",
    on_skip: Callable[[SkippedRow], None] | None = None,
    on_bytes: Callable[[int], None] | None = None,
) -> Iterator[Document]:
    """Read one file as a stream of documents.

    Blank lines are no rows of their own (they count in the numbering); a byte order mark, CRLF line ends and a
    missing last newline are fine. An empty text is skipped under both policies.

    Args:
        path: a file of a known format.
        text_key: which value of a JSON row is the text; without effect on whole-file formats.
        on_bad_row: what to do with a row that is no text: broken JSON, no object, the key missing, its value null
            or no string, invalid UTF-8, lone surrogates. ``stop`` raises; ``skip`` reports and goes on.
        on_skip: told of each row that is left out.
        on_bytes: told how many more bytes of the file (as stored, so compressed ones of a ``.gz``) were read.

    Raises:
        DataError: a bad row under ``stop`` (with file, row and byte offset), a file that cannot be read, or a
            compressed file that is truncated or damaged (under both policies: what is lost is not known).
    """
    path = Path(path)
    row = offset = 0
    try:
        with path.open("rb") as raw:
            for row, offset, line in _rows(path, raw, on_bytes):
                try:
                    text = _text_of_json(line, text_key) if has_keys(path) else _text_of_file(line)
                except _BadRow as problem:
                    if on_bad_row == "stop":
                        raise DataError(
                            f"{path}, row {row}, byte {offset + problem.offset}: {problem}; repair the row, or skip "
                            "such rows with on_bad_row = skip"
                        ) from None
                    reason = str(problem)
                else:
                    if text.strip():
                        yield Document(text, str(path), row)
                        continue
                    reason = "empty"
                if on_skip is not None:
                    on_skip(SkippedRow(str(path), row, reason))
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is truncated or damaged after row {row}: {error}") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def _rows(path: Path, raw: BinaryIO, on_bytes: Callable[[int], None] | None) -> Iterator[tuple[int, int, bytes]]:
    """The rows of an open file: (row number from 1, offset of its first byte, its bytes)."""
    told = 0

    def tell() -> None:
        nonlocal told
        if on_bytes is not None and raw.tell() > told:
            on_bytes(raw.tell() - told)
            told = raw.tell()

    if not has_keys(path):
        content = raw.read()
        tell()
        yield 1, 0, content
        return
    stream: BinaryIO = gzip.GzipFile(fileobj=raw) if path.name.endswith(".gz") else raw  # type: ignore[assignment]
    offset = 0
    for row, line in enumerate(stream, start=1):
        tell()
        start, offset = offset, offset + len(line)
        if row == 1 and line.startswith(_BYTE_ORDER_MARK):
            line, start = line[len(_BYTE_ORDER_MARK) :], len(_BYTE_ORDER_MARK)
        if line.strip():
            yield row, start, line.rstrip(b"\r\n")


def _decode(content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _BadRow(f"not valid UTF-8 (byte 0x{content[error.start]:02x}: {error.reason})", error.start) from None


def _text_of_file(content: bytes) -> str:
    """The text of a whole file; its line ends become ``\\n``."""
    return _decode(content).removeprefix("\ufeff").replace("\r\n", "\n")


def _text_of_json(line: bytes, text_key: str) -> str:
    decoded = _decode(line)
    try:
        row = json.loads(decoded)
    except json.JSONDecodeError as error:
        raise _BadRow(f"broken JSON ({error.msg})", len(decoded[: error.pos].encode())) from None
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits; brackets nested as deep
        raise _BadRow(f"JSON beyond any use ({error})") from None
    if not isinstance(row, dict):
        raise _BadRow(f"a JSON {type(row).__name__} where an object was expected")
    if text_key not in row:
        raise _BadRow(f"key {text_key!r} is missing; the row has {', '.join(map(repr, list(row)[:8])) or 'no keys'}")
    text = row[text_key]
    if not isinstance(text, str):
        kind = "null" if text is None else f"a {type(text).__name__}"
        raise _BadRow(f"key {text_key!r} holds {kind} where a string was expected")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _BadRow(f"key {text_key!r} holds a lone surrogate (U+{ord(text[error.start]):04X})") from None
    return text
