"""What was found out about tokenizers, kept in the user's cache folder: the next start does not find it out again.

A record depends on everything that decides it: the tokenizer's files, the versions of the libraries, and this package's
own sources. One that is damaged, or was written by another version, is no record. Where nothing can be written, every
start looks for itself, as the first one does.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import orjson

from steel_megatron.errors import DataError
from steel_megatron.files import write_atomically

_LIBRARIES = ("tokenizers", "transformers", "sentencepiece", "gigatoken")
_KEPT = 64
"""Records, of which the oldest go; one of a vocabulary of 150,000 takes 11 MB."""


def cache_folder() -> Path:
    """Where records are: ``$XDG_CACHE_HOME/steel-megatron/tokenizers``, by default under ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "steel-megatron" / "tokenizers"


def key_of(*parts: str | bytes) -> str:
    """The key of what follows from these parts, the libraries' versions and the sources of this package.

    Args:
        parts: what decides the record, in a fixed order.

    Returns:
        SHA-256 (hex).
    """
    digest = hashlib.sha256(_versions())
    for part in parts:
        content = part.encode() if isinstance(part, str) else part
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()


@functools.cache
def _versions() -> bytes:
    found: dict[str, str | None] = {}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    for file in sorted(Path(__file__).parent.glob("*.py")):
        found[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
    return orjson.dumps(found)


def recall(key: str) -> tuple[dict[str, Any], str] | None:
    """The record of a key.

    Args:
        key: from :func:`key_of`.

    Returns:
        its facts and its text; None where there is none.
    """
    path = cache_folder() / key
    try:
        content = path.read_bytes()
    except OSError:
        return None
    checksum, _, rest = content.partition(b"\n")
    if checksum != _checksum(key, rest):
        return None
    with suppress(OSError):  # the oldest in use go first
        os.utime(path)
    facts, _, text = rest.partition(b"\n")
    return orjson.loads(facts), text.decode()


def remember(key: str, facts: Mapping[str, Any], text: str = "") -> None:
    """Keep a record for later starts, if that can be done: whoever cannot write goes without.

    Args:
        key: from :func:`key_of`.
        facts: what JSON can say.
        text: a long text that belongs to it.
    """
    folder = cache_folder()
    rest = orjson.dumps(facts) + b"\n" + text.encode()
    with suppress(OSError, DataError):
        # Another process sees all of it or nothing, and the last one wins.
        write_atomically(folder / key, _checksum(key, rest) + b"\n" + rest, DataError)
        _forget_the_oldest(folder)


def _checksum(key: str, rest: bytes) -> bytes:
    return hashlib.sha256(key.encode() + rest).hexdigest().encode()


def _forget_the_oldest(folder: Path) -> None:
    def age(path: Path) -> int:
        return path.stat().st_mtime_ns

    found = sorted((path for path in folder.iterdir() if not path.suffix), key=age)
    for path in found[:-_KEPT]:
        path.unlink(missing_ok=True)


def content_of(files: Iterable[Path]) -> str:
    """SHA-256 (hex) of the names and contents of files; what cannot be read counts as missing.

    Args:
        files: in a fixed order.
    """
    digest = hashlib.sha256()
    for file in files:
        content = None
        with suppress(OSError):
            content = file.read_bytes()
        digest.update(f"{file.name} {None if content is None else len(content)}\n".encode())
        digest.update(content or b"")
    return digest.hexdigest()
