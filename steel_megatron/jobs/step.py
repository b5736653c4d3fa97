"""A step of a job: units of work that any process can do.

Task ``t`` of ``n`` does the units ``t``, ``t + n``, ``t + 2n``, ... What a unit gives does not depend on the number of
tasks. A unit's marker is written last: where it exists, the unit is done and its files are on disk.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import ClassVar

from steel_megatron.errors import DataError, SteelError
from steel_megatron.files import disk_errors, write_atomically


def nobody(size: float) -> None:
    """Is called with a number of bytes, and does nothing."""


on_bytes: Callable[[float], None] = nobody
"""Called with the bytes of the input, as stored, that this process has read; whoever shows progress sets it."""


@contextmanager
def counted_by(advance: Callable[[float], None]) -> Iterator[None]:
    """Count the bytes that this process reads within the block."""
    global on_bytes
    on_bytes = advance
    try:
        yield
    finally:
        on_bytes = nobody


class JobStep(ABC):
    """A step of a job. An instance is pickled and sent to every process that works on it."""

    job_name: ClassVar[str]
    """Name of the kind of job, such as ``clean``."""
    name: ClassVar[str]

    @property
    @abstractmethod
    def folder(self) -> Path:
        """The job's folder: markers, failures, logs and what the units write."""

    @property
    @abstractmethod
    def count(self) -> int:
        """Number of units."""

    @abstractmethod
    def work(self, number: int) -> None:
        """Do a unit, its marker last."""

    def work_on(self, numbers: Sequence[int]) -> None:
        """Do some units, in this order."""
        for number in numbers:
            self.work(number)

    def bytes_to_read(self) -> int | None:
        """Bytes of the input that the units left to do will read; None if that does not measure the progress."""
        return None

    def memory(self) -> int:
        """Bytes of memory that a unit needs, where that depends on the input; otherwise 0."""
        return 0

    def missing(self, rank: int = 0, world_size: int = 1) -> list[int]:
        """The units of a task that are not done."""
        units = range(rank, self.count, world_size)
        return [number for number in units if not marker(self.folder, self.name, number).exists()]

    def mark(self, number: int, content: bytes = b"{}") -> None:
        """Record that a unit is done."""
        write_atomically(marker(self.folder, self.name, number), content, DataError)

    def __call__(self, data: object = None, rank: int = 0, world_size: int = 1) -> None:
        """Do the units of a task; the signature is datatrove's.

        Args:
            data: what an earlier step of datatrove's pipeline passes on; not used.
            rank: number of the task, from 0.
            world_size: number of tasks.

        Raises:
            SteelError: a unit failed; the job's folder has the message for the process that started the job.
        """
        try:
            with disk_errors("write", self.folder, DataError):
                self.work_on(self.missing(rank, world_size))
        except SteelError as error:
            with suppress(SteelError):  # a full disk: the log has it
                report = json.dumps({"kind": type(error).__name__, "message": str(error)}).encode()
                write_atomically(self.folder / "failures" / f"{self.name}-{rank:06d}.json", report, DataError)
            raise

    @property
    def logs(self) -> Path:
        """The folder of the logs of tasks on other machines."""
        return self.folder / "logs"

    def _failures(self) -> list[Path]:
        return sorted((self.folder / "failures").glob(f"{self.name}-*.json"))

    def forget_failures(self) -> None:
        """Remove what the failed tasks of an earlier call left."""
        for old in self._failures():
            old.unlink(missing_ok=True)

    def raise_first_failure(self) -> None:
        """Raise the message of the first task that failed, as a DataError; return if none did."""
        for path in self._failures():
            raise DataError(json.loads(path.read_bytes())["message"])


def marker(folder: Path, step: str, unit: int) -> Path:
    """The file that records that a unit is done; it may hold the unit's counts.

    Args:
        folder: the job's folder.
        step: name of the step.
        unit: number of the unit, from 0.
    """
    return folder / "done" / step / f"{unit:06d}.json"
