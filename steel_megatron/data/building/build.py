"""``sft build``: parts of published sets -> one file of conversations, in a wanted ratio of languages."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, get_args

import numpy as np
import yaml

from steel_megatron.config import BadRowPolicy
from steel_megatron.data.building.language import Language, language_of
from steel_megatron.data.building.questions import NOT_CHOSEN, question_of
from steel_megatron.data.building.recipe import Part, Recipe
from steel_megatron.data.reading.chunks import BadRow, NoDocument
from steel_megatron.data.reading.conversations import Chat, Turn
from steel_megatron.data.reading.documents import SkippedRow, check_unicode, converted, unused_columns
from steel_megatron.data.reading.formats import read_chunks
from steel_megatron.data.reading.inputs import find_inputs
from steel_megatron.data.reading.sources import Dialogue, Source, get_source
from steel_megatron.errors import ConfigError, DataError
from steel_megatron.files import disk_errors, exclusive_lock, remove, sync_folder, with_suffix, write_atomically
from steel_megatron.log import get_logger

_log = get_logger(__name__)
LANGUAGES: tuple[Language, ...] = get_args(Language)
NOT_EXPLAINED = "no explanation"
EXPECTED = (NOT_CHOSEN, NOT_EXPLAINED, "empty")
"""Reasons that are no fault of a row: it is what the recipe leaves out."""
_FIELD = re.compile(r"\{\{\s*(\w+)\s*\}\}")


@dataclass
class Counts:
    """What became of the rows of a part."""

    rows: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    """Rows, or conversations of rows, by reason."""
    made: Counter[str] = field(default_factory=Counter)
    """Conversations by language, before the choice."""
    written: Counter[str] = field(default_factory=Counter)
    """Those of them that are in the result."""

    def as_dict(self) -> dict[str, Any]:
        """For the report."""
        return {name: dict(own) if isinstance(own, Counter) else own for name, own in vars(self).items()}


@dataclass
class Report:
    """What became of all rows."""

    parts: dict[str, Counts]
    skipped: list[SkippedRow] = field(default_factory=list)
    """Bad rows."""

    @property
    def written(self) -> Counter[str]:
        """Conversations in the result by language."""
        return sum((counts.written for counts in self.parts.values()), Counter())

    def as_yaml(self, recipe: Recipe) -> str:
        """All of it, for a file."""
        skipped = [{"file": one.source, "row": one.row, "reason": one.reason} for one in self.skipped]
        parts = {name: counts.as_dict() for name, counts in self.parts.items()}
        content = {"written": dict(self.written), "shares": dict(recipe.shares), "parts": parts, "skipped": skipped}
        return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)

    def summary(self, output: Path) -> str:
        """A line for each part, and one of the result, for people."""
        lines = []
        for name, counts in self.parts.items():
            left_out = "".join(f", {number:,} left out ({reason})" for reason, number in counts.left_out.items())
            lines.append(f"{name}: {counts.rows:,} rows, {counts.written.total():,} conversations{left_out}")
        total = self.written.total()
        by_language = ", ".join(
            f"{name} {number:,} ({number / max(total, 1):.1%})" for name, number in self.written.items()
        )
        return "\n".join([*lines, f"{output}: {total:,} conversations: {by_language}"])


def build(recipe: Recipe, output: Path, on_bad_row: BadRowPolicy = "stop", overwrite: bool = False) -> Report:
    """Write the conversations of a recipe as JSON lines, and a report next to them (``OUTPUT.report.yaml``).

    The same inputs and recipe give the same bytes. Memory holds one chunk of a file and a byte for each conversation.

    Args:
        recipe: the recipe, with inputs for each part.
        output: the file to write, ``.jsonl``.
        on_bad_row: stop at a broken row, or skip it and list it in the report.
        overwrite: replace an existing file.

    Raises:
        ConfigError: the output is no ``.jsonl`` file, or is there already.
        DataError: an input cannot be read, a bad row under ``stop``, or nothing is left.
    """
    if output.suffix != ".jsonl":
        raise ConfigError(f"output is {output}; it must end in .jsonl")
    if output.exists() and not overwrite:
        raise ConfigError(f"{output} is there already; choose another output, or overwrite")
    spooled = with_suffix(output, ".partial")
    with ExitStack() as stack:
        stack.enter_context(disk_errors("write", output, DataError))
        output.parent.mkdir(parents=True, exist_ok=True)
        stack.enter_context(exclusive_lock(output, DataError))
        stack.callback(remove, spooled)
        with spooled.open("wb") as file:
            report, languages = _collect(recipe, output, file, on_bad_row)
        _write(spooled, output, _chosen(recipe, np.frombuffer(languages, dtype=np.uint8), report))
        write_atomically(output.with_suffix(".report.yaml"), report.as_yaml(recipe).encode(), DataError)
    return report


def _collect(recipe: Recipe, output: Path, file: BinaryIO, on_bad_row: BadRowPolicy) -> tuple[Report, bytearray]:
    """Write all conversations; the report so far, and each one's language."""
    report, languages = Report({name: Counts() for name in recipe.parts}), bytearray()
    for name, part in recipe.parts.items():
        counts = report.parts[name]
        for chats in _rows(name, part, output, on_bad_row, partial(_skip, report, counts)):
            counts.rows += 1
            for chat in chats:
                language = language_of(chat.turns)
                if part.language not in (None, language):
                    counts.left_out[f"language {language}"] += 1
                    continue
                counts.made[language] += part.copies
                languages += bytes([LANGUAGES.index(language)]) * part.copies
                file.write(_line(chat, name) * part.copies)
    if not languages:
        raise DataError(f"no conversation is left for {output}: {report.summary(output)}")
    return report, languages


def _skip(report: Report, counts: Counts, row: SkippedRow) -> None:
    counts.rows += 1
    counts.left_out[row.reason if row.reason in EXPECTED else "bad row"] += 1
    if row.reason not in EXPECTED:
        report.skipped.append(replace(row, raw=""))


def _rows(
    name: str, part: Part, output: Path, on_bad_row: BadRowPolicy, skip: Callable[[SkippedRow], None]
) -> Iterator[list[Chat]]:
    """What the rows of a part's files become: one conversation as a rule."""
    for found in find_inputs(part.inputs, own=lambda path: path.absolute() == output.absolute()).files:
        source = get_source("chat" if found.source == "text" else found.source)
        if not part.questions and (unused := unused_columns(found.path, source)):
            _log.warning(f"{found.path} of {name}: not read are the columns {', '.join(unused)}")
        for chunk in read_chunks(found.path):
            for _, chats in converted(chunk, partial(_chats, part, source), on_bad_row, skip):
                yield chats


def _chats(part: Part, source: Source, value: object) -> list[Chat]:
    """The conversations of a row.

    Raises:
        BadRow: it is no conversation, or no question.
        NoDocument: it is a question of another kind, or not explained.
    """
    if part.questions is None:
        dialogue = source.text_of(value)
        if not isinstance(dialogue, Dialogue) or dialogue.chat is None:
            raise BadRow("the row is a text, not a conversation")
        chats = [dialogue.chat]
    else:
        if not isinstance(value, dict):
            raise BadRow(f"a JSON {type(value).__name__} where an object was expected")
        question = question_of(value)
        ways = [way for way in (False, True) if part.questions in ("both", "explained" if way else "letter")]
        if not question.explanation:
            ways = [way for way in ways if not way]
        if not ways:
            raise NoDocument(NOT_EXPLAINED)
        chats = [question.chat(explained) for explained in ways]
    chats = [Chat(_filled(chat.turns, part.fill), _filled(chat.rejected, part.fill)) for chat in chats]
    for turn in (turn for chat in chats for turn in (*chat.turns, *chat.rejected)):
        check_unicode(turn.content)
    return chats


def _filled(turns: Sequence[Turn], values: Mapping[str, str]) -> tuple[Turn, ...]:
    """Turns with the values in place of ``{{NAME}}``, where there are any."""

    def value_of(found: re.Match[str]) -> str:
        if found[1] not in values:
            raise BadRow(f"there is no value for {found[0]} among fill: {', '.join(values)}")
        return values[found[1]]

    if not values:
        return tuple(turns)
    return tuple(Turn(turn.role, _FIELD.sub(value_of, turn.content)) for turn in turns)


def _line(chat: Chat, part: str) -> bytes:
    """A conversation, or a pair, as a row that ``sft prepare`` reads."""

    def messages(turns: Sequence[Turn]) -> list[dict[str, str]]:
        return [{"role": turn.role, "content": turn.content} for turn in turns]

    row: dict[str, Any] = (
        {"chosen": messages(chat.turns), "rejected": messages(chat.rejected)}
        if chat.rejected
        else {"messages": messages(chat.turns)}
    )
    return json.dumps({**row, "part": part}, ensure_ascii=False).encode() + b"\n"


def _chosen(recipe: Recipe, languages: np.ndarray, report: Report) -> np.ndarray:
    """Which conversations are in the result: as many as the shares of languages allow without repeating any.

    Args:
        recipe: the recipe.
        languages: of each conversation, its number in :data:`LANGUAGES`, uint8 [conversations].
        report: gets the counts.

    Raises:
        DataError: there is none of a language that is to have a share.
    """
    chosen = np.ones(len(languages), dtype=bool)
    if recipe.shares:
        there = {name: int((languages == number).sum()) for number, name in enumerate(LANGUAGES)}
        shares = {name: share for name, share in recipe.shares.items() if share}
        if missing := [name for name in shares if not there[name]]:
            raise DataError(f"shares gives {missing[0]} {shares[missing[0]]:g}, but no conversation is in it")
        total = min(there[name] / share for name, share in shares.items())
        random = np.random.default_rng(recipe.seed)
        for number, name in enumerate(LANGUAGES):
            wanted = min(there[name], round(total * shares.get(name, 0.0)))
            own = np.flatnonzero(languages == number)
            chosen[random.permutation(own)[wanted:]] = False
    begin = 0
    for counts in report.parts.values():
        end = begin + counts.made.total()
        for number, name in enumerate(LANGUAGES):
            written = int((chosen[begin:end] & (languages[begin:end] == number)).sum())
            counts.written[name] = written
            if left := counts.made[name] - written:
                counts.left_out[f"share of {name}"] = left
        counts.written = +counts.written
        begin = end
    return chosen


def _write(spooled: Path, output: Path, chosen: np.ndarray) -> None:
    """Give the chosen lines their final name."""
    if not chosen.all():
        sifted = with_suffix(output, ".sifted")
        with spooled.open("rb") as lines, sifted.open("wb") as file:
            file.writelines(line for line, wanted in zip(lines, chosen.tolist(), strict=True) if wanted)
        sifted.replace(spooled)
    with spooled.open("rb+") as file:
        os.fsync(file.fileno())
    spooled.replace(output)
    sync_folder(output.parent)
