"""Answers of earlier runs, kept in an SQLite file by model and request."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from steel_megatron.errors import DataError

_AT_ONCE = 500
"""Keys of one query; SQLite takes at most 999."""


def default_path() -> Path:
    """Where answers are kept unless a file is named: in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "steel_megatron" / "answers.sqlite"


def key_of(model: str, kind: str, arguments: Sequence[Any]) -> str:
    """What an answer is found by.

    Args:
        model: fingerprint of all that decides about answers: weights, tokenizer, settings.
        kind: the kind of request.
        arguments: of the request.
    """
    text = json.dumps([model, kind, *arguments], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


class Answers:
    """The answers in a file; several processes may use it at the same time.

    Args:
        path: the file, made where it is missing.

    Raises:
        DataError: the file cannot be made, or is something else.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with self._errors():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(path, timeout=60)
            self._connection.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT NOT NULL)")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError, ValueError) as error:
            raise DataError(
                f"the file of answers {self._path} cannot be used: {error}; name another one with --cache"
            ) from None

    def read(self, keys: Iterable[str]) -> dict[str, Any]:
        """The answers that are there, by key."""
        wanted = list(dict.fromkeys(keys))
        found: dict[str, Any] = {}
        with self._errors():
            for start in range(0, len(wanted), _AT_ONCE):
                some = wanted[start : start + _AT_ONCE]
                marks = ", ".join("?" * len(some))
                query = f"SELECT key, answer FROM answers WHERE key IN ({marks})"
                found |= {key: json.loads(answer) for key, answer in self._connection.execute(query, some)}
        return found

    def write(self, answers: Mapping[str, Any]) -> None:
        """Add answers."""
        rows = [(key, json.dumps(answer)) for key, answer in answers.items()]
        with self._errors(), self._connection:
            self._connection.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?)", rows)

    def close(self) -> None:
        """Close the file."""
        self._connection.close()
