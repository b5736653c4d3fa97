"""The protocol between a run and its ledger's file: what a sync applies, what it defers, and which past it refuses.

A run syncs when it starts or resumes, and before each checkpoint. Changes made by then apply from that sample on. The
sample of the next sync is written into the file: while the run holds its lock, no command changes what is read before
it. Where the file system does not show the lock, such a change is deferred to the next sync.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from steel_megatron.config import RunConfig
from steel_megatron.data.ledger.changes import apply_pending, at_step, joined, synced
from steel_megatron.data.ledger.history import History
from steel_megatron.data.ledger.ledger import SYNC_SECONDS, Ledger, edit
from steel_megatron.data.ledger.records import MOST_SAMPLES, in_words
from steel_megatron.errors import CheckpointError, ConfigError, DataError
from steel_megatron.log import get_logger

logger = get_logger(__name__)


@dataclass(frozen=True)
class RunPosition:
    """Where a run syncs with its ledger."""

    step: int
    """Optimizer steps done."""
    consumed: int
    """Samples consumed."""
    next_sync: int
    """The sample at which it syncs next; ``consumed`` if it ends here."""
    end: int
    """The samples that it will have consumed in the end."""
    global_batch_size: int


def run_position(run: RunConfig, step: int, consumed: int, *, ends: bool = False) -> RunPosition:
    """The position of a run after a step.

    Args:
        run: the run's settings.
        step: optimizer steps done.
        consumed: samples consumed by them.
        ends: whether the run ends here, without a next sync.

    Raises:
        ConfigError: it has done more steps than it is to do.
    """
    training, size = run.training, run.training.global_batch_size
    if step > training.train_steps:
        raise ConfigError(
            f"training.train_steps is {training.train_steps}, but the run has done {step} steps already; raise it, or "
            "choose another checkpoint.directory"
        )
    next_save = (step // run.checkpoint.save_interval + 1) * run.checkpoint.save_interval
    steps = 0 if ends else max(0, min(next_save, training.last_step) - step)
    return RunPosition(step, consumed, consumed + steps * size, consumed + (training.train_steps - step) * size, size)


def start(history: History, position: RunPosition) -> History:
    """The history with which a run starts: pending changes apply at its position.

    Raises:
        DataError: pending changes do not fit, or there are fewer samples than the run needs.
    """
    active = apply_pending(history, position.consumed, position.next_sync)
    active.schedule.require(position.end, "training.train_steps x training.global_batch_size")
    return at_step(active, position.step, position.consumed, position.global_batch_size)


def resume(history: History, own: History, position: RunPosition) -> History:
    """The history with which a run continues: :func:`start`, unless the past was changed.

    Args:
        history: the file's.
        own: the history by which the run has read so far.
        position: where the run syncs.

    Raises:
        DataError: as :func:`start`, or the file has another history of what was read.
    """
    if difference := first_difference(history, own, position.consumed):
        raise DataError(f"{difference[0]}; this differs from what was read")
    return start(history, position)


def defer(history: History, own: History, position: RunPosition) -> History:
    """The file's history when a run applies no changes and reads by ``own`` to its next sync.

    It equals ``own`` until there. Pending changes stay pending, and so do later planned ones; changes planned for a
    sample before the next sync become pending. So nothing is lost, and the next sync finds it.

    Args:
        history: the file's.
        own: the history by which the run reads.
        position: where the run syncs.

    Raises:
        DataError: the two do not fit together.
    """
    if first_difference(history, own, position.next_sync) is None:
        return synced(history, position.consumed, position.next_sync)
    if any(mine.identity != others.identity for mine, others in zip(history.corpora, own.corpora, strict=False)):
        raise DataError("its corpora are not those that the run reads")
    begin, read = position.consumed, own.skipped_in(0, position.next_sync)
    if (late := history.skipped_in(0, position.next_sync)) != read:
        logger.warning(
            f"samples {_in_words(late)} were to be skipped, and {_in_words(read)} are: the change came too late, as "
            f"the run reads from sample {begin:,} to {position.next_sync:,} without looking; it is dropped up to there"
        )
    skipped = joined([*read, *history.skipped_in(position.next_sync, MOST_SAMPLES)])
    events = own.before(position.next_sync)
    meanings, in_file = [own.meaning(event) for event in events], [history.meaning(event) for event in history.events]
    for event, meaning in zip(events, meanings, strict=True):
        if event.start(0) >= position.consumed and meaning not in in_file:
            logger.warning(
                f"{in_words(event, own.corpora)} at sample {event.at:,} was cancelled too late: the run continues with "
                "it; undo it by another change, such as steel-megatron data remove"
            )
    # In the order in which they would have applied: pending changes here, then planned ones.
    for event in sorted(history.events, key=lambda event: event.start(position.consumed)):
        is_later = event.start(position.next_sync) >= position.next_sync
        if is_later or history.meaning(event) not in meanings:
            events.append(event if is_later else dataclasses.replace(event, at=None))
    corpora = max(history.corpora, own.corpora, key=len)
    deferred = dataclasses.replace(own, events=tuple(events), corpora=corpora, skipped=skipped)
    return synced(deferred, position.consumed, position.next_sync)


def defer_file(path: Path, own: History, position: RunPosition) -> Ledger:
    """:func:`defer` for a ledger's file. If the two do not fit together, the file's ledger is saved next to it.

    Args:
        path: the file.
        own: the history by which the run reads.
        position: where the run syncs.

    Returns:
        the ledger that the file holds afterwards.

    Raises:
        DataError: the file is missing or damaged, another process keeps its lock, or the disk refuses.
    """
    with edit(path, wait=SYNC_SECONDS) as file:
        try:
            file.ledger = file.ledger.then(defer, own, position)
        except DataError as error:
            aside = path.with_name(f"{path.stem}.refused-{position.consumed}{path.suffix}")
            file.ledger.save(aside)
            file.ledger = Ledger(synced(own, position.consumed, position.next_sync), path.parent)
            logger.warning(
                f"{path} is reset to what the run reads; its changes do not fit and are saved in {aside}: {error}"
            )
    return file.ledger


def first_difference(history: History, other: History, position: int) -> tuple[str, int | None] | None:
    """The first difference between two histories of the samples before a position.

    Args:
        history: one history.
        other: the one it is compared with.
        position: number of samples that are compared.

    Returns:
        what it is, and its sample if it is a change that only ``history`` has; None if there is no difference.
    """
    for name in ("seed", "sequence_length"):
        mine, others = getattr(history, name), getattr(other, name)
        if mine != others:
            return f"its {name} is {mine} in place of {others}", None
    events, wanted = history.before(position), other.before(position)
    for mine, others in zip_longest(events, wanted):
        if mine is None or others is None or history.meaning(mine) != other.meaning(others):
            found = f"{in_words(mine, history.corpora)} at sample {mine.at:,}" if mine else "no change"
            expected = f"{in_words(others, other.corpora)} at sample {others.at:,}" if others else "none"
            alone = mine is not None and all(event.at != mine.at for event in wanted)
            return f"it has {found}, where there was {expected}", mine.at if alone and mine else None
    skipped, wanted_skipped = history.skipped_in(0, position), other.skipped_in(0, position)
    if skipped != wanted_skipped:
        return f"it skips the samples {_in_words(skipped)}, where {_in_words(wanted_skipped)} were skipped", None
    return None


def _in_words(parts: Sequence[range]) -> str:
    """Parts of samples, as the command takes them."""
    return ", ".join(f"{part.start}:{part.stop}" for part in parts) or "none"


def check_new_run(history: History, path: Path, folder: Path, *, restarted: bool) -> None:
    """Check the ledger of a run that has no checkpoint, and so starts at sample 0.

    Args:
        history: of the ledger.
        path: its file.
        folder: the run's folder.
        restarted: whether a run was started in the folder before, and may have been killed before its first checkpoint.

    Raises:
        DataError: another run has read by the ledger; its progress would be lost. The message says how to share data.
    """
    if not history.last_synced_sample:
        return
    found = f"{path} was read to sample {history.last_synced_sample:,}, but {folder} has no checkpoint to resume from"
    if not restarted and path.parent.resolve() != folder.resolve():
        raise DataError(
            f"{found}; starting at sample 0 would overwrite the progress of the run that read it. To read the same "
            f"data, copy the ledger into the new run's folder (cp {path} {folder / 'ledger.json'}, and any "
            "dropped-*.npy next to it) and leave out data.ledger; to resume that run, set checkpoint.directory to its "
            "folder"
        )
    logger.warning(
        f"{found}: this run starts at sample 0, and the ledger's progress is set back to it; changes keep their samples"
    )


def check_past(history: History | None, path: Path, checkpoint: Path, consumed: int, fingerprint: str) -> None:
    """Check that a ledger has the same past as a checkpoint.

    Args:
        history: of the ledger; None if there is none.
        path: its file, for messages.
        checkpoint: the checkpoint's folder, which has a copy of its ledger.
        consumed: the samples consumed before the checkpoint.
        fingerprint: the checkpoint's, of these samples.

    Raises:
        CheckpointError: it has another past; the message names the first difference and how to fix it.
    """
    if history is not None and history.fingerprint(consumed) == fingerprint:
        return
    own = checkpoint / "ledger.json"
    fix, found = f"go back to the checkpoint's ledger (cp {own} {path}), which drops later changes", ""
    with suppress(DataError):
        if history is None:
            found = ": the ledger is missing"
        elif difference := first_difference(history, Ledger.load(own).history, consumed):
            found = f": {difference[0]}"
            if difference[1] is not None and difference[1] >= history.last_synced_sample:
                fix = f"withdraw the change: steel-megatron data cancel {path} --at {difference[1]}"
    raise CheckpointError(
        f"{checkpoint} was trained on other data than {path} has for the first {consumed:,} samples{found}; {fix}. Or "
        "use the weights in another folder (checkpoint.init_from)"
    )
