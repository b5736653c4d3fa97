"""From the ledger to the micro batches of this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset

from steel_megatron.config import RunConfig
from steel_megatron.data.ledger.ledger import LOOK_SECONDS, Ledger, dumps, edit
from steel_megatron.data.ledger.loader import LedgerSamples, SequentialSamples, micro_batches, read_samples
from steel_megatron.data.ledger.session import Place, begun, continued, leave, new_ledger, place_of, read_ledger, tidy
from steel_megatron.errors import ConfigError, SteelError
from steel_megatron.log import get_logger
from steel_megatron.parallel.agreement import first_process_says, on_first_process, together
from steel_megatron.parallel.topology import Topology
from steel_megatron.platform import probe
from steel_megatron.train.objective.base import objective_of

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
        validation_sets: the samples to validate on, by the name of the set.

    Raises:
        ConfigError: no training corpus is named, or the batch does not fit the launch.
        DataError: a corpus or the ledger cannot be read.
    """

    def __init__(self, run: RunConfig, topology: Topology) -> None:
        run.num_micro_batches(topology.launch.world_size)  # checks the batch before anything is read
        self._run, self._topology = run, topology
        self._batch = objective_of(run).batch
        self._stream: LedgerSamples | None = None
        self._ahead: Iterator[list[Arrays]] = iter(())
        self._next = self._last = -1
        path, train, length = run.ledger_path, run.data.train, run.model.sequence_length

        def read() -> Ledger | None:
            if not train and not path.exists():
                raise ConfigError(
                    f"data.train is empty and there is no ledger {path}; name at least one indexed corpus (a prefix "
                    "made by preprocess), or make a ledger with steel-megatron data create"
                )
            return read_ledger(path, length, train)

        # The first process reads it for all, so that all have the very same, whatever changes meanwhile.
        self.ledger = _shared(on_first_process(read), path)
        self._new = None
        if self.ledger is None:
            self._new = on_first_process(lambda: new_ledger(path.parent, train, length, run.training.seed))
        vocab_size = run.model.vocab_size
        self.validation_sets = together(
            lambda: {
                name: SequentialSamples(prefixes, length, vocab_size)
                for name, prefixes in run.data.validation_sets.items()
            }
        )

    def begin(
        self, step: int = 0, consumed_samples: int = 0, check: Callable[[Ledger], None] = lambda ledger: None
    ) -> None:
        """Settle from which sample on what was appended counts, and get ready to read from there; on every process.

        A start that is refused leaves the ledger as it was.

        Args:
            step: optimizer steps done.
            consumed_samples: samples consumed by them.
            check: raises a SteelError where the ledger is not the one of the checkpoint that is resumed.

        Raises:
            ConfigError: the run has done more steps than it is to do.
            DataError: the ledger cannot be written, does not hold as many samples as the run will read, or a corpus
                cannot be used.
        """
        place = place_of(self._run, step, consumed_samples)

        def change(ledger: Ledger) -> Ledger:
            check(ledger)
            return begun(ledger, place)

        self._last = place.last
        self._settle(place, change)

    def look(self, step: int, consumed_samples: int, *, goes_on: bool) -> None:
        """Take in what has come to the ledger since the last look, before a checkpoint; on every process.

        What cannot be taken in is left waiting with a warning. A run that does not go on takes in nothing.
        """
        place, own = place_of(self._run, step, consumed_samples, goes_on=goes_on), self.ledger
        path = self._run.ledger_path
        assert own is not None, "begin() comes first"
        if goes_on:
            try:
                self._settle(place, lambda ledger: continued(ledger, own, place))
                return
            except SteelError as error:
                _warn(
                    f"a change of {path} cannot be taken in at sample {consumed_samples:,}, and waits for the next "
                    f"checkpoint, as does what was planned for before sample {place.until:,}; mend what is wrong by "
                    "then, or take it back (steel-megatron data cancel)",
                    error,
                )
        try:
            kept = on_first_process(lambda: leave(path, own, place))
        except SteelError as error:
            _warn(f"{path} stays as it is, and does not say how far the run has read", error)
            return
        if not goes_on:
            self.ledger = _shared(kept, path)

    def _settle(self, place: Place, change: Callable[[Ledger], Ledger]) -> None:
        """Change the ledger's file and read by it from then on, unless a process cannot; then all is as it was."""
        path, before = self._run.ledger_path, self.ledger
        with ExitStack() as locked:

            def changed() -> Ledger:
                wait = None if self._stream is None else LOOK_SECONDS
                file = locked.enter_context(edit(path, self._new, wait))
                file.ledger = change(file.ledger)
                return file.ledger

            ledger = _shared(on_first_process(changed), path)
            assert ledger is not None
            is_new = before is None or ledger.differs_from(before)
            stream = together(lambda: self._samples(ledger)) if is_new or self._stream is None else self._stream
            # Before it is written: what cannot be read must not be in the file. Others then find the same index.
            soon = min(place.consumed + place.global_batch_size, place.last)
            on_first_process(lambda: stream.prepare(place.consumed, soon))
            on_first_process(locked.close)  # writes it
        self.ledger, self._stream = ledger, stream
        if is_new:
            if self._next >= 0:
                logger.info(f"from sample {place.consumed:,} on, {path} says something new of what is read")
            self._ahead, self._next = iter(()), -1
        on_first_process(lambda: tidy(ledger, self._cache))  # passes that are over need no index any more

    def _samples(self, ledger: Ledger) -> LedgerSamples:
        return LedgerSamples(ledger, self._run.model.vocab_size, self._cache)

    @property
    def _cache(self) -> Path:
        return self._run.ledger_path.with_suffix(".cache")

    def training(self, consumed_samples: int) -> list[Any]:
        """This process's micro batches of the step that begins after ``consumed_samples`` samples."""
        assert self._stream is not None, "begin() comes first"
        training = self._run.training
        if consumed_samples != self._next:
            size = training.global_batch_size
            steps = range(consumed_samples, self._last, size)
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
        return [self._batch(samples, starts, None, self._topology) for samples, starts in next(self._ahead)]

    def validation(self) -> Iterator[tuple[str, list[Any]]]:
        """This process's micro batches of one validation, by set; the same samples each time, under any layout."""
        for name, samples in self.validation_sets.items():
            yield name, self._validation_batches(samples)

    def _validation_batches(self, samples: SequentialSamples) -> list[Any]:
        """The last ones are filled up with samples that do not count, so that none is left out."""
        training = self._run.training
        count = min(len(samples), training.eval_steps * training.global_batch_size)
        together = training.micro_batch_size * self._topology.data_parallel_size
        first = self._topology.data_parallel_rank * training.micro_batch_size
        batches = []
        for start in range(first, count + first, together):
            own = range(start, start + training.micro_batch_size)
            numbers = [min(number, count - 1) for number in own]
            counts = torch.tensor([[float(number < count)] for number in own])
            batches.append(
                self._batch(*read_samples(samples, numbers, self._run.data.reset_at_eod), counts, self._topology)
            )
        return batches


def _as_they_are(arrays: list[Arrays]) -> list[Arrays]:
    """In place of torch's own collation, which would make tensors in a worker."""
    return arrays


def _warn(message: str, error: SteelError) -> None:
    """A warning by the first process, and by those whose own error it is."""
    if dist.get_rank() == 0 or type(error) is not SteelError:  # together() tells the others in general terms
        logger.warning(f"{message}: {error}")


def _shared(ledger: Ledger | None, path: Path) -> Ledger | None:
    """The first process's ledger on every process, byte for byte; None if it has none."""
    content = dumps(ledger).encode() if ledger is not None else b""
    size = first_process_says(len(content))
    if not size:
        return None
    said = torch.zeros(size, dtype=torch.uint8)
    if dist.get_rank() == 0:
        said = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    said = said.to(probe().device)
    dist.broadcast(said, src=0)
    return Ledger.parse(said.cpu().numpy().tobytes(), path)
