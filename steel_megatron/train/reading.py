"""Data workers: processes that read ahead. Imports nothing of megatron-core, which would take each of them seconds."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from torch.utils.data import DataLoader, Dataset

from steel_megatron.config import RunConfig
from steel_megatron.data.ledger.loader import LedgerSamples, SampleArrays, micro_batches, read_samples
from steel_megatron.errors import SteelError, TrainingError
from steel_megatron.parallel.topology import Topology


def read_ahead(
    stream: LedgerSamples, run: RunConfig, topology: Topology, consumed_samples: int, end: int
) -> Iterator[list[SampleArrays]]:
    """The arrays of all steps from a position on, read by workers if the run has some.

    Args:
        stream: the samples to train on.
        run: the run's settings.
        topology: the process groups.
        consumed_samples: the samples before the first step.
        end: the samples that the run will have consumed in the end.

    Raises:
        SteelError: while iterating, if a sample cannot be read.
        TrainingError: while iterating, if a worker has died.
    """
    workers = run.data.num_workers
    steps = DataLoader(
        _Steps(stream, run, topology),
        batch_size=None,
        sampler=range(consumed_samples, end, run.training.global_batch_size),
        num_workers=workers,
        multiprocessing_context="spawn" if workers else None,
        collate_fn=_as_they_are,
        generator=torch.Generator(),  # an iterator draws a seed for its workers, and must not from the run's own states
    )
    with _without_main_script(), _without_child_signals():
        return _checked(iter(steps), workers)


def _checked(steps: Iterator[list[SampleArrays] | SteelError], workers: int) -> Iterator[list[SampleArrays]]:
    """The arrays of all steps; raises what a worker met, and says which worker died."""
    while True:
        try:
            arrays = next(steps)
        except StopIteration:
            return
        except RuntimeError as error:
            died = [worker for worker in getattr(steps, "_workers", ()) if worker.exitcode]
            if not died:
                raise
            raise TrainingError(
                f"data worker {died[0].pid} of data.num_workers = {workers} {_ending(died[0].exitcode)}; if memory ran "
                "out, lower data.num_workers (0: no workers); the same command resumes from the newest checkpoint"
            ) from error
        if isinstance(arrays, SteelError):
            raise arrays
        yield arrays


def _ending(exit_code: int) -> str:
    return f"was killed by {signal.Signals(-exit_code).name}" if exit_code < 0 else f"ended with exit code {exit_code}"


class _Steps(Dataset[list[SampleArrays] | SteelError]):
    """What this process reads for the steps of a run, by the number of samples consumed before.

    A worker's SteelError is returned: torch would raise it with the worker's traceback as its message.
    """

    def __init__(self, stream: LedgerSamples, run: RunConfig, topology: Topology) -> None:
        self._stream, self._with_starts = stream, run.data.reset_at_eod
        self._sizes = run.training.global_batch_size, run.training.micro_batch_size
        self._place = topology.data_parallel_rank, topology.data_parallel_size

    def __getitem__(self, consumed_samples: int) -> list[SampleArrays] | SteelError:
        shares = micro_batches(consumed_samples, *self._sizes, *self._place)
        try:
            return [read_samples(self._stream, numbers, self._with_starts) for numbers in shares]
        except SteelError as error:
            return error


@contextmanager
def _without_main_script() -> Iterator[None]:
    """Processes that are started meanwhile do not run the main script again, which may have no ``__main__`` guard.

    They need nothing from it: they receive only the library's own objects.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


@contextmanager
def _without_child_signals() -> Iterator[None]:
    """Keep the handler of SIGCHLD. torch sets its own, which raises a dead worker's error anywhere in the main thread.

    A dead worker is noticed when its batch is due.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # torch sets none here
        return
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, handler)


def _as_they_are(arrays: list[SampleArrays] | SteelError) -> list[SampleArrays] | SteelError:
    """In place of torch's own collation, which would make tensors in a worker."""
    return arrays
