"""What is below a folder, through all levels and links; which of it is data, and what is said of the rest."""

from __future__ import annotations

import fnmatch
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any

from steel_megatron.data.reading.forms import HTML, TEXT, form_of
from steel_megatron.errors import DataError

UNKNOWN, HIDDEN, SPECIAL = "of no known form", "hidden", "no regular files"
_KNOWN_FOLDER = "links to folders that are read anyway"
_METADATA, _CACHE, _CARD = "metadata of a dataset", "caches of a dataset", "cards of a dataset"
_INDEXED = "files of an indexed corpus"
_HIDDEN_NAMES = ("__pycache__",)
_DATASET_FILES = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json")
_STATE = "state.json"
_EXAMPLES = 3

LeftOutPath = tuple[str, str]
"""A path that is not read, and why."""


class LeftOut:
    """Counts what is not read, by reason."""

    def __init__(self) -> None:
        self._seen: set[str] = set()
        self._reasons: dict[str, list[str]] = {}

    def add(self, paths: Iterable[LeftOutPath]) -> None:
        """Count paths; each once."""
        for path, reason in paths:
            if path not in self._seen:
                self._seen.add(path)
                self._reasons.setdefault(reason, []).append(path)

    def forget(self, paths: Iterable[str]) -> None:
        """Count some no longer: another input names them."""
        for path in self._seen.intersection(paths):
            self._seen.discard(path)
            self._reasons = {why: kept for why, of in self._reasons.items() if (kept := [p for p in of if p != path])}

    def as_dict(self) -> dict[str, Any]:
        """How many by reason, with examples, as JSON."""
        return {
            reason: {"count": len(paths), "examples": sorted(paths)[:_EXAMPLES]}
            for reason, paths in sorted(self._reasons.items())
        }


def in_words(left_out: dict[str, Any]) -> str:
    """What :meth:`LeftOut.as_dict` gave, in a line."""
    parts = []
    for reason, found in left_out.items():
        more = ", ..." if found["count"] > len(found["examples"]) else ""
        parts.append(f"{found['count']:,} {reason} ({', '.join(found['examples'])}{more})")
    return "; ".join(parts)


def files_below(folder: str) -> tuple[list[str], list[LeftOutPath]]:
    """All files below a folder, in order, and what is none that is ever read.

    Links to folders are followed, after all folders that are there themselves; a folder is entered once, whatever the
    number of ways to it, so links that lead in a circle end.

    Raises:
        DataError: a folder cannot be read.
    """
    files: list[str] = []
    left_out: list[LeftOutPath] = []
    links: list[str] = []
    entered: set[tuple[int, int]] = set()

    def walk(top: str) -> None:
        waiting = [top]
        while waiting:
            parent = waiting.pop()
            found = os.stat(parent)
            entered.add((found.st_dev, found.st_ino))
            with os.scandir(parent) as entries:
                for entry in entries:
                    if entry.name.startswith(".") or entry.name in _HIDDEN_NAMES:
                        left_out.append((entry.path, HIDDEN))
                    elif entry.is_dir():
                        (links if entry.is_symlink() else waiting).append(entry.path)
                    elif is_input(entry.path):
                        files.append(entry.path)
                    else:
                        left_out.append((entry.path, SPECIAL))

    try:
        walk(folder)
        while links:
            links.sort(reverse=True)
            link = links.pop()
            found = os.stat(link)
            if (found.st_dev, found.st_ino) in entered:
                left_out.append((link, _KNOWN_FOLDER))
            else:
                walk(link)
    except OSError as error:
        raise DataError(f"cannot read folder {error.filename}: {error.strerror}") from error
    return sorted(files), left_out


def is_input(path: str) -> bool:
    """Whether a path is a file, or a link to nothing, which is refused when it is read."""
    return os.path.isfile(path) or not os.path.exists(path)


def below_pattern(pattern: str) -> tuple[str, list[str]]:
    """A pattern with ``**``: what is before the first of them, and the rest in parts."""
    parts = pattern.split("/")
    first = parts.index("**")
    return "/".join(parts[:first]) or ("/" if pattern.startswith("/") else "."), parts[first:]


def matches(path: str, root: str, pattern: Sequence[str]) -> bool:
    """Whether a path below a root, or a folder it is in, matches the parts of a pattern.

    Args:
        path: the path.
        root: the folder that the pattern begins in.
        pattern: the parts between slashes; ``**`` stands for any number of folders.
    """
    parts = os.path.relpath(path, root).split("/")
    return any(_match(parts[:count], pattern) for count in range(1, len(parts) + 1))


def _match(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return _match(parts, pattern[1:]) or (bool(parts) and _match(parts[1:], pattern))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], pattern[0]) and _match(parts[1:], pattern[1:])


def data_of(files: Sequence[str]) -> tuple[list[str], list[LeftOutPath]]:
    """Which files of folders are data, and why the others are not."""
    names = set(files)
    with_rows = {os.path.dirname(path) for path in files if form_of(path) not in (None, TEXT, HTML)}
    states: dict[str, set[str] | None] = {}
    data: list[str] = []
    left_out: list[LeftOutPath] = []
    for path in files:
        reason = _no_data(path, names, with_rows, states)
        if reason is None:
            data.append(path)
        else:
            left_out.append((path, reason))
    return data, left_out


def _no_data(path: str, names: set[str], with_rows: set[str], states: dict[str, set[str] | None]) -> str | None:
    folder, name = os.path.split(path)
    if name in _DATASET_FILES or (name == _STATE and os.path.join(folder, _DATASET_FILES[0]) in names):
        return _METADATA
    if name.endswith(".arrow"):
        if folder not in states:
            states[folder] = (
                _saved_files(os.path.join(folder, _STATE)) if os.path.join(folder, _STATE) in names else None
            )
        saved = states[folder]
        return None if saved is None or name in saved else _CACHE
    if name.lower() == "readme.md" and any(other == folder or other.startswith(f"{folder}/") for other in with_rows):
        return _CARD
    stem = path.removesuffix(".rows.npy").rpartition(".")[0] if not path.endswith(".rows.npy") else path[:-9]
    if f"{stem}.idx" in names and f"{stem}.bin" in names:
        return _INDEXED
    return UNKNOWN if form_of(path) is None else None


def _saved_files(state: str) -> set[str] | None:
    """The files that ``datasets`` says a saved dataset has; None if it does not say."""
    with suppress(OSError, ValueError, KeyError, TypeError), open(state, encoding="utf-8") as file:
        return {entry["filename"] for entry in json.load(file)["_data_files"]}
    return None


def splits_of(files: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    """The folders of ``DatasetDict.save_to_disk`` among the folders of files, with the names of their splits."""
    for path in files:
        folder, name = os.path.split(path)
        if name == "dataset_dict.json":
            with suppress(OSError, ValueError, KeyError, TypeError), open(path, encoding="utf-8") as file:
                yield folder, [str(split) for split in json.load(file)["splits"]]
