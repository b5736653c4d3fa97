"""The ledger of a run: made with its first corpora, held against its settings, synced while the run reads by it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol, TypeVar

from steel_megatron.config import RunConfig
from steel_megatron.data.ledger.history import History
from steel_megatron.data.ledger.ledger import SYNC_SECONDS, Ledger, dumps, edit
from steel_megatron.data.ledger.loader import LedgerSamples
from steel_megatron.data.ledger.sync import RunPosition, check_new_run, defer_file, resume, run_position, start
from steel_megatron.data.sampling.packing import remove_caches
from steel_megatron.errors import ConfigError, DataError, SteelError
from steel_megatron.log import get_logger, launched_rank

logger = get_logger(__name__)

Result = TypeVar("Result")


def read_ledger(path: Path, sequence_length: int, beginning: Sequence[str]) -> Ledger | None:
    """A run's ledger; None if there is none yet.

    Args:
        path: where it is.
        sequence_length: of the model.
        beginning: the corpora that the run's settings name; empty for any.

    Raises:
        DataError: it is damaged, for other sequences, or does not read these corpora.
    """
    if not path.exists():
        return None
    ledger = Ledger.load(path)
    if ledger.history.sequence_length != sequence_length:
        raise DataError(
            f"{path} cuts samples of {ledger.history.sequence_length:,} tokens, but model.sequence_length is "
            f"{sequence_length:,}; take another checkpoint.directory or ledger"
        )
    if beginning:
        ledger.check_began_with(beginning)
    return ledger


class Processes(Protocol):
    """How the processes of a run act as one; :mod:`steel_megatron.parallel.agreement` is it."""

    def raise_if_any_rank_failed(self, action: Callable[[], Result]) -> Result:
        """Do ``action`` on every process; if it raises a SteelError on any, all of them raise."""
        ...

    def on_rank0(self, action: Callable[[], Result]) -> Result | None:
        """Do ``action`` on the first process alone; if it raises a SteelError there, all of them raise."""
        ...

    def first_process_bytes(self, content: bytes) -> bytes:
        """The first process's ``content``, on every process."""
        ...


class LedgerSession:
    """A run's ledger from its start to its end; every process of the run has one, and calls it at the same moments.

    The first process reads and writes the file. The others get its ledger byte for byte, whatever changes meanwhile.

    Args:
        run: the run's settings.
        processes: how the run's processes act as one.

    Attributes:
        ledger: which corpora the run reads, and in which order; None before :meth:`start` of a new run.
        samples: the samples to train on; None before :meth:`start`. Another object after a sync that changed them.
        end: the samples that the run will have consumed in the end.

    Raises:
        ConfigError: no training corpus is named.
        DataError: a corpus or the ledger cannot be read.
    """

    def __init__(self, run: RunConfig, processes: Processes) -> None:
        self._run, self._processes, self._path = run, processes, run.ledger_path
        self._cache = self._path.with_suffix(".cache")
        self._restarted = (Path(run.checkpoint.directory) / "run.yaml").exists()  # written once a run has started
        self.samples: LedgerSamples | None = None
        self.end = 0
        self.ledger, self._new = self._shared(processes.on_rank0(self._read)), None
        if self.ledger is None:
            arguments = run.data.train, run.model.sequence_length, run.training.seed, self._path.parent
            self._new = processes.on_rank0(lambda: Ledger.create(*arguments, epochs=None))

    def _read(self) -> Ledger | None:
        train = self._run.data.train
        if not train and not self._path.exists():
            raise ConfigError(
                f"data.train is empty and there is no ledger {self._path}; name at least one indexed corpus (a prefix "
                "made by preprocess), or make a ledger with steel-megatron data create"
            )
        return read_ledger(self._path, self._run.model.sequence_length, train)

    def _shared(self, ledger: Ledger | None) -> Ledger | None:
        """The first process's ledger on every process, byte for byte; None if it has none."""
        content = self._processes.first_process_bytes(dumps(ledger.history).encode() if ledger is not None else b"")
        return Ledger.parse(content, self._path) if content else None

    def start(
        self, step: int = 0, consumed_samples: int = 0, check: Callable[[History], None] = lambda history: None
    ) -> None:
        """Give pending changes the position at which the run starts or resumes, and get ready to read from there.

        A start that is refused leaves the ledger as it was.

        Args:
            step: optimizer steps done.
            consumed_samples: samples consumed by them.
            check: raises a SteelError where the ledger is not the one of the checkpoint that is resumed.

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
        """Take in what has come to the ledger since the last sync; before a checkpoint after which the run reads on.

        What cannot be taken in is left waiting with a warning.
        """
        position, own = run_position(self._run, step, consumed_samples), self.ledger
        assert own is not None, "start() comes first"
        try:
            self._apply(position, lambda history: resume(history, own.history, position))
        except SteelError as error:
            _warn(
                f"a change of {self._path} cannot be taken in at sample {consumed_samples:,}, and waits for the next "
                f"checkpoint, as does what was planned for before sample {position.next_sync:,}; mend what is wrong by "
                "then, or take it back (steel-megatron data cancel)",
                error,
            )
            self._defer(own, position)

    def release(self, step: int, consumed_samples: int) -> None:
        """Take in nothing, and free what the run will not read; before its last checkpoint."""
        position, own = run_position(self._run, step, consumed_samples, ends=True), self.ledger
        assert own is not None, "start() comes first"
        self.ledger = self._defer(own, position)

    def _defer(self, own: Ledger, position: RunPosition) -> Ledger | None:
        """The ledger's file after :func:`~steel_megatron.data.ledger.sync.defer`, or ``own`` if that fails."""
        try:
            return self._shared(self._processes.on_rank0(lambda: defer_file(self._path, own.history, position)))
        except SteelError as error:
            _warn(f"{self._path} stays as it is, and does not say how far the run has read", error)
            return own

    def _apply(self, position: RunPosition, change: Callable[[History], History]) -> None:
        """Change the ledger's file and read by it from then on, unless a process cannot; then all is as it was."""
        processes, before, samples = self._processes, self.ledger, self.samples
        with ExitStack() as locked:

            def changed() -> Ledger:
                file = locked.enter_context(edit(self._path, self._new, SYNC_SECONDS if samples else None))
                file.ledger = file.ledger.then(change)
                return file.ledger

            ledger = self._shared(processes.on_rank0(changed))
            assert ledger is not None
            if samples is None or before is None or ledger.history.differs_from(before.history):
                samples = processes.raise_if_any_rank_failed(
                    lambda: LedgerSamples(ledger, self._run.model.vocab_size, self._cache)
                )
            # Before it is written: what cannot be read must not be in the file. Others then find the same index.
            step_end = min(position.consumed + position.global_batch_size, position.end)
            processes.on_rank0(lambda: samples.prepare(position.consumed, step_end))
            processes.on_rank0(locked.close)  # writes it
        if self.samples not in (None, samples):
            logger.info(f"from sample {position.consumed:,} on, {self._path} says something new of what is read")
        self.ledger, self.samples = ledger, samples
        processes.on_rank0(lambda: prune_cache(ledger.history, self._cache))


def _warn(message: str, error: SteelError) -> None:
    """A warning by the first process, and by those whose own error it is."""
    if launched_rank() == 0 or type(error) is not SteelError:  # others are told of an error in general terms
        logger.warning(f"{message}: {error}")


def prune_cache(history: History, cache: Path) -> None:
    """Remove from a ledger's caches what no run reads that resumes from its last sync."""
    cursors = history.schedule.cursors(history.last_synced_sample).tolist()
    over = {history.corpora[n].content: cursors[n] // history.samples(n) for n in history.used}
    remove_caches(cache, over)
