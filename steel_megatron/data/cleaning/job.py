"""A cleaning job: its units of input, and what all its stages have in common.

The input is cut into units: some small files, or part of the chunks of a large one. A task does the units task,
task + tasks, ...; what a unit gives does not depend on the tasks. A unit's marker is written last and says that it is
done.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from steel_megatron.config import BadRowPolicy
from steel_megatron.data.cleaning.recipe import Recipe
from steel_megatron.data.reading.documents import Document, SkippedRow, documents_of
from steel_megatron.data.reading.formats import read_chunks
from steel_megatron.data.reading.sources import get_source
from steel_megatron.errors import DataError, SteelError
from steel_megatron.files import disk_errors, write_atomically


def nobody(size: float) -> None:
    """Is told, and does nothing."""


on_bytes: Callable[[float], None] = nobody
"""Told how many more bytes of the input, as stored, this process has read; whoever shows progress sets it."""


@dataclass(frozen=True)
class Unit:
    """A piece of the input that is done as a whole: some files, or every ``parts``-th chunk of one from ``part`` on."""

    files: dict[str, int]
    """Path and number in the input of each file."""
    source: str
    """Name of a source."""
    size: int
    """About how many bytes of the files, as stored, are in it."""
    part: int = 0
    parts: int = 1


@dataclass(frozen=True)
class Job:
    """All that a stage needs to know; sent to every worker."""

    recipe: Recipe
    units: tuple[Unit, ...]
    folder: Path
    """Where the job works; the result is its sub-folder ``output``."""
    text_key: str = "text"
    on_bad_row: BadRowPolicy = "stop"

    @property
    def output(self) -> Path:
        """The folder that becomes the result."""
        return self.folder / "output"

    @property
    def language_model(self) -> Path | None:
        """The folder of the model that the perplexity operator uses."""
        operator = self.recipe.perplexity
        if operator is None:
            return None
        return self.output / "language_model" if operator.model == "train" else Path(operator.model)

    @property
    def deduplicates(self) -> bool:
        """Whether documents are compared with each other."""
        return any(self.recipe.deduplicators())

    def marker(self, stage: str, unit: int) -> Path:
        """The file that says that a unit is done; it may hold the unit's counts."""
        return self.folder / "done" / stage / f"{unit:06d}.json"

    def documents(self, unit: Unit, skipped: list[SkippedRow]) -> Iterator[Document]:
        """The documents of a unit; rows that gave none since the document before are in ``skipped``."""
        reader = get_source(unit.source, self.text_key)

        def tell(size: int) -> None:  # every part of a file reads all of it
            on_bytes(size / unit.parts)

        for path in unit.files:
            for number, chunk in enumerate(read_chunks(path, columns=reader.columns, on_bytes=tell)):
                if number % unit.parts == unit.part:
                    yield from documents_of(chunk, reader, self.on_bad_row, skipped.append)


@dataclass(frozen=True)
class Stage:
    """A stage of a job. Tasks do its units; what goes wrong is left in the job's folder for whoever started it."""

    job: Job
    name: ClassVar[str]

    @property
    def count(self) -> int:
        """How many units it has."""
        return len(self.job.units)

    def bytes_to_read(self) -> int | None:
        """Bytes of the input that the units left to do will read; None if that is not what a stage is measured by."""
        return None

    def memory(self) -> int:
        """Bytes of memory that a unit needs, where that depends on the input; otherwise 0."""
        return 0

    def work(self, number: int) -> None:
        """Do a unit, its marker last."""
        raise NotImplementedError

    def __call__(self, data: object = None, rank: int = 0, world_size: int = 1) -> None:
        """Do the units of a task; what datatrove calls."""
        try:
            for number in range(rank, self.count, world_size):
                if not self.job.marker(self.name, number).exists():
                    with disk_errors("write", self.job.folder, DataError):
                        self.work(number)
        except SteelError as error:
            with suppress(SteelError):  # a full disk: the log has it
                report = json.dumps({"kind": type(error).__name__, "message": str(error)}).encode()
                write_atomically(self.job.folder / "failures" / f"{self.name}-{rank:06d}.json", report, DataError)
            raise

    def mark(self, number: int, content: bytes = b"{}") -> None:
        """Say that a unit is done."""
        write_atomically(self.job.marker(self.name, number), content, DataError)
