"""Benchmarks in local folders, in the layouts in which they are published.

A split of a subject is one file, or several parquet shards. These are found below the folder, with ``val`` for
example, in any of the forms ``val/SUBJECT_val.csv`` (C-Eval, MMLU), ``val/SUBJECT.csv`` (CMMLU),
``SUBJECT/val-00000-of-00001.parquet`` (the Hub's) and, for benchmarks without subjects, ``val.jsonl`` (GSM8K).
"""

from __future__ import annotations

import csv
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from steel_megatron.errors import DataError

SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
LETTERS = "ABCDEFGHIJ"
_SYNONYMS = {"val": ("val", "validation"), "validation": ("validation", "val")}
_WHOLE = (None, "main", "default")
"""Names of configurations of benchmarks that have no subjects."""
Row = dict[str, Any]


def find_split(roots: Sequence[Path], subject: str | None, split: str) -> list[Path]:
    """The files of a split.

    Args:
        roots: folders to look into; the first one that has any counts.
        subject: as files name it; None, ``main`` or ``default`` where there are no subjects.
        split: such as ``test``; ``val`` and ``validation`` are the same.

    Raises:
        DataError: there is none, or there are several that could be it.
    """
    for name in _SYNONYMS.get(split, (split,)):
        patterns = [] if subject is None else [f"{name}/{subject}_{name}", f"{name}/{subject}", f"{subject}_{name}"]
        patterns += [] if subject is None else [f"{subject}/{name}", f"{subject}/{name}-*"]
        if subject in _WHOLE:
            patterns += [name, f"{name}-*", f"*_{name}"]
        for root in roots:
            found = [path for pattern in patterns for path in sorted(root.glob(pattern + ".*")) if _is_table(path)]
            groups = {path.parent / path.name.split("-0")[0] for path in found}
            if len({*groups}) > 1:
                raise DataError(
                    f"{root} has several files for the split {split} of {subject or 'the task'}: "
                    f"{', '.join(str(path.relative_to(root)) for path in found)}; keep one of them"
                )
            if found:
                return found
    wanted = "the task" if subject in _WHOLE else f"subject {subject}"
    example = f"{split}.jsonl" if subject in _WHOLE else f"{split}/{subject}.csv"
    raise DataError(
        f"there is no split {split} of {wanted} in {' or '.join(map(str, roots))}; expected is a file such as {example}"
    )


def _is_table(path: Path) -> bool:
    return path.suffix in SUFFIXES and path.is_file()


def read_rows(paths: Sequence[Path], columns: Collection[str]) -> list[Row]:
    """The rows of a split, checked to have columns and values.

    Options in columns ``A`` to ``D`` become the list ``choices`` where that is wanted, and the answer's letter its
    number; a CSV file without a header is read as MMLU's: question, options, answer.

    Args:
        paths: the files.
        columns: that every row must have.

    Raises:
        DataError: a file cannot be read, is empty, or lacks a column or a value.
    """
    rows: list[Row] = []
    for path in paths:
        rows += [_with_choices(row, columns) for row in _read(path, columns)]
    if not rows:
        raise DataError(f"{paths[0]} has no rows")
    for number, row in enumerate(rows, start=1):
        for column in sorted(columns):
            if column not in row:
                there = ", ".join(row) or "none"
                raise DataError(f"{paths[0]}: column {column!r} is missing (row {number} has: {there})")
            if row[column] is None:
                raise DataError(f"{paths[0]}: row {number} has no value for {column!r}")
    return rows


def _read(path: Path, columns: Collection[str]) -> list[Row]:
    try:
        if path.suffix in (".csv", ".tsv"):
            return _read_csv(path, columns)
        if path.suffix == ".parquet":
            import pyarrow.parquet

            return pyarrow.parquet.read_table(path).to_pylist()
        text = path.read_text(encoding="utf-8-sig")
        rows = [json.loads(line) for line in text.splitlines() if line.strip()] if path.suffix == ".jsonl" else None
        rows = json.loads(text) if rows is None else rows
    except DataError:
        raise
    except (OSError, ValueError, RecursionError, csv.Error) as error:  # pyarrow's are ValueErrors and OSErrors
        raise DataError(f"{path} cannot be read: {error}") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path} must hold objects, one a line in .jsonl, in an array in .json")
    return rows


def _read_csv(path: Path, columns: Collection[str]) -> list[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = list(csv.reader(file, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True))
    if not lines:
        return []
    header = lines.pop(0)
    if "choices" in columns and "question" not in header:  # MMLU's have none
        lines.insert(0, header)
        header = ["question", *LETTERS[: len(header) - 2], "answer"]
    for number, line in enumerate(lines, start=1):
        if len(line) != len(header):
            raise DataError(f"{path}: row {number} has {len(line)} values for {len(header)} columns {header}")
    return [{name: value for name, value in zip(header, line, strict=True) if name} for line in lines]


def _with_choices(row: Row, columns: Collection[str]) -> Row:
    if "choices" not in columns or "choices" in row or "A" not in row:
        return row
    options = [letter for letter in LETTERS if letter in row]
    answer = row.get("answer")
    number = options.index(answer) if answer in options else answer
    return {name: value for name, value in row.items() if name not in options} | {
        "choices": [row[letter] for letter in options],
        "answer": number,
    }
