"""The value of a row that is its text: by a key, or by a path through what the row holds."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from steel_megatron.data.reading.chunks import BadRow

Row = Mapping[str, Any]


def string(row: Row, key: str) -> str:
    """The string under a key.

    Raises:
        BadRow: there is none.
    """
    if key not in row:
        raise BadRow(f"key {key!r} is missing; the row has {', '.join(map(repr, list(row)[:8])) or 'no keys'}")
    return _as_string(row[key], key)


def _as_string(value: object, key: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):  # a string, if it were UTF-8
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            byte = f"byte {error.start} is 0x{value[error.start]:02x}"
            raise BadRow(f"key {key!r} holds binary data that is not valid UTF-8 ({byte}: {error.reason})") from None
    kind = "null" if value is None else f"a {type(value).__name__}"
    raise BadRow(f"key {key!r} holds {kind} where a string was expected")


_STEP = re.compile(r"([^.\[\]]+)((?:\[\d*\])*)(?:\.|\Z)")


def text_at(row: Row, key: str) -> str:
    """The text under a key or a path; the strings of a list are its lines.

    Args:
        row: the row.
        key: a key of it. If it has none of this name, a path: ``data.text`` is ``text`` in the object under ``data``,
            ``messages[].content`` is ``content`` in each object of the list under ``messages``, ``[0]`` the first one.

    Raises:
        BadRow: there is none.
    """
    if key in row or not any(mark in key for mark in ".["):
        return string(row, key) if not isinstance(row.get(key), list) else lines_of(row[key], key)
    return lines_of(_values_at(row, key), key)


def _values_at(row: Row, path: str) -> list[object]:
    """What a path leads to, of each entry of the lists that it goes through."""
    steps = list(_STEP.finditer(path))
    if "".join(step[0] for step in steps) != path:
        raise BadRow(f"key {path!r} is missing, and it is no path such as data.text or messages[].content")
    values: list[object] = [row]
    for step in steps:
        for value in values:
            if not isinstance(value, dict) or step[1] not in value:
                has = ", ".join(map(repr, list(value)[:8])) if isinstance(value, dict) else f"a {type(value).__name__}"
                raise BadRow(f"key {path!r} is missing: no {step[1]!r} in {has or 'no keys'}")
        values = [value[step[1]] for value in values if isinstance(value, dict)]
        for mark in re.findall(r"\[(\d*)\]", step[2]):
            for value in values:
                if not isinstance(value, list) or (mark and int(mark) >= len(value)):
                    raise BadRow(f"key {path!r}: what {step[1]!r} holds is no list, or has no entry {mark or 0}")
            lists = [value for value in values if isinstance(value, list)]
            values = [each[int(mark)] for each in lists] if mark else [entry for each in lists for entry in each]
    return values


def lines_of(values: Sequence[object], key: str) -> str:
    """The strings of a list, or of lists in it, a line each.

    Args:
        values: strings and lists of strings.
        key: where they are from, for the message.

    Raises:
        BadRow: something else is among them.
    """
    lines: list[str] = []
    for value in values:
        lines += [_as_string(entry, key) for entry in (value if isinstance(value, list) else [value])]
    return "\n".join(lines)
