"""The ledger of a run: created with its first corpora, checked against its settings, synced while the run reads."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol, TypeVar

from steel_megatron.config import RunConfig
from steel_megatron.data.ledger.history import History
from steel_megatron.data.ledger.ledger import SYNC_SECONDS, Ledger, dumps, edit
from steel_megatron.data.ledger.loader import LedgerSamples
from steel_megatron.data.ledger.locations import found
from steel_megatron.data.ledger.sync import RunPosition, check_new_run, defer_file, resume, run_position, start
from steel_megatron.data.sampling.packing import remove_caches
from steel_megatron.errors import ConfigError, DataError, SteelError
from steel_megatron.log import get_logger, launched_rank

logger = get_logger(__name__)

Result = TypeVar("Result")


def read_ledger(path: Path, sequence_length: int, beginning: Sequence[str]) -> Ledger | None:
    """A run's ledger; None if there is none yet.

    Args:
        path: its file.
        sequence_length: of the model.
        beginning: the corpora that the run's settings name; empty for any.

    Raises:
        ConfigError: there is neither a ledger nor a corpus to create one.
        DataError: it is damaged, made for another sequence length, or does not read these corpora.
    """
    if not path.exists():
        if not beginning:
            raise ConfigError(
                f"data.train is empty and there is no ledger {path}; name at least one indexed corpus (a prefix made "
                "by preprocess), or make a ledger with steel-megatron data create"
            )
        return None
    ledger = Ledger.load(path)
    if ledger.history.sequence_length != sequence_length:
        raise DataError(
            f"{path} cuts samples of {ledger.history.sequence_length:,} tokens, but model.sequence_length is "
            f"{sequence_length:,}; use another checkpoint.directory or ledger"
        )
    if beginning:
        ledger.check_began_with(beginning)
    return ledger


class Processes(Protocol):
    """How the processes of a run act as one; :mod:`steel_megatron.parallel.agreement` implements it."""

    def raise_if_any_rank_failed(self, action: Callable[[], Result]) -> Result:
        """Do ``action`` on every process; if it raises a SteelError on any, all processes raise."""
        ...

    def on_rank0(self, action: Callable[[], Result]) -> Result | None:
        """Do ``action`` on rank 0 only; if it raises a SteelError there, all processes raise."""
        ...

    def first_process_bytes(self, content: bytes) -> bytes:
        """Rank 0's ``content``, on every process."""
        ...


class LedgerSession:
    """A run's ledger from its start to its end. Every process of the run has one and calls it at the same points.

    Rank 0 reads and writes the file. The others receive its ledger byte for byte, whatever changes in the meantime.

    Args:
        run: the run's settings.
        processes: how the run's processes act as one.

    Attributes:
        ledger: what the run reads; None before :meth:`start` of a new run.
        samples: the samples to train on; None before :meth:`start`. Another object after a sync that changed them.
        end: the samples that the run will have consumed in the end.

    Raises:
        ConfigError: no training corpus is named.
        DataError: a corpus or the ledger cannot be read.
    """

    def __init__(self, run: RunConfig, processes: Processes) -> None:
        self._run, self._processes, self._path = run, processes, run.ledger_path
        self._cache = self._path.with_suffix(".cache")
        self._named = [*run.data.train, *itertools.chain(*run.data.validation_sets.values())]
        self._restarted = (Path(run.checkpoint.directory) / "run.yaml").exists()  # written once a run has started
        self._check: Callable[[LedgerSamples], None] = lambda samples: None
        self.samples: LedgerSamples | None = None
        self.end = 0
        train, length = run.data.train, run.model.sequence_length
        self.ledger, self._new = self._shared(processes.on_rank0(lambda: read_ledger(self._path, length, train))), None
        if self.ledger is None:
            folder, seed = self._path.parent, run.training.seed
            self._new = processes.on_rank0(lambda: Ledger.create(train, length, seed, folder, epochs=None))

    def accept_if(self, check: Callable[[LedgerSamples], None]) -> None:
        """Set what samples the run takes, and check a new ledger's at once: nothing is written if they are refused.

        Args:
            check: raises a SteelError for those that it does not take.
        """
        self._check = check
        vocab_size = self._run.model.vocab_size
        self._processes.on_rank0(lambda: check(LedgerSamples(self._new, vocab_size)) if self._new else None)

    def _shared(self, ledger: Ledger | None) -> Ledger | None:
        """Rank 0's ledger on every process, byte for byte; None if it has none."""
        content = self._processes.first_process_bytes(dumps(ledger.history).encode() if ledger is not None else b"")
        return Ledger.parse(content, self._path) if content else None

    def start(
        self, step: int = 0, consumed_samples: int = 0, check: Callable[[History], None] = lambda history: None
    ) -> None:
        """Apply pending changes at the sample at which the run starts or resumes, and prepare to read from there.

        A start that is refused leaves the ledger unchanged.

        Args:
            step: optimizer steps done.
            consumed_samples: samples consumed by them.
            check: raises a SteelError if the ledger is not that of the checkpoint.

        Raises:
            ConfigError: the run has done more steps than it is to do.
            DataError: the ledger cannot be written, does not hold as many samples as the run will read, was read by
                another run although this one is new, or a corpus cannot be used.
        """
        position = run_position(self._run, step, consumed_samples)

        def change(history: History) -> History:
            check(history)
            if step == 0:
                check_new_run(history, self._path, Path(self._run.checkpoint.directory), restarted=self._restarted)
            return start(history, position)

        self.end = position.end
        self._apply(position, change)

    def sync(self, step: int, consumed_samples: int) -> None:
        """Apply the changes made since the last sync; before a checkpoint after which the run continues.

        Changes that cannot be applied are deferred with a warning.
        """
        position, own = run_position(self._run, step, consumed_samples), self.ledger
        assert own is not None, "start() comes first"
        try:
            self._apply(position, lambda history: resume(history, own.history, position))
        except SteelError as error:
            _warn(
                f"changes of {self._path} cannot be applied at sample {consumed_samples:,}; they are deferred to the "
                f"next checkpoint, as is what was planned before sample {position.next_sync:,}. Fix the problem by "
                "then, or withdraw the changes (steel-megatron data cancel)",
                error,
            )
            self._defer(own, position)

    def release(self, step: int, consumed_samples: int) -> None:
        """Apply nothing, and release the samples that the run will not read; before its last checkpoint."""
        position, own = run_position(self._run, step, consumed_samples, ends=True), self.ledger
        assert own is not None, "start() comes first"
        self.ledger = self._defer(own, position)

    def _defer(self, own: Ledger, position: RunPosition) -> Ledger | None:
        """The ledger's file after :func:`~steel_megatron.data.ledger.sync.defer`, or ``own`` if that fails."""
        try:
            return self._shared(self._processes.on_rank0(lambda: defer_file(self._path, own.history, position)))
        except SteelError as error:
            _warn(f"{self._path} stays as it is, and does not record how far the run has read", error)
            return own

    def _apply(self, position: RunPosition, change: Callable[[History], History]) -> None:
        """Change the ledger's file and read by it from then on; if a process cannot, everything stays as it was."""
        processes, before, samples = self._processes, self.ledger, self.samples
        with ExitStack() as locked:

            def changed() -> Ledger:
                file = locked.enter_context(edit(self._path, self._new, SYNC_SECONDS if samples else None))
                file.ledger = file.ledger.then(change)
                if samples is None:  # later, files that are gone are no reason to stop: they are open
                    file.ledger = file.ledger.then(found, self._path, self._named)
                return file.ledger

            ledger = self._shared(processes.on_rank0(changed))
            assert ledger is not None
            if samples is None or before is None or ledger.history.differs_from(before.history):
                samples = processes.raise_if_any_rank_failed(lambda: self._opened(ledger))
            # Before the file is written, as it must not say what cannot be read. The other processes find the index.
            step_end = min(position.consumed + position.global_batch_size, position.end)
            processes.on_rank0(lambda: samples.prepare(position.consumed, step_end))
            processes.on_rank0(locked.close)  # writes it
        if self.samples not in (None, samples):
            logger.info(f"changes of {self._path} take effect at sample {position.consumed:,}")
        self.ledger, self.samples = ledger, samples
        processes.on_rank0(lambda: prune_cache(ledger.history, self._cache))

    def _opened(self, ledger: Ledger) -> LedgerSamples:
        """The samples of a ledger, if the run takes them."""
        samples = LedgerSamples(ledger, self._run.model.vocab_size, self._cache)
        self._check(samples)
        return samples


def _warn(message: str, error: SteelError) -> None:
    """Warn on rank 0, and on processes whose own error it is."""
    if launched_rank() == 0 or type(error) is not SteelError:  # an error of another process is a plain SteelError
        logger.warning(f"{message}: {error}")


def prune_cache(history: History, cache: Path) -> None:
    """Remove the caches of epochs that are finished at a ledger's last sync."""
    consumed = history.schedule.consumed(history.last_synced_sample).tolist()
    epochs = {history.corpora[n].content: consumed[n] // history.samples(n) for n in history.used}
    remove_caches(cache, epochs)
