"""What processes that read ahead do; it imports nothing of megatron-core, which would take each of them seconds."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import numpy as np
from torch.utils.data import DataLoader, Dataset

from steel_megatron.config import RunConfig
from steel_megatron.data.ledger.loader import LedgerSamples, micro_batches, read_samples
from steel_megatron.parallel.topology import Topology

Arrays = tuple[np.ndarray, np.ndarray | None]
"""Token ids and, where documents are kept apart, the beginnings of their documents: int64 [B, T + 1] both."""


def read_ahead(
    stream: LedgerSamples, run: RunConfig, topology: Topology, consumed_samples: int, end: int
) -> Iterator[list[Arrays]]:
    """The arrays of all steps from a position on, read by workers if the run has some.

    Args:
        stream: the samples to train on.
        run: the run's settings.
        topology: the process groups.
        consumed_samples: the samples before the first step.
        end: the samples that the run will have consumed in the end.
    """
    workers = run.data.num_workers
    steps = DataLoader(
        _Steps(stream, run, topology),
        batch_size=None,
        sampler=range(consumed_samples, end, run.training.global_batch_size),
        num_workers=workers,
        multiprocessing_context="spawn" if workers else None,
        collate_fn=_as_they_are,
    )
    with _without_main_script():
        return iter(steps)


class _Steps(Dataset[list[Arrays]]):
    """What this process reads for the steps of a run, by the number of samples consumed before."""

    def __init__(self, stream: LedgerSamples, run: RunConfig, topology: Topology) -> None:
        self._stream, self._with_starts = stream, run.data.reset_at_eod
        self._sizes = run.training.global_batch_size, run.training.micro_batch_size
        self._place = topology.data_parallel_rank, topology.data_parallel_size

    def __getitem__(self, consumed_samples: int) -> list[Arrays]:
        shares = micro_batches(consumed_samples, *self._sizes, *self._place)
        return [read_samples(self._stream, numbers, self._with_starts) for numbers in shares]


@contextmanager
def _without_main_script() -> Iterator[None]:
    """Processes that are started meanwhile do not run the main script again, which may have no ``__main__`` guard.

    They need nothing of it: what they get is the library's own.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _as_they_are(arrays: list[Arrays]) -> list[Arrays]:
    """In place of torch's own collation, which would make tensors in a worker."""
    return arrays
