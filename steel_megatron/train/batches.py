"""From the ledger to the micro batches of this process."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from steel_megatron.config import RunConfig
from steel_megatron.data.ledger import Ledger, edit
from steel_megatron.data.loader import LedgerSamples, SequentialSamples, micro_batches, read_samples
from steel_megatron.data.run_ledger import new_ledger, read_ledger
from steel_megatron.errors import ConfigError
from steel_megatron.log import get_logger
from steel_megatron.parallel.agreement import on_first_process, together
from steel_megatron.parallel.topology import Topology
from steel_megatron.train.objective import Batch

logger = get_logger(__name__)

Arrays = tuple[np.ndarray, np.ndarray | None]
"""Token ids and, where documents are kept apart, the beginnings of their documents: int64 [B, T + 1] both."""


class _Steps(Dataset[list[Arrays]]):
    """What this process reads for the steps of a run, by the number of samples consumed before."""

    def __init__(self, stream: LedgerSamples, run: RunConfig, topology: Topology) -> None:
        self._stream, self._with_starts = stream, run.data.reset_at_eod
        self._sizes = run.training.global_batch_size, run.training.micro_batch_size
        self._place = topology.data_parallel_rank, topology.data_parallel_size

    def __getitem__(self, consumed_samples: int) -> list[Arrays]:
        shares = micro_batches(consumed_samples, *self._sizes, *self._place)
        return [read_samples(self._stream, numbers, self._with_starts) for numbers in shares]


class Batches:
    """Training and validation batches of one run.

    Args:
        run: the run's settings.
        topology: the process groups.

    Attributes:
        ledger: which corpora the run reads, and in which order; None before :meth:`begin` of a new run.

    Raises:
        ConfigError: no training corpus is named, or the batch does not fit the launch.
        DataError: a corpus or the ledger cannot be read.
    """

    def __init__(self, run: RunConfig, topology: Topology) -> None:
        run.num_micro_batches(topology.launch.world_size)  # checks the batch before anything is read
        self._run, self._topology = run, topology
        self._stream: LedgerSamples | None = None
        self._ahead: Iterator[list[Arrays]] = iter(())
        self._next = -1
        path, train, length = run.ledger_path, run.data.train, run.model.sequence_length
        if not train and not path.exists():
            raise ConfigError(
                f"data.train is empty and there is no ledger {path}; name at least one indexed corpus (a prefix made "
                "by preprocess), or make a ledger with steel-megatron data create"
            )
        self.ledger = together(lambda: read_ledger(path, length, train))
        self._new = None
        if self.ledger is None:
            self._new = on_first_process(lambda: new_ledger(path.parent, train, length, run.training.seed))
        self._validation = None
        if run.data.validation:
            vocab_size = run.model.vocab_size
            self._validation = together(lambda: SequentialSamples(run.data.validation, length, vocab_size))

    @property
    def has_validation(self) -> bool:
        """Whether there is anything to validate on."""
        return self._validation is not None

    def begin(self, consumed_samples: int) -> None:
        """Settle from which sample on what was appended counts, and get ready to read from there; on every process.

        Raises:
            DataError: the ledger cannot be written, or does not hold as many samples as the run will read.
        """
        path, training = self._run.ledger_path, self._run.training

        def settle() -> None:
            with edit(path, self._new) as file:
                file.ledger = file.ledger.activate(consumed_samples)

        on_first_process(settle)
        self.ledger = ledger = together(lambda: Ledger.load(path))
        last = training.train_steps * training.global_batch_size
        ledger.require(last, "training.train_steps x training.global_batch_size")

        def samples() -> LedgerSamples:
            return LedgerSamples(ledger, self._run.model.vocab_size, path.with_suffix(".cache"))

        soon = min(consumed_samples + training.global_batch_size, last)
        on_first_process(lambda: samples().prepare(consumed_samples, soon))  # the others find the caches
        self._stream = together(samples)

    def training(self, consumed_samples: int) -> list[Batch]:
        """This process's micro batches of the step that begins after ``consumed_samples`` samples."""
        assert self._stream is not None, "begin() comes first"
        training = self._run.training
        if consumed_samples != self._next:
            size = training.global_batch_size
            steps = range(consumed_samples, training.train_steps * size, size)
            workers = self._run.data.num_workers
            self._ahead = iter(
                DataLoader(
                    _Steps(self._stream, self._run, self._topology),
                    batch_size=None,
                    sampler=steps,
                    num_workers=workers,
                    multiprocessing_context="spawn" if workers else None,
                    collate_fn=_as_they_are,
                )
            )
        self._next = consumed_samples + training.global_batch_size
        return [self._batch(*arrays) for arrays in next(self._ahead)]

    def validation(self) -> list[Batch]:
        """This process's micro batches of one validation; the same samples each time, under any layout.

        The last ones are filled up with samples that do not count, so that none is left out.
        """
        assert self._validation is not None
        training = self._run.training
        count = min(len(self._validation), training.eval_steps * training.global_batch_size)
        together = training.micro_batch_size * self._topology.data_parallel_size
        first = self._topology.data_parallel_rank * training.micro_batch_size
        batches = []
        for start in range(first, count + first, together):
            own = range(start, start + training.micro_batch_size)
            numbers = [min(number, count - 1) for number in own]
            counts = torch.tensor([[float(number < count)] for number in own])
            arrays = read_samples(self._validation, numbers, self._run.data.reset_at_eod)
            batches.append(self._batch(*arrays, counts))
        return batches

    def _batch(self, samples: np.ndarray, starts: np.ndarray | None, counts: torch.Tensor | None = None) -> Batch:
        tokens = torch.from_numpy(samples)
        mask = torch.ones(tokens.size(0), tokens.size(1) - 1)
        if starts is not None:  # no document says how another one begins
            mask = torch.from_numpy(starts[:, 1:] != np.arange(1, starts.shape[1])).float()
        return Batch(
            tokens=tokens[:, :-1].contiguous(),
            labels=tokens[:, 1:].contiguous(),
            loss_mask=mask if counts is None else mask * counts,
            segment_starts=None if starts is None else torch.from_numpy(starts[:, :-1]).contiguous(),
        ).part(self._topology)


def _as_they_are(arrays: list[Arrays]) -> list[Arrays]:
    """In place of torch's own collation, which would make tensors in a worker."""
    return arrays
