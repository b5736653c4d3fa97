"""A cleaning job: its units of input, which are some small files, or part of the chunks of a large one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from steel_megatron.config import BadRowPolicy
from steel_megatron.data.cleaning.recipe import Recipe
from steel_megatron.data.reading.documents import Document, SkippedRow, documents_of
from steel_megatron.data.reading.formats import read_chunks
from steel_megatron.data.reading.sources import get_source
from steel_megatron.jobs import step
from steel_megatron.jobs.step import JobStep


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
    """All that a step needs to know; sent to every worker."""

    recipe: Recipe
    units: tuple[Unit, ...]
    folder: Path
    """Where the job works; the result is its sub-folder ``output``."""
    text_key: str = "text"
    on_bad_row: BadRowPolicy = "stop"
    left_out: dict[str, Any] = field(default_factory=dict)
    """What the inputs hold in addition to what is read."""

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

    def documents(self, unit: Unit, skipped: list[SkippedRow]) -> Iterator[Document]:
        """The documents of a unit; rows that gave none since the document before are in ``skipped``."""
        reader = get_source(unit.source, self.text_key)

        def on_bytes(size: int) -> None:  # every part of a file reads all of it
            step.on_bytes(size / unit.parts)

        for path in unit.files:
            for number, chunk in enumerate(read_chunks(path, columns=reader.columns, on_bytes=on_bytes)):
                if number % unit.parts == unit.part:
                    yield from documents_of(chunk, reader, self.on_bad_row, skipped.append)


@dataclass(frozen=True)
class CleaningStep(JobStep):
    """A step of a cleaning job; its units are those of the input, unless it says otherwise."""

    job: Job
    job_name = "clean"

    @property
    def folder(self) -> Path:
        return self.job.folder

    @property
    def count(self) -> int:
        return len(self.job.units)
