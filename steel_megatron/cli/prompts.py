"""Prompts of ``generate``: from a file, or typed."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from steel_megatron.errors import ConfigError, DataError


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file: one a line, or in ``.jsonl`` objects with a ``prompt``; empty lines are passed over.

    Args:
        path: the file, in UTF-8.

    Raises:
        DataError: it cannot be read, holds no prompt, or a line is something else.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"the prompts {path} cannot be read: {error}") from None
    prompts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if path.suffix != ".jsonl":
            prompts.append(line)
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            raise DataError(f'{path}: line {number} must be an object with the text of a "prompt"')
        prompts.append(row["prompt"])
    if not prompts:
        raise DataError(f"{path} holds no prompt")
    return prompts


def turns_of_stdin() -> Iterator[str]:
    """The lines of stdin; at a terminal, a mark asks for each.

    Raises:
        ConfigError: a line is not in the terminal's encoding.
    """
    if sys.stdin is None:
        return
    while True:
        if sys.stdin.isatty():
            sys.stderr.write("> ")
            sys.stderr.flush()
        try:
            line = sys.stdin.readline()
        except UnicodeDecodeError as error:
            raise ConfigError(f"a line of stdin is no text: {error}") from None
        if not line:
            return
        yield line.rstrip("\n")
