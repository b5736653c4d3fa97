"""Logging that knows ranks, and progress that knows terminals.

Rank 0 speaks; the other ranks speak only of warnings and errors. On a terminal, progress is a rich bar that
stays on one line; in a job log or a pipe it is a plain line every few seconds, so that a log can be read
and searched.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from steel_megatron.errors import ExitCode, LostRankError, SteelError
from steel_megatron.streams import StdoutError, complain, standard_streams

ROOT_LOGGER = "steel_megatron"


def launched_rank() -> int:
    """The rank this process was launched with (torchrun's or Slurm's variable), 0 when launched alone."""
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    return int(rank) if rank.isdecimal() else 0  # errors in it are reported when the launch is read


def setup_logging(level: int = logging.INFO) -> None:
    """Send the library's records to stderr: all of them on rank 0, warnings and errors on the others."""
    logger = logging.getLogger(ROOT_LOGGER)
    rank = launched_rank()
    logger.setLevel(level if rank == 0 else max(level, logging.WARNING))
    handler = _StderrHandler()
    prefix = "" if rank == 0 else f"[rank {rank}] "
    handler.setFormatter(logging.Formatter(f"{prefix}%(message)s"))
    logger.handlers[:] = [handler]
    logger.propagate = False


class _StderrHandler(logging.Handler):
    """Writes to whatever sys.stderr is at the moment: rich replaces it while a bar is drawn."""

    def emit(self, record: logging.LogRecord) -> None:
        complain(self.format(record))


def exit_code(command: Callable[[], None]) -> int:
    """Run a command with logging set up; what a user can fix becomes one line on stderr, without a traceback.

    Returns:
        FINISHED, WRONG_INPUT after a SteelError (LOST or what the lost process ended with, if one is lost) or if stdout
        cannot be written, INTERRUPTED after Ctrl-C, or NO_READER when nobody reads the output any further.
    """
    with standard_streams():
        setup_logging()
        try:
            _run(command)
        except SteelError as error:
            return report_error(error)
        except KeyboardInterrupt:
            complain("stopped")
            return ExitCode.INTERRUPTED
        except StdoutError as error:
            if error.code != ExitCode.NO_READER:
                complain(f"error: {error}")
            return error.code
        return ExitCode.FINISHED


def _run(command: Callable[[], None]) -> None:
    try:
        command()
    except SystemExit:  # --help
        sys.stdout.flush()
        raise
    sys.stdout.flush()


def report_error(error: SteelError) -> int:
    """Write an error as one line to stderr; returns the exit code that it stands for."""
    rank = launched_rank()
    prefix = f"[rank {rank}] " if rank else ""
    complain(f"{prefix}error: {error}")
    return error.code if isinstance(error, LostRankError) else ExitCode.WRONG_INPUT


def get_logger(name: str) -> logging.Logger:
    """The logger of a module: ``get_logger(__name__)``."""
    return logging.getLogger(name)


class Progress(Protocol):
    """What :func:`progress` hands out."""

    def advance(self, amount: float = 1, note: str = "") -> None:
        """Count ``amount`` more units as done; ``note`` replaces the text behind the bar."""
        ...


class _PlainProgress:
    """One line every ``interval`` seconds, and one at the end."""

    def __init__(self, description: str, total: float | None, unit: str, interval: float = 5.0) -> None:
        self.description, self.total, self.unit, self.interval = description, total, unit, interval
        self.done, self.note = 0.0, ""
        self.started = self.last_line = time.monotonic()

    def advance(self, amount: float = 1, note: str = "") -> None:
        self.done += amount
        self.note = note or self.note
        if time.monotonic() - self.last_line >= self.interval:
            self.write()

    def write(self) -> None:
        self.last_line = time.monotonic()
        rate = self.done / max(self.last_line - self.started, 1e-9)
        # Bytes are shown in millions; whatever is counted, no more digits than say something.
        size, unit = (1e6, "MB") if self.unit == "bytes" else (1.0, self.unit)
        digits = 1 if unit == "MB" else 0
        of_total = f" of {self.total / size:,.{digits}f}" if self.total is not None else ""
        note = f"  {self.note}" if self.note else ""
        get_logger(ROOT_LOGGER).info(
            f"{self.description}: {self.done / size:,.{digits}f}{of_total} {unit} "
            f"({rate / size:,.{0 if rate / size >= 100 else 1}f} {unit}/s){note}"
        )


class _RichProgress:
    """The same counts, drawn by rich."""

    def __init__(self, bar: object, task: object) -> None:
        self._bar, self._task = bar, task

    def advance(self, amount: float = 1, note: str = "") -> None:
        fields = {"note": note} if note else {}
        self._bar.update(self._task, advance=amount, **fields)  # type: ignore[attr-defined]


class _Silent:
    def advance(self, amount: float = 1, note: str = "") -> None:
        pass


@contextmanager
def progress(
    description: str, total: float | None = None, unit: str = "it", *, plain: bool = True
) -> Iterator[Progress]:
    """Show how far something has come, on rank 0 only.

    Args:
        description: what is being done, at the front of the line.
        total: how many units there are; None when nobody knows yet.
        unit: the name of one unit, used in the rate.
        plain: whether to write plain lines where there is no terminal; not where the work logs lines of its own.
    """
    terminal = sys.stderr.isatty()
    if launched_rank() != 0 or not (terminal or plain):
        yield _Silent()
    elif terminal:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar

        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Bar(*columns, console=Console(stderr=True)) as bar:
            yield _RichProgress(bar, bar.add_task(description, total=total, unit=unit, note=""))
    else:
        lines = _PlainProgress(description, total, unit)
        yield lines
        lines.write()
